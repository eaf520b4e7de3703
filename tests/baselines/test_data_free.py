"""Data-free pruning against the paper's algorithm spelled out, and against the bound that it proves."""

from __future__ import annotations

import copy
import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD

from baselines import DataFreePruner
from baselines.data_free import cut_off, merges
from kfac_flat import CutError, NeuronPruner, shrink
from tests.optimizer.loops import same, snapshot


def net(*widths: int, seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        modules: list[nn.Module] = []
        for inputs, outputs in itertools.pairwise(widths):
            modules += [nn.Linear(inputs, outputs), nn.ReLU()]
        return nn.Sequential(*modules[:-1]).double()


def pruner_of(model: nn.Module, x: Any, **options: Any) -> DataFreePruner:
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    return DataFreePruner(model, optimizer, x, **{"target": 0.5, "start": 1, "every": 1, "events": 1, **options})


def spelled_out(incoming: Tensor, outgoing: Tensor) -> list[tuple[int, int, float]]:
    """All pairs anew each time, number by number."""
    w, c = incoming.tolist(), outgoing.tolist()
    alive, found = list(range(len(w))), []
    while len(alive) > 1:
        best = (math.inf, -1, -1)
        for j in alive:
            for i in alive:
                if i != j:
                    distance = sum((a - b) ** 2 for a, b in zip(w[i], w[j], strict=True))
                    best = min(best, (sum(a * a for a in c[j]) / len(c[j]) * distance, j, i))
        saliency, j, i = best
        found.append((j, i, saliency))
        c[i] = [a + b for a, b in zip(c[i], c[j], strict=True)]
        alive.remove(j)
    return found


# -------------------------------------------------------------------------------------------------- the algorithm


@settings(max_examples=60)
@given(n=st.integers(2, 12), d=st.integers(1, 4), m=st.integers(1, 4), seed=st.integers(0, 10**6))
def test_merges_are_those_of_the_algorithm_spelled_out(n: int, d: int, m: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    incoming = torch.randn(n, d, generator=generator, dtype=torch.float64)
    outgoing = torch.randn(n, m, generator=generator, dtype=torch.float64)
    expected = spelled_out(incoming, outgoing)
    found = merges(incoming, outgoing)
    assert [(merge.removed, merge.into) for merge in found] == [(j, i) for j, i, _ in expected]
    assert [merge.saliency for merge in found] == pytest.approx([s for _, _, s in expected], rel=1e-9)


@settings(max_examples=40)
@given(n=st.integers(3, 10), seed=st.integers(0, 10**6))
def test_the_order_of_the_neurons_does_not_matter(n: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    incoming, outgoing = (torch.randn(n, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    order = torch.randperm(n, generator=generator)
    found = [(m.removed, m.into) for m in merges(incoming, outgoing)]
    assert [(int(order[m.removed]), int(order[m.into])) for m in merges(incoming[order], outgoing[order])] == found


@settings(max_examples=12)
@given(seed=st.integers(0, 10**6), gone=st.integers(1, 7), widths=st.sampled_from([(4, 8, 3), (4, 8, 1), (2, 8, 8, 2)]))
def test_the_papers_bound_on_the_change_of_the_next_layer_holds(seed: int, gone: int, widths: tuple[int, ...]) -> None:
    """Mean square over its neurons: at most the saliency times ||(x, 1)||^2; of several merges the roots add up."""
    model = net(*widths, seed=seed)
    x = torch.randn(20, widths[0], generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    first, second = model[0], model[2]
    before = second(F.relu(first(x))).detach()
    sequence = merges(torch.cat([first.weight, first.bias[:, None]], 1).detach(), second.weight.detach().T)
    target = gone / (8 if len(widths) == 3 else 16)
    others = ["2"] if len(widths) == 4 else []
    assert pruner_of(model, x[:1], target=target, ignore=others).step().widths_after["0"] == 8 - gone
    change = (second(F.relu(first(x))) - before).square().mean(1).sqrt()
    bound = sum(math.sqrt(merge.saliency) for merge in sequence[:gone])
    length = (x.square().sum(1) + 1).sqrt()
    assert (change <= bound * length + 1e-9).all()


def test_merged_weights_are_the_sums_of_those_that_went_together() -> None:
    model = net(3, 6, 4)
    dense = copy.deepcopy(model)
    expected = dense[2].weight.detach().clone()
    sequence = spelled_out(torch.cat([dense[0].weight, dense[0].bias[:, None]], 1).detach(), expected.T)
    for j, i, _ in sequence[:4]:
        expected[:, i] += expected[:, j]
    stays = sorted({*range(6)} - {j for j, _, _ in sequence[:4]})
    report = pruner_of(model, torch.zeros(1, 3).double(), target=4 / 6).step()
    assert report.removed["0"].tolist() == sorted(j for j, _, _ in sequence[:4])
    assert torch.allclose(model[2].weight, expected[:, stays], rtol=1e-12)
    assert torch.equal(model[0].weight, dense[0].weight[stays])
    assert torch.equal(model[2].bias, dense[2].bias)


@settings(max_examples=8)
@given(seed=st.integers(0, 10**6), copies=st.integers(1, 5), activation=st.sampled_from([nn.ReLU, nn.Tanh, nn.GELU]))
def test_merging_exact_duplicates_changes_nothing(seed: int, copies: int, activation: type[nn.Module]) -> None:
    model = net(4, 8, 7, 3, seed=seed)
    model[1] = activation()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer, n in ((model[0], 8), (model[2], 7)):
            for j in range(n - copies, n):
                i = int(torch.randint(n - copies, (), generator=generator))
                layer.weight[j], layer.bias[j] = layer.weight[i], layer.bias[i]
    x = torch.randn(10, 4, generator=generator, dtype=torch.float64)
    before = model(x).detach()
    assert pruner_of(model, x[:1], target=2 * copies / 15).step().widths_after == {
        "0": 8 - copies,
        "2": 7 - copies,
        "4": 3,
    }
    assert torch.allclose(model(x), before, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("options", [{"per": "parameter"}, {"normalize": "mean"}, {"normalize": "l2", "per": "mac"}])
def test_the_order_of_the_merges_survives_what_scores_are_divided_by(options: dict[str, str]) -> None:
    """Many saliencies are exactly nought."""
    model, x = net(4, 30, 3), torch.randn(5, 4).double()
    with torch.no_grad():
        model[0].weight.copy_(model[0].weight[torch.arange(30) % 7])
        model[0].bias.copy_(model[0].bias[torch.arange(30) % 7])
    before = model(x).detach()
    assert pruner_of(model, x[:1], target=23 / 30, **options).step().widths_after["0"] == 7
    assert torch.allclose(model(x), before, rtol=1e-10)


def test_layers_of_one_event_are_merged_each_on_what_the_other_lost() -> None:
    """Rows and columns of the layer between are cut and added to in one go."""
    model, x = net(3, 6, 6, 2), torch.randn(1, 3).double()
    dense = copy.deepcopy(model)
    report = pruner_of(model, x, target=0.5, ranking="layer").step()
    assert report.widths_after == {"0": 3, "2": 3, "4": 2}
    incoming = [torch.cat([dense[i].weight, dense[i].bias[:, None]], 1).detach() for i in (0, 2)]
    rows = [i for i in range(6) if i not in report.removed["2"].tolist()]
    for layer, reader, w in ((0, 2, incoming[0]), (2, 4, incoming[1])):
        expected = dense[reader].weight.detach().clone()
        for j, i, _ in spelled_out(w, expected.T)[:3]:
            expected[:, i] += expected[:, j]
        stays = [i for i in range(6) if i not in report.removed[str(layer)].tolist()]
        expected = expected[:, stays]
        assert torch.allclose(model[reader].weight, expected[rows] if reader == 2 else expected)


# -------------------------------------------------------------------------------------------------- directions alone


def directions(model: nn.Sequential) -> tuple[Tensor, Tensor, Tensor]:
    """Lengths of a first layer's neurons, the neurons of length one, and what reads them, so that nothing changes."""
    w = torch.cat([model[0].weight, model[0].bias[:, None]], 1).detach()
    lengths = torch.tensor([math.sqrt(sum(a * a for a in row)) for row in w.tolist()], dtype=torch.float64)
    return lengths, w / lengths[:, None], model[2].weight.detach().T * lengths[:, None]


@settings(max_examples=12)
@given(seed=st.integers(0, 10**6), gone=st.integers(1, 7), activation=st.sampled_from([nn.ReLU, nn.LeakyReLU]))
def test_homogeneous_merging_is_plain_merging_in_the_network_whose_neurons_have_length_one(
    seed: int, gone: int, activation: type[nn.Module]
) -> None:
    model = net(4, 8, 3, seed=seed)
    model[1] = activation()
    x = torch.randn(20, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    _, incoming, outgoing = directions(model)
    scaled = copy.deepcopy(model)
    with torch.no_grad():
        scaled[0].weight.copy_(incoming[:, :-1])
        scaled[0].bias.copy_(incoming[:, -1])
        scaled[2].weight.copy_(outgoing.T)
    assert torch.allclose(scaled(x), model(x))
    expected = pruner_of(scaled, x[:1], target=gone / 8).step()
    report = pruner_of(model, x[:1], target=gone / 8, homogeneous=True).step()
    assert report.removed["0"].tolist() == expected.removed["0"].tolist()
    assert torch.allclose(model(x), scaled(x), rtol=1e-9, atol=1e-12)


@settings(max_examples=8)
@given(seed=st.integers(0, 10**6), copies=st.integers(1, 5))
def test_neurons_that_are_multiples_of_others_go_and_nothing_changes(seed: int, copies: int) -> None:
    model, generator = net(4, 8, 7, 3, seed=seed), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer, n in ((model[0], 8), (model[2], 7)):
            for j in range(n - copies, n):
                i = int(torch.randint(n - copies, (), generator=generator))
                factor = 0.1 + 3 * float(torch.rand((), generator=generator))
                layer.weight[j], layer.bias[j] = factor * layer.weight[i], factor * layer.bias[i]
    x = torch.randn(10, 4, generator=generator, dtype=torch.float64)
    before, average = model(x).detach(), torch.optim.swa_utils.AveragedModel(model)
    report = pruner_of(model, x[:1], target=2 * copies / 15, homogeneous=True, copies=[average]).step()
    assert report.widths_after == {"0": 8 - copies, "2": 7 - copies, "4": 3}
    assert torch.allclose(model(x), before, rtol=1e-10, atol=1e-12)
    assert torch.allclose(average(x), before, rtol=1e-10, atol=1e-12)


def test_neurons_without_weights_have_no_direction_and_go_first() -> None:
    model, x = net(4, 8, 3), torch.randn(10, 4).double()
    with torch.no_grad():
        model[0].weight[2:4], model[0].bias[2:4] = 0.0, 0.0
    before = model(x).detach()
    report = pruner_of(model, x[:1], target=1 / 8, homogeneous=True).step()
    assert report.removed["0"].tolist() in ([2], [3])
    assert torch.allclose(model(x), before, rtol=1e-10)


@pytest.mark.parametrize("activation", [nn.Tanh, nn.GELU, nn.ReLU6])
def test_directions_alone_are_refused_where_the_length_matters(activation: type[nn.Module]) -> None:
    model = net(4, 8, 3)
    model[1] = activation()
    with pytest.raises(ValueError, match="leave homogeneous=False"):
        pruner_of(model, 10 * torch.ones(1, 4).double(), homogeneous=True)


# -------------------------------------------------------------------------------------------------- which layers


class Branches(nn.Module):
    """Two layers read one; one neuron of another is tied to a second; a norm has numbers for those of a third."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(3, 6), nn.Linear(6, 4), nn.Linear(6, 4)
        self.d, self.norm, self.e = nn.Linear(8, 5), nn.BatchNorm1d(5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.a(x))
        h = torch.cat([F.relu(self.b(h)), F.relu(self.b(h) + self.c(h))], 1)
        return self.e(F.relu(self.norm(self.d(h))))


def test_only_neurons_that_nothing_but_linear_layers_read_are_merged() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Branches().double().eval()
    dense = copy.deepcopy(model)
    pruner = pruner_of(model, torch.randn(2, 3).double(), target=0.5, max_share=1.0)
    report = pruner.step()
    assert report.widths_after == {"a": 1, "b": 4, "c": 4, "d": 5, "e": 2}
    assert "cannot be merged" in report.reason
    for reader in ("b", "c"):
        assert torch.allclose(model.get_submodule(reader).weight[:, 0], dense.get_submodule(reader).weight.sum(1))


class Unread(nn.Module):
    """A layer that is called, and nobody reads what it says."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.unread = net(4, 6, 2), nn.Linear(4, 3).double()

    def forward(self, x: Tensor) -> Tensor:
        self.unread(x)
        return self.net(x)


def test_neurons_that_nobody_reads_go_into_no_others() -> None:
    report = pruner_of(Unread(), torch.randn(1, 4).double(), target=0.5).step()
    assert report.widths_after["unread"] == 3
    assert report.widths_after["net.0"] < 6


def test_convolutions_stay() -> None:
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.Flatten(), nn.Linear(12, 6), nn.ReLU(), nn.Linear(6, 2)).double()
    report = pruner_of(model, torch.randn(1, 1, 4, 4).double(), target=0.7).step()
    assert report.widths_after == {"0": 3, "2": 1, "4": 2}


# -------------------------------------------------------------------------------------------------- the cut-off


def test_the_cut_off_is_where_most_saliencies_are() -> None:
    generator = torch.Generator().manual_seed(0)
    bulk = 5 + torch.randn(4000, generator=generator, dtype=torch.float64)
    tail = 10 + 1e4 * torch.rand(400, generator=generator, dtype=torch.float64)
    assert cut_off(torch.cat([bulk, tail])) == pytest.approx(5, abs=0.7)
    assert cut_off(torch.full((5,), 2.0)) == 2.0


def test_with_the_cut_off_neurons_above_it_stay() -> None:
    model = net(6, 40, 3)
    w = torch.cat([model[0].weight, model[0].bias[:, None]], 1).detach()
    saliencies = [s for _, _, s in spelled_out(w, model[2].weight.detach().T)]
    highest = cut_off(torch.tensor(saliencies))
    count = next(i for i, s in enumerate(saliencies) if s > highest)
    report = pruner_of(model, torch.zeros(1, 6).double(), target=0.9, cut_off=True).step()
    assert 0 < count < 30
    assert report.widths_after["0"] == 40 - count
    assert "cut-off" in report.reason


# -------------------------------------------------------------------------------------------------- as NeuronPruner


def test_it_goes_on_training_with_its_momentum_and_averaged_copies_are_merged_too() -> None:
    model, x = net(4, 8, 3), torch.randn(16, 4).double()
    average = torch.optim.swa_utils.AveragedModel(model)
    with torch.no_grad():
        average.module[2].weight.mul_(2)
    dense = copy.deepcopy(average.module)
    pruner = pruner_of(model, x[:1], copies=[average])
    pruner._optimizer.zero_grad()
    model(x).sum().backward()
    pruner._optimizer.step()
    heirs = {m.removed: m.into for m in merges(*pruner._weights("0", ["2"]))[:4]}
    pruner.step()
    expected = dense[2].weight.detach().clone()
    for j, i in heirs.items():
        expected[:, i] += expected[:, j]
    assert torch.allclose(average.module[2].weight, expected[:, [i for i in range(8) if i not in heirs]])
    model(x).sum().backward()
    pruner._optimizer.step()


def test_its_manifest_leads_a_fresh_model_to_the_same_outputs() -> None:
    model, x = net(4, 8, 8, 3), torch.randn(5, 4).double()
    pruner = pruner_of(model, x[:1], events=2)
    pruner.step()
    pruner.step()
    small = shrink(net(4, 8, 8, 3, seed=9), pruner.state_dict())
    small.load_state_dict(model.state_dict())
    assert torch.equal(small(x), model(x))
    resumed = net(4, 8, 8, 3, seed=9)
    other = pruner_of(resumed, x[:1], events=2)
    other.load_state_dict(pruner.state_dict())
    resumed.load_state_dict(model.state_dict())
    assert torch.equal(resumed(x), model(x))
    assert other.widths == pruner.widths


def test_a_cut_that_fails_leaves_all_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = net(4, 8, 8, 3), torch.randn(5, 4).double()
    pruner = pruner_of(model, x[:1])
    before = snapshot(model, pruner._optimizer)
    last = pruner._take_over

    def failing(name: str, *rest: Any) -> Any:
        from kfac_flat.changes import Change

        return [*last(name, *rest), Change(lambda: 1 / 0, lambda: None)]

    monkeypatch.setattr(pruner, "_take_over", failing)
    with pytest.raises(ZeroDivisionError):
        pruner.step()
    assert same(snapshot(model, pruner._optimizer), before)
    monkeypatch.undo()
    assert pruner.step()


def test_a_merge_cannot_be_undone() -> None:
    model, x = net(4, 8, 3), torch.zeros(1, 4).double()
    with pytest.raises(ValueError, match="cannot be put back"):
        pruner_of(model, x, keep_removed=True)
    with pytest.raises(CutError, match="not been kept"):
        pruner_of(model, x).undo()
    assert isinstance(pruner_of(model, x), NeuronPruner)
