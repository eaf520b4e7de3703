"""A training goes on from a checkpoint bit for bit, in another process as well."""

from __future__ import annotations

import copy
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.optim import SGD

from kfac_flat import FlatKFAC
from tests.optimizer.loops import MakeBase, gradients, same, snapshot, train
from tests.optimizer.resumable import BASES, SHAPE, fresh, network
from tests.reference import mlp, seeded

ROOT = Path(__file__).parents[2]


def through_disk(path: Path, state: Any) -> Any:
    torch.save(state, path)
    return torch.load(path, weights_only=True)


# -------------------------------------------------------------------------------------------------- resuming


@pytest.mark.parametrize("fisher", ["sampled", "empirical"])
@pytest.mark.parametrize("eigenpairs", ["streaming", "exact"])
@pytest.mark.parametrize(("n", "m"), [(4, 5), (3, 3)])  # between two refreshes, and right before one
@pytest.mark.parametrize("base", BASES)
def test_resuming_from_a_checkpoint_is_bit_exact(
    tmp_path: Path, base: str, n: int, m: int, eigenpairs: str, fisher: str
) -> None:
    def options() -> dict[str, Any]:
        criterion = nn.CrossEntropyLoss() if fisher == "empirical" else None
        return {"eigenpairs": eigenpairs, "fisher": fisher, "criterion": criterion}

    model, optimizer = fresh(base, **options())
    train(model, optimizer, n, shape=SHAPE)
    saved = through_disk(tmp_path / "checkpoint.pt", {"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    train(model, optimizer, m, start=n, shape=SHAPE)

    resumed, other = fresh(base, **options())
    resumed.load_state_dict(saved["model"])
    other.load_state_dict(saved["optimizer"])
    train(resumed, other, m, start=n, shape=SHAPE)
    assert same(snapshot(resumed, other), snapshot(model, optimizer))
    assert other.rho == optimizer.rho
    assert other.radii() == optimizer.radii()


@pytest.mark.parametrize(("n", "m"), [(4, 5), (3, 3)])
def test_a_process_that_is_killed_is_taken_up_by_another_bit_for_bit(tmp_path: Path, n: int, m: int) -> None:
    """n + m steps in this process, and n in one and m in another, each of which is killed after it has saved."""
    model, optimizer = fresh("sgd")
    train(model, optimizer, n + m, shape=SHAPE)
    path = tmp_path / "checkpoint.pt"
    for start, steps in ((0, n), (n, m)):
        command = [sys.executable, "-m", "tests.optimizer.resumable", str(path), "sgd", f"--start={start}"]
        with subprocess.Popen([*command, f"--steps={steps}"], cwd=ROOT) as process:
            assert process.wait() == -signal.SIGKILL
    saved = torch.load(path, weights_only=True)
    assert same(saved["model"], model.state_dict())
    assert same(saved["optimizer"], optimizer.state_dict())
    momenta = [state["momentum_buffer"] for state in saved["optimizer"]["state"].values()]
    assert len(momenta) == len(list(model.parameters()))
    assert all(momentum.any() for momentum in momenta)


class Offset(nn.Module):
    """One of its layers is called without an axis of examples, which is found out by reading it."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.shift = mlp(), nn.Linear(3, 3)
        self.input = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) + self.shift(self.input)


def test_layers_that_are_found_unreadable_once_more_do_not_change_the_labels() -> None:
    def made() -> tuple[nn.Module, FlatKFAC]:
        model = seeded(Offset)
        return model, FlatKFAC(SGD(model.parameters(), lr=0.05), model, mu=0.3, every=2, survey_every=1)

    (model, optimizer), (resumed, other) = made(), made()
    train(model, optimizer, 4)
    resumed.load_state_dict(copy.deepcopy(model.state_dict()))
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(model, optimizer, 3, start=4)
    train(resumed, other, 3, start=4)
    assert other.skipped_layers == optimizer.skipped_layers == {"shift": "called without an axis of examples"}
    assert same(snapshot(resumed, other), snapshot(model, optimizer))


def test_forgetting_the_curvature_at_resume_would_be_noticed(tmp_path: Path) -> None:
    """The comparison above tells a full checkpoint from the base optimizer's alone."""
    model, optimizer = fresh()
    train(model, optimizer, 4, shape=SHAPE)
    saved = through_disk(tmp_path / "checkpoint.pt", {"model": model.state_dict(), "base": optimizer.base.state_dict()})
    train(model, optimizer, 2, start=4, shape=SHAPE)
    resumed, other = fresh()
    resumed.load_state_dict(saved["model"])
    other.base.load_state_dict(saved["base"])
    train(resumed, other, 2, start=4, shape=SHAPE)
    assert not same(resumed.state_dict(), model.state_dict())


def test_what_has_been_read_is_there_right_after_loading(tmp_path: Path) -> None:
    model, optimizer = fresh(reduction="sum")
    train(model, optimizer, 5, shape=SHAPE)
    resumed, other = fresh(reduction="sum")
    other.load_state_dict(through_disk(tmp_path / "optimizer.pt", optimizer.state_dict()))
    assert other.rho == optimizer.rho > 0
    assert other.radii() == optimizer.radii()
    terms = {model_name(model, w): t for w, t in optimizer.input_mask_gradients().items()}
    assert same({model_name(resumed, w): t for w, t in other.input_mask_gradients().items()}, terms)
    assert terms


def model_name(model: nn.Module, parameter: nn.Parameter) -> str:
    return next(name for name, p in model.named_parameters() if p is parameter)


def test_skipped_steps_are_counted_across_a_checkpoint() -> None:
    model, optimizer = fresh(every=1)
    train(model, optimizer, 1, shape=SHAPE)
    x = torch.full(SHAPE, float("nan"))
    model(x).sum().backward()
    with pytest.warns(UserWarning, match="left the penalty out"):
        optimizer.step()
    _, other = fresh(every=1)
    other.load_state_dict(optimizer.state_dict())
    assert other.skipped == optimizer.skipped == 1


def test_a_penalty_that_a_checkpoint_finds_put_off_comes_with_the_first_step_that_can() -> None:
    model, optimizer = fresh(every=4, mu=lambda step: 0.3 * (step > 1))
    train(model, optimizer, 1, shape=SHAPE)
    resumed, other = fresh(every=4, mu=lambda step: 0.3 * (step > 1))
    resumed.load_state_dict(model.state_dict())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(model, optimizer, 2, start=1, shape=SHAPE)
    train(resumed, other, 2, start=1, shape=SHAPE)
    assert other.rho == optimizer.rho > 0
    assert same(snapshot(resumed, other), snapshot(model, optimizer))


def test_a_loaded_curvature_shares_no_memory_with_the_checkpoint() -> None:
    model, optimizer = fresh()
    train(model, optimizer, 4, shape=SHAPE)
    saved = copy.deepcopy(optimizer.state_dict())
    kept = copy.deepcopy(saved)
    resumed, other = fresh()
    resumed.load_state_dict(model.state_dict())
    other.load_state_dict(saved)
    train(resumed, other, 5, start=4, shape=SHAPE)
    assert same(saved["kfac_flat"], kept["kfac_flat"])  # the rest is the base optimizer's affair
    assert not same(other.state_dict()["kfac_flat"], kept["kfac_flat"])


def test_a_batch_seen_before_loading_is_not_that_of_the_step_after_it() -> None:
    model, optimizer = fresh()
    saved = copy.deepcopy(optimizer.state_dict())
    model(torch.ones(SHAPE)).sum().backward()
    optimizer.load_state_dict(saved)
    with pytest.raises(RuntimeError, match="no forward pass"):
        optimizer.step()


# -------------------------------------------------------------------------------------------------- the bare base


@pytest.mark.parametrize("base", BASES)
def test_a_checkpoint_of_the_bare_base_loads(base: str, tmp_path: Path) -> None:
    model = network()
    bare = BASES[base](model)
    train(model, bare, 3, shape=SHAPE)
    _, optimizer = fresh(base)
    optimizer.load_state_dict(through_disk(tmp_path / "base.pt", bare.state_dict()))
    assert same(optimizer.base.state_dict(), bare.state_dict())
    assert optimizer.rho != optimizer.rho  # NaN: nothing has been read yet


@pytest.mark.parametrize("base", BASES)
def test_a_checkpoint_loads_into_the_bare_base(base: str, tmp_path: Path) -> None:
    model, optimizer = fresh(base)
    train(model, optimizer, 3, shape=SHAPE)
    saved = through_disk(tmp_path / "optimizer.pt", optimizer.state_dict())
    resumed = network()
    bare = BASES[base](resumed)
    bare.load_state_dict(saved)
    assert same(bare.state_dict(), optimizer.base.state_dict())
    resumed.load_state_dict(model.state_dict())
    train(resumed, bare, 1, start=3, shape=SHAPE)


def test_after_a_bare_checkpoint_the_curvature_starts_afresh() -> None:
    """An optimizer that has already run and one that has not go on alike."""
    model, optimizer = fresh()
    train(model, optimizer, 3, shape=SHAPE)
    weights, bare = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.base.state_dict())
    train(model, optimizer, 2, start=3, shape=SHAPE)
    other, unused = fresh()
    assert optimizer.input_mask_gradients()
    for m, o in ((model, optimizer), (other, unused)):
        m.load_state_dict(weights)
        o.load_state_dict(copy.deepcopy(bare))  # torch's optimizers go on in the very tensors they are given
        assert o.input_mask_gradients() == {}
        train(m, o, 4, start=20, shape=SHAPE)
    assert same(model.state_dict(), other.state_dict())


@pytest.mark.parametrize("base", BASES)
def test_distributed_checkpoints_load_into_an_optimizer_that_has_not_stepped(base: str) -> None:
    """For which torch steps once at a learning rate of zero, with no forward pass before."""
    model, optimizer = fresh(base)
    train(model, optimizer, 3, shape=SHAPE)
    weights, states = copy.deepcopy(get_state_dict(model, optimizer))
    resumed, other = fresh(base)
    set_state_dict(resumed, other, model_state_dict=weights, optim_state_dict=states)
    assert same(resumed.state_dict(), model.state_dict())
    assert same(other.base.state_dict()["state"], optimizer.base.state_dict()["state"])
    reloaded, third = fresh(base)
    reloaded.load_state_dict(model.state_dict())
    third.load_state_dict(copy.deepcopy(optimizer.base.state_dict()))
    for m, o in ((resumed, other), (reloaded, third)):
        train(m, o, 4, start=3, shape=SHAPE)
    assert same(resumed.state_dict(), reloaded.state_dict())
    assert other.rho == third.rho > 0


def test_a_distributed_checkpoint_before_the_first_step_changes_nothing_of_what_follows() -> None:
    (model, optimizer), (other, theirs) = fresh(), fresh()
    get_state_dict(model, optimizer)
    train(model, optimizer, 1, shape=SHAPE)
    assert optimizer.rho > 0
    train(model, optimizer, 5, start=1, shape=SHAPE)
    train(other, theirs, 6, shape=SHAPE)
    assert same(snapshot(model, optimizer), snapshot(other, theirs))


@pytest.mark.parametrize(("lr", "gradient"), [(0.0, 1.0), (0.1, 0.0)])
def test_a_step_without_a_forward_is_refused_where_it_may_move_something(lr: float, gradient: float) -> None:
    model, optimizer = fresh()
    optimizer.param_groups[0]["lr"] = lr
    for p in model.parameters():
        p.grad = torch.full_like(p, gradient)
    with pytest.raises(RuntimeError, match="no forward pass"):
        optimizer.step()


# -------------------------------------------------------------------------------------------------- what does not fit


def other_widths() -> nn.Module:
    return seeded(lambda: nn.Sequential(nn.Linear(4, 7), nn.Tanh(), nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 3)))


def other_names() -> nn.Module:
    return nn.Sequential(nn.Identity(), *mlp())


def two_groups(model: nn.Module) -> SGD:
    return SGD([{"params": list(model[:2].parameters())}, {"params": list(model[2:].parameters())}], lr=0.1)


@pytest.mark.parametrize(
    ("make", "base", "message"),
    [
        (other_widths, lambda m: SGD(m.parameters(), lr=0.1), "dense model first"),
        (other_names, lambda m: SGD(m.parameters(), lr=0.1), "layer '1' that this optimizer does not"),
        (mlp, two_groups, "parameter group"),
    ],
    ids=["other widths", "other names", "other groups"],
)
def test_a_checkpoint_of_something_else_is_refused_and_nothing_has_changed(
    make: Any, base: MakeBase, message: str
) -> None:
    foreign = make().double()
    theirs = FlatKFAC(base(foreign), foreign, mu=0.3, every=2)
    train(foreign, theirs, 3)
    model = mlp()
    optimizer = FlatKFAC(SGD(model.parameters(), lr=0.1, momentum=0.9), model, mu=0.3, every=3)
    train(model, optimizer, 2)
    before = snapshot(model, optimizer)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(theirs.state_dict())
    assert same(snapshot(model, optimizer), before)
    unharmed = copy.deepcopy((model, optimizer))
    train(model, optimizer, 2, start=2)
    train(*unharmed, 2, start=2)
    assert same(gradients(model), gradients(unharmed[0]))


def test_a_checkpoint_whose_layer_is_something_without_channels_here_is_refused_and_nothing_has_changed() -> None:
    def on(first: nn.Module) -> tuple[nn.Module, FlatKFAC]:
        model = nn.Sequential(first, nn.Flatten(), nn.Linear(4, 3)).double()
        return model, FlatKFAC(SGD(model.parameters(), lr=0.1), model)

    foreign, theirs = on(nn.Conv1d(1, 1, 1))
    train(foreign, theirs, 1, shape=(8, 1, 4))
    model, optimizer = on(nn.LayerNorm(4))
    before = snapshot(model, optimizer)
    with pytest.raises(ValueError, match="penalty is that of other layers"):
        optimizer.load_state_dict(theirs.state_dict())
    assert same(snapshot(model, optimizer), before)
