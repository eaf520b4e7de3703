"""Several processes, each with its part of a batch, add the penalty of the whole batch."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD

from baselines import PenaltyInThetaOnly, PenaltyInTrainingOnly
from kfac_flat import FlatKFAC, NeuronPruner, rewrap
from kfac_flat.averaging import mean_over_processes
from kfac_flat.curvature import tracker
from tests.optimizer.loops import criterion_of, plain
from tests.optimizer.test_failures import out_of_memory
from tests.processes import RunInProcesses
from tests.reference import batch, seeded

STEPS = 5


def network() -> nn.Module:
    """Convolutions, one of them grouped, and Linear layers; no BatchNorm, whose statistics are a rank's own."""
    return seeded(
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 4, 3, groups=2), nn.Tanh(), nn.AdaptiveAvgPool2d(2),
            nn.Flatten(), nn.Linear(16, 6), nn.Tanh(), nn.Linear(6, 3),
        )
    )  # fmt: skip


def part(x: Tensor, y: Tensor, rank: int, sizes: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """A rank's examples."""
    start = sum(sizes[:rank])
    return x[start : start + sizes[rank]], y[start : start + sizes[rank]]


def trained(rank: int | None, sizes: tuple[int, ...], wrapped: bool = True, **options: Any) -> dict[str, Any]:
    """Train on one rank's part of every batch, or on all of it; what is known of the curvature, and the weights."""
    model, criterion = network(), nn.CrossEntropyLoss()
    forward = model if rank is None or not wrapped else DistributedDataParallel(model)
    optimizer = plain(forward, criterion, SGD(model.parameters(), lr=0.05, momentum=0.9), mu=0.3, **options)
    radii = []
    for step in range(STEPS):
        x, y = batch(sum(sizes), 2, 7, 7, seed=step)
        weight = 1.0
        if rank is not None:
            x, y = part(x, y, rank, sizes)
            weight = len(x) * len(sizes) / sum(sizes)  # DistributedDataParallel counts ranks, not examples
        optimizer.zero_grad()
        (criterion(forward(x), y) * weight).backward()
        if rank is not None and not wrapped:
            for p in model.parameters():
                dist.all_reduce(p.grad)
                p.grad /= len(sizes)
        optimizer.step()
        radii.append(dict(optimizer.radii()))
    vectors = {name: (v.A, v.G) for name, v in optimizer._tracker.eigenvectors.items()}
    return {"radii": radii, "weights": dict(model.state_dict()), "vectors": vectors}


def close(a: Any, b: Any, rtol: float) -> bool:
    if isinstance(a, Tensor):
        return torch.allclose(a, b, rtol=rtol, atol=rtol * float(b.abs().max()))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(close(a[key], b[key], rtol) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(close(x, y, rtol) for x, y in zip(a, b, strict=True))
    return bool(a == pytest.approx(b, rel=rtol))


@pytest.mark.parametrize(
    ("sizes", "options"),
    [
        ((6, 6), {}),
        ((8, 4), {"eigenpairs": "streaming"}),
        ((3, 3, 3, 3), {"eigenpairs": "streaming", "every": 2, "survey_every": 2, "clip": 0.5}),
        ((4, 4), {"eigenpairs": "streaming", "reduction": "sum", "penalty": "log"}),
        ((6, 6), {"eigenpairs": "streaming", "wrapped": False}),
    ],
)
def test_processes_train_as_one_does_on_the_whole_batch(
    sizes: tuple[int, ...], options: dict[str, Any], run: RunInProcesses
) -> None:
    ranks = run(functools.partial(trained, sizes=sizes, **options), ranks=len(sizes))
    alone = trained(None, sizes, **options)
    without = trained(None, sizes, **{**options, "rho_max": 1e9})
    assert not close(alone["weights"], without["weights"], 1e-3), "the penalty changes nothing"
    for rank in ranks:
        assert close(rank["radii"], alone["radii"], 1e-9)
        assert close(rank["weights"], alone["weights"], 1e-9)
        for name, vectors in rank["vectors"].items():
            for seen, expected, first in zip(vectors, alone["vectors"][name], ranks[0]["vectors"][name], strict=True):
                assert torch.allclose((seen * expected).sum(-1).abs(), torch.ones(len(seen), dtype=seen.dtype))
                assert torch.equal(seen, first)


def _at_masks(rank: int | None, kind: Any = FlatKFAC) -> list[dict[str, Tensor]]:
    """What the penalty says of each layer's inputs, at a step that computes it and at one that does not."""
    model, sizes, criterion = network(), (8, 4), nn.CrossEntropyLoss()
    forward = model if rank is None else DistributedDataParallel(model)
    options: dict[str, Any] = {"every": 2, "batch_fraction": 1.0, "fisher": "empirical", "criterion": criterion}
    optimizer = kind(SGD(model.parameters(), lr=0.0), forward, mu=0.3, clip=0.5, **options)
    x, y = batch(sum(sizes), 2, 7, 7)
    if rank is not None:
        x, y = part(x, y, rank, sizes)
    found = []
    for _ in range(2):
        optimizer.zero_grad()
        (criterion(forward(x), y) * (1.0 if rank is None else len(x) * len(sizes) / sum(sizes))).backward()
        optimizer.step()
        terms = optimizer.input_mask_gradients()
        found.append({name: terms[p] for name, p in model.named_parameters() if p in terms})
    return found


@pytest.mark.parametrize("kind", [FlatKFAC, PenaltyInThetaOnly, PenaltyInTrainingOnly])
def test_every_process_reads_at_masks_what_one_reads_on_the_whole_batch(kind: Any, run: RunInProcesses) -> None:
    """The same in all to the bit: so they score, and remove, alike."""
    first, second = run(functools.partial(_at_masks, kind=kind))
    alone = _at_masks(None, kind)
    for here, there, expected in zip(first, second, alone, strict=True):
        assert close(here, expected, 1e-9)
        assert here.keys() == there.keys()
        assert all(torch.equal(term, there[name]) for name, term in here.items())
    assert any(term.any() for term in alone[0].values())


def _in_a_group(rank: int) -> dict[str, Any] | None:
    """Two of three processes train; the third one takes no part."""
    group = dist.new_group([0, 1])
    if rank == 2:
        return None
    model, criterion = network(), nn.CrossEntropyLoss()
    forward = DistributedDataParallel(model, process_group=group)
    optimizer = plain(forward, criterion, SGD(model.parameters(), lr=0.05), mu=0.3)
    x, y = part(*batch(8, 2, 7, 7), rank, (4, 4))
    criterion(forward(x), y).backward()
    optimizer.step()
    return {"weights": dict(model.state_dict()), "rho": optimizer.rho}


def test_only_the_processes_of_the_models_group_are_asked(run: RunInProcesses) -> None:
    first, second, _ = run(_in_a_group, ranks=3)
    model = network()
    optimizer = plain(model, base=SGD(model.parameters(), lr=0.05), mu=0.3)
    x, y = batch(8, 2, 7, 7)
    criterion_of(optimizer)(model(x), y).backward()
    optimizer.step()
    for found in (first, second):
        assert found["rho"] == pytest.approx(optimizer.rho, rel=1e-9)
        assert close(found["weights"], dict(model.state_dict()), 1e-9)


def _out_of_memory(rank: int) -> str:
    forward, optimizer = _sharing(network())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tracker, "factors_times", out_of_memory)
        try:
            _train_on(rank, forward, optimizer, range(1))
        except torch.OutOfMemoryError as error:
            return str(error)
    return "no error"


def test_out_of_memory_is_an_error_where_others_wait(run: RunInProcesses) -> None:
    """A process that went on without the penalty would send them something else."""
    assert all("out of memory" in message for message in run(_out_of_memory))


def _sampled(rank: int) -> dict[str, Any]:
    model = network()
    forward = DistributedDataParallel(model)
    optimizer = FlatKFAC(SGD(model.parameters(), lr=0.05), forward, mu=0.3, every=1)
    draws: list[Tensor] = []
    whole = optimizer._likelihood

    def watched(output: Tensor, generator: torch.Generator) -> Tensor:
        losses = whole(output, generator)
        draws.append(losses.detach() + output.detach().log_softmax(1).max(1).values)
        return losses

    optimizer._likelihood = watched
    x, y = batch(8, 2, 7, 7)  # the same on both ranks: only the labels drawn can differ
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(forward(x), y).backward()
        optimizer.step()
    return {"weights": dict(model.state_dict()), "rho": optimizer.rho, "draws": draws}


def test_ranks_draw_labels_of_their_own_and_stay_replicas(run: RunInProcesses) -> None:
    first, second = run(_sampled)
    assert all(torch.equal(first["weights"][name], w) for name, w in second["weights"].items())
    assert first["rho"] == second["rho"] > 0
    assert any(not torch.allclose(a, b) for a, b in zip(first["draws"], second["draws"], strict=True))


def _sharing(model: nn.Module) -> tuple[nn.Module, FlatKFAC]:
    forward = DistributedDataParallel(model)
    return forward, FlatKFAC(SGD(model.parameters(), lr=0.05, momentum=0.9), forward, mu=0.3, every=2)


def _train_on(rank: int, forward: nn.Module, optimizer: FlatKFAC, steps: range) -> None:
    for step in steps:
        x, y = part(*batch(8, 2, 7, 7, seed=step), rank, (4, 4))
        optimizer.zero_grad()
        F.cross_entropy(forward(x), y).backward()
        optimizer.step()


def _resumed(rank: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Train in one go, and with a checkpoint of rank 0 in between that both ranks go on from."""
    whole, model, again = network(), network(), network()
    _train_on(rank, *_sharing(whole), range(6))
    forward, optimizer = _sharing(model)
    _train_on(rank, forward, optimizer, range(3))
    saved: list[Any] = [(model.state_dict(), optimizer.state_dict()) if rank == 0 else None]
    dist.broadcast_object_list(saved)
    again.load_state_dict(saved[0][0])
    forward, optimizer = _sharing(again)
    optimizer.load_state_dict(saved[0][1])
    _train_on(rank, forward, optimizer, range(3, 6))
    return dict(whole.state_dict()), dict(again.state_dict())


def test_all_ranks_resume_from_the_checkpoint_of_one_to_the_bit(run: RunInProcesses) -> None:
    for whole, resumed in run(_resumed):
        assert all(torch.equal(resumed[name], w) for name, w in whole.items())


def _pruned(rank: int) -> dict[str, Any]:
    model = network()
    forward, optimizer = _sharing(model)
    example = batch(1, 2, 7, 7)[0]
    pruner = NeuronPruner(model, optimizer, example, target=0.4, start=1, every=1, events=2)
    for epoch in range(3):
        _train_on(rank, forward, optimizer, range(3 * epoch, 3 * epoch + 3))
        with rewrap(forward):
            pruner.step()
    return {"weights": dict(model.state_dict()), "rho": optimizer.rho}


def test_neurons_go_from_all_replicas_alike_while_the_penalty_acts(run: RunInProcesses) -> None:
    first, second = run(_pruned)
    assert all(torch.equal(first["weights"][name], w) for name, w in second["weights"].items())
    assert first["weights"]["6.weight"].numel() < network().get_parameter("6.weight").numel()
    assert first["rho"] == second["rho"] > 0


def _means(rank: int) -> list[Tensor]:
    tensors = [torch.full((3,), float(rank)), torch.full((2, 2), 10.0 * rank, dtype=torch.float64), torch.ones(0)]
    tensors += [torch.full((5,), 1.0 + rank), torch.full((2,), 30.0).half()]
    return mean_over_processes(tensors, examples=3000 * (1 + rank))


def test_means_weigh_examples_and_keep_shape_and_dtype(run: RunInProcesses) -> None:
    for found in run(_means, ranks=3):
        weighted = (0 * 1 + 1 * 2 + 2 * 3) / 6
        assert [t.dtype for t in found] == [torch.float32, torch.float64, torch.float32, torch.float32, torch.half]
        assert torch.allclose(found[0], torch.full((3,), weighted))
        assert torch.allclose(found[1], torch.full((2, 2), 10 * weighted, dtype=torch.float64))
        assert found[2].shape == (0,)
        assert torch.allclose(found[3], torch.full((5,), 1 + weighted))
        assert torch.equal(found[4], torch.full((2,), 30.0).half())


def _sent(rank: int) -> list[int]:
    """How many numbers each step sends, besides what DistributedDataParallel does."""
    model = network()
    forward = DistributedDataParallel(model)
    criterion = nn.CrossEntropyLoss()
    options: dict[str, Any] = {"every": 2, "survey_every": 2, "fisher": "empirical", "criterion": criterion}
    optimizer = FlatKFAC(SGD(model.parameters(), lr=0.05), forward, mu=0.3, **options)
    sizes: list[int] = []
    whole = dist.all_reduce

    def counted(tensor: Tensor, **options: Any) -> Any:
        sizes.append(tensor.numel())
        return whole(tensor, **options)

    per_step = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_reduce", counted)
        for step in range(5):
            x, y = part(*batch(8, 2, 7, 7, seed=step), rank, (4, 4))
            optimizer.zero_grad()
            criterion(forward(x), y).backward()
            optimizer.step()
            per_step.append(sum(sizes))
            sizes.clear()
    return per_step


def test_two_vectors_and_two_numbers_for_each_layer_are_sent_and_the_gradient_at_refreshes_alone(
    run: RunInProcesses,
) -> None:
    model = network()
    blocks = [(9 * 2, 4, 1), (9 * 2, 2, 2), (16, 6, 1), (6, 3, 1)]  # inputs and outputs of a factor, groups
    gradient = sum(p.numel() for p in model.parameters())
    vectors = [groups * (d_in + d_out) for d_in, d_out, groups in blocks]
    values = [2 * groups for *_, groups in blocks]
    survey = sum(vectors) + sum(values) + gradient + 3  # each message says how many examples it stems from
    beginning = 20 * (sum(vectors) + 1) + sum(values) + 1  # power steps from random vectors
    one_layer = {vector + value + gradient + 3 for vector, value in zip(vectors, values, strict=True)}
    for first, second, third, fourth, fifth in run(_sent):
        assert second == fourth == 0
        assert first == beginning + survey
        assert third in one_layer
        assert fifth == survey
