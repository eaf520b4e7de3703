"""Taylor's criteria against loops over examples, and what their ranking must not depend on."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD

from baselines import GateTaylorPruner, TaylorPruner
from kfac_flat import NeuronPruner
from tests.baselines.nets import NETS, built


def pruner_of(model: nn.Module, x: Tensor, kind: Any = TaylorPruner, **options: Any) -> tuple[NeuronPruner, SGD]:
    optimizer = SGD(model.parameters(), lr=0.05)
    options = {"target": 0.1, "start": 1, "every": 1, "events": 1, **options}
    return kind(model, optimizer, x[:1], **options), optimizer


def one_step(model: nn.Module, optimizer: SGD, x: Tensor, y: Tensor, scale: float = 1.0) -> None:
    optimizer.zero_grad()
    (scale * F.cross_entropy(model(x), y)).backward()
    optimizer.step()


def gate_gradients(model: Any, x: Tensor, loss: Any) -> dict[str, Tensor]:
    """Gradient of ``loss(output)`` at a mask on each channel of each example, ``[N, C]`` by map."""
    masks = {name: torch.ones(len(x), c, dtype=x.dtype, requires_grad=True) for name, c in model.widths.items()}
    model = copy.deepcopy(model)  # BatchNorm's statistics move
    output = model.again(x, lambda name, z: z * masks[name].reshape(*masks[name].shape, *[1] * (z.dim() - 2)))
    return dict(zip(masks, torch.autograd.grad(loss(output), list(masks.values())), strict=True))


def by_loops(model: Any, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """Theta before normalisation, one example at a time: each goes through the network alone."""
    totals = {name: torch.zeros(c, dtype=x.dtype) for name, c in model.widths.items()}
    for n in range(len(x)):
        maps: list[tuple[str, Tensor]] = []

        def keep(name: str, z: Tensor, maps: list[tuple[str, Tensor]] = maps) -> Tensor:
            maps.append((name, z.clone()))
            return maps[-1][1]

        loss = F.cross_entropy(model.again(x[n : n + 1], keep), y[n : n + 1])
        gradients = torch.autograd.grad(loss, [z for _, z in maps])
        for name, width in model.widths.items():
            for c in range(width):
                effect = sum(
                    float((g[0, c] * z[0, c].detach()).sum())
                    for (where, z), g in zip(maps, gradients, strict=True)
                    if where == name
                )
                totals[name][c] += abs(effect) / model.entries[name]
    return {name: total / len(x) for name, total in totals.items()}


def normalised(theta: dict[str, Tensor]) -> Tensor:
    return torch.cat([scores / scores.norm() for scores in theta.values()])


def scores_of(pruner: NeuronPruner) -> Tensor:
    scores = pruner._scores()
    assert scores is not None
    return torch.tensor(scores, dtype=torch.float64)


def assert_close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", NETS)
def test_theta_is_the_mean_over_examples_of_the_maps_first_order_effect(name: str) -> None:
    model, x, y = built(name, training=False)
    expected = normalised(by_loops(model, x, y))
    pruner, optimizer = pruner_of(model, x)
    one_step(model, optimizer, x, y)
    assert_close(scores_of(pruner), expected)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", NETS)
def test_theta_is_the_mean_absolute_gradient_at_a_gate_for_each_example(name: str, training: bool) -> None:
    model, x, y = built(name, training=training)
    gradients = gate_gradients(model, x, lambda output: F.cross_entropy(output, y, reduction="sum"))
    expected = normalised({name: g.abs().mean(0) for name, g in gradients.items()})
    pruner, optimizer = pruner_of(model, x)
    one_step(model, optimizer, x, y)
    assert_close(scores_of(pruner), expected)
    batchwise = normalised({name: g.sum(0).abs() for name, g in gradients.items()})
    assert not torch.allclose(batchwise, expected, rtol=0.05), "absolute values have to be taken example by example"


@pytest.mark.parametrize("name", ["Mlp", "ConvNet"])
def test_before_normalisation_theta_is_the_formula_to_the_digit(name: str) -> None:
    model, x, y = built(name, training=False)
    expected = by_loops(model, x, y)
    if name == "ConvNet":  # read behind a pooling of 2 x 2: M is a quarter
        expected = {where: 4 * theta for where, theta in expected.items()}
    pruner, optimizer = pruner_of(model, x)
    one_step(model, optimizer, x, y)
    assert_close(torch.tensor(pruner._saliency.scores(), dtype=torch.float64), torch.cat([*expected.values()]))


def test_steps_and_accumulated_batches_count_by_their_examples() -> None:
    model, x, y = built("Mlp", count=8)
    pruner, optimizer = pruner_of(model, x)
    gradients = []
    for batches in ([slice(0, 8)], [slice(0, 3), slice(3, 8)]):
        optimizer.zero_grad()
        for part in batches:
            gradients.append(
                gate_gradients(model, x[part], lambda o, p=part: F.cross_entropy(o, y[p], reduction="sum"))
            )
        for output, part in [(model(x[part]), part) for part in batches]:  # all forward passes come first
            F.cross_entropy(output, y[part]).backward()
        optimizer.step()
    expected = {w: torch.cat([g[w].abs() for g in gradients]).mean(0) for w in model.widths}
    assert float(pruner._saliency.steps) == 16
    assert_close(scores_of(pruner), normalised(expected))


def test_passes_without_a_backward_and_without_gradients_do_not_count() -> None:
    model, x, y = built("Mlp")
    pruner, optimizer = pruner_of(model, x)
    model(x)
    with torch.no_grad():
        model(x)
    one_step(model, optimizer, x, y)
    model(2 * x)
    expected = scores_of(pruner)
    optimizer.step()
    assert torch.equal(scores_of(pruner), expected)
    assert float(pruner._saliency.steps) == len(x)


def test_passes_that_are_not_finite_are_left_out() -> None:
    model, x, y = built("Mlp")
    pruner, optimizer = pruner_of(model, x)
    one_step(model, optimizer, x, y)
    expected = scores_of(pruner)
    F.cross_entropy(model(x * float("inf")), y).backward()
    pruner._saliency.record({})
    assert torch.equal(scores_of(pruner), expected)


def test_gates_change_nothing_but_what_is_known() -> None:
    for name in NETS:
        watched, x, y = built(name)
        alone = copy.deepcopy(watched)
        _, optimizer = pruner = pruner_of(watched, x)
        other = SGD(alone.parameters(), lr=0.05)
        for _ in range(3):
            one_step(watched, optimizer, x, y)
            one_step(alone, other, x, y)
        del pruner
        for p, q in zip(watched.parameters(), alone.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)


def test_copies_of_the_model_are_not_watched_and_the_pruners_end_takes_the_gates_away() -> None:
    model, x, y = built("Mlp")
    pruner, optimizer = pruner_of(model, x)
    copied, read = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    for other in (copied, read):
        F.cross_entropy(other(x), y).backward()
    optimizer.step()
    assert pruner._scores() is None
    del pruner
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_a_copy_of_pruner_model_and_optimizer_goes_on_by_itself() -> None:
    model, x, y = built("Mlp")
    pruner, optimizer = pruner_of(model, x)
    model_2, optimizer_2, pruner_2 = copy.deepcopy((model, optimizer, pruner))
    one_step(model_2, optimizer_2, x, y)
    assert pruner._scores() is None
    one_step(model, optimizer, x, y)
    assert torch.equal(scores_of(pruner), scores_of(pruner_2))


def test_scores_start_anew_after_a_cut_and_fit_the_smaller_model() -> None:
    model, x, y = built("ConvNet")
    pruner, optimizer = pruner_of(model, x, neurons_per_event=1, target=0.5)
    for neurons in (8, 7, 6, 5):
        one_step(model, optimizer, x, y)
        expected = scores_of(pruner)
        report = pruner.step()
        assert report.after.neurons == neurons
        assert len(expected) == neurons + 1
        assert pruner._scores() is None
        ((where, gone),) = report.removed.items()
        before = pruner.survivors[where]
        position = int((before < gone[0]).sum()) + (0 if where == "a" else report.widths_before["a"])
        assert position == int(expected.argmin())


@pytest.mark.parametrize("weight", [1e-3, 10.0])
def test_the_flops_term_takes_off_what_a_neuron_costs(weight: float) -> None:
    model, x, y = built("ConvNet")
    plain, _ = pruner_of(model, x)
    costly, _ = pruner_of(model, x, flops_weight=weight)
    F.cross_entropy(model(x), y).backward()
    plain._saliency.record({})
    costly._saliency.record({})
    first = 9 * 2 * 64 + 9 * 5 * 16  # what a neuron of a takes: its own patch, and what the second layer reads of it
    second = 9 * 4 * 16 + 3 * 4
    millions = 2e-6 * torch.tensor([first] * 4 + [second] * 5, dtype=torch.float64)
    torch.testing.assert_close(scores_of(costly), scores_of(plain) - weight * millions, rtol=0, atol=1e-12)


@settings(max_examples=20)
@given(st.integers(0, 10_000), st.sampled_from(sorted(NETS)))
def test_the_ranking_does_not_depend_on_the_order_of_examples_nor_on_the_losss_scale(seed: int, name: str) -> None:
    found = []
    for order, scale in ((torch.arange(6), 1.0), (torch.randperm(6), 7.3)):
        model, x, y = built(name, seed)
        pruner, optimizer = pruner_of(model, x)
        one_step(model, optimizer, x[order], y[order], scale)
        found.append(scores_of(pruner))
    assert_close(found[1], found[0])


@settings(max_examples=20)
@given(st.integers(0, 10_000), st.permutations(range(7)), st.floats(0.1, 10))
def test_scores_go_along_when_neurons_change_places_or_scale(seed: int, order: list[int], scale: float) -> None:
    """A ReLU passes a factor on, so that one layer's gain may be the next one's loss."""
    found = []
    for places, factor in ((list(range(7)), 1.0), (order, scale)):
        model, x, y = built("Mlp", seed)
        with torch.no_grad():
            model.a.weight.copy_(factor * model.a.weight[places])
            model.a.bias.copy_(factor * model.a.bias[places])
            model.b.weight.copy_(model.b.weight[:, places] / factor)
        pruner, optimizer = pruner_of(model, x)
        one_step(model, optimizer, x, y)
        found.append(scores_of(pruner))
    assert_close(found[1][:7], found[0][:7][order])
    assert_close(found[1][7:], found[0][7:])


class Tokens(nn.Module):
    """Folds examples into another axis, so that nobody can tell them apart."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.relu(self.a(x)).flatten(0, 1))


def test_examples_that_cannot_be_told_apart_are_refused_with_advice() -> None:
    model = Tokens()
    pruner, _ = pruner_of(model, torch.randn(2, 3, 4))
    with pytest.raises(ValueError, match=r"b reads \[6, 6\], and the model was called with 2 examples.*ignore="):
        model(torch.randn(2, 3, 4))
    assert pruner._scores() is None


@pytest.mark.parametrize("normalize", [None, "mean"])
def test_another_norm_may_be_asked_for(normalize: Any) -> None:
    model, x, y = built("Mlp")
    pruner, optimizer = pruner_of(model, x, normalize=normalize)
    gradients = gate_gradients(model, x, lambda output: F.cross_entropy(output, y, reduction="sum"))
    one_step(model, optimizer, x, y)
    theta = [g.abs().mean(0) for g in gradients.values()]
    assert_close(scores_of(pruner), torch.cat([t if normalize is None else t / t.mean() for t in theta]))


def test_inputs_given_by_name_are_read_as_well() -> None:
    class Named(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return self[2](input=self[1](self[0](input=x)))

    torch.manual_seed(0)
    plain, x, y = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)), torch.randn(5, 4), torch.arange(5) % 3
    found = []
    for model in (plain, Named(*copy.deepcopy(plain))):
        pruner, optimizer = pruner_of(model, x)
        one_step(model, optimizer, x, y)
        found.append(scores_of(pruner))
    assert torch.equal(found[0], found[1])


def test_options_out_of_range_are_refused() -> None:
    model, x, _ = built("Mlp")
    with pytest.raises(ValueError, match="normalize='l3' must be one of None, 'mean', 'max', 'l2'"):
        pruner_of(model, x, normalize="l3")
    with pytest.raises(ValueError, match="flops_weight=-1 must be a number >= 0"):
        pruner_of(model, x, flops_weight=-1)


# ---------------------------------------------------------------- gates, 2019


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", NETS)
def test_gates_score_by_the_squared_gradient_of_the_batch_loss(name: str, training: bool) -> None:
    model, x, y = built(name, training=training)
    pruner, optimizer = pruner_of(model, x, GateTaylorPruner)
    expected = []
    for inputs in (x, x.flip(-1)):
        gradients = gate_gradients(model, inputs, lambda output: F.cross_entropy(output, y))
        expected.append(torch.cat([g.sum(0) ** 2 for g in gradients.values()]))
        one_step(model, optimizer, inputs, y)
    assert_close(scores_of(pruner) / expected[0].norm(), torch.stack(expected).mean(0) / expected[0].norm())


@settings(max_examples=20)
@given(st.integers(0, 10_000), st.permutations(range(7)), st.floats(0.1, 10))
def test_gate_scores_go_along_when_neurons_change_places_or_scale(seed: int, order: list[int], scale: float) -> None:
    found = []
    for places, factor in ((list(range(7)), 1.0), (order, scale)):
        model, x, y = built("Mlp", seed)
        with torch.no_grad():
            model.a.weight.copy_(factor * model.a.weight[places])
            model.a.bias.copy_(factor * model.a.bias[places])
            model.b.weight.copy_(model.b.weight[:, places] / factor)
        pruner, optimizer = pruner_of(model, x, GateTaylorPruner)
        one_step(model, optimizer, x, y)
        found.append(scores_of(pruner))
    assert_close(found[1], torch.cat([found[0][:7][order], found[0][7:]]))
