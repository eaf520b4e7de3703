"""When neurons go, how many, which, and what is said about it."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn, optim

from kfac_flat import NeuronPruner, PruneReport
from kfac_flat.pruning.groups import Groups
from tests.pruning.choosing import cheapest
from tests.pruning.masking import prune_at_random, pruner_for, random_gradients
from tests.pruning.nets import CASES, Net, conv


def mlp(*sizes: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for a, b in pairwise(sizes):
        layers += [nn.Linear(a, b), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def prune(model: nn.Module, inputs: Any, epochs: int, **options: Any) -> tuple[NeuronPruner, list[PruneReport]]:
    options = {"pace": "linear", **options}
    pruner = NeuronPruner(model, optim.SGD(model.parameters(), lr=0.0), inputs, **options)
    reports = []
    for epoch in range(epochs):
        random_gradients(model, pruner._optimizer, seed=epoch)
        reports.append(pruner.step())
    return pruner, reports


def set_theta(pruner: NeuronPruner, model: nn.Sequential, values: list[list[float]]) -> None:
    """Make Theta of the i-th hidden layer's neurons what is given, by one step on gradients made for it."""
    linears = [m for m in model if isinstance(m, nn.Linear)]
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    for reader, wanted in zip(linears[1:], values, strict=True):
        reader.weight.grad[0] = torch.tensor(wanted, dtype=reader.weight.dtype) / reader.weight.detach()[0]
    pruner._optimizer.step()


# ---------------------------------------------------------------- when


@pytest.mark.parametrize(
    ("start", "every", "events", "due"),
    [(1, 1, 4, [1, 2, 3, 4]), (3, 2, 3, [3, 5, 7]), (5, 3, 2, [5, 8]), (2, 1, 1, [2])],
)
def test_neurons_go_at_the_epochs_that_the_schedule_says_in_equal_steps(
    start: int, every: int, events: int, due: list[int]
) -> None:
    pruner, reports = prune(
        mlp(4, 24, 24, 3), torch.randn(2, 4), 10, target=0.5, start=start, every=every, events=events
    )
    assert [r.epoch for r in reports] == list(range(1, 11))
    assert [r.epoch for r in reports if r] == due
    assert [48 - r.after.neurons for r in reports if r] == [round(24 * (i + 1) / events) for i in range(events)]
    assert pruner.sparsity == 0.5
    assert pruner.finished
    assert pruner.history == reports


def test_the_sparsity_grows_step_by_step_and_finished_only_at_the_end() -> None:
    model = mlp(4, 20, 3)
    pruner = pruner_for(model, torch.randn(2, 4), target=0.6, events=3)
    assert pruner.sparsity == 0
    seen = []
    for event in range(3):
        assert not pruner.finished
        prune_at_random(pruner, model, seed=event)
        seen.append(round(pruner.sparsity, 10))
    assert seen == [0.2, 0.4, 0.6]
    assert pruner.finished


def test_reasons_say_why_nothing_went() -> None:
    model = mlp(4, 10, 3)
    pruner = pruner_for(model, torch.randn(2, 4), target=0.5)
    pruner._schedule = type(pruner._schedule)(2, 2, 1)
    assert pruner.step().reason == "the schedule has no removal at the end of epoch 1"
    report = pruner.step()
    assert report.reason.startswith("no optimizer step with finite gradients since the last removal")
    assert "nothing went: no optimizer step" in str(report)
    assert not report
    random_gradients(model, pruner._optimizer)
    assert not pruner.step()
    report = pruner.step()
    assert report
    assert report.reason == ""
    report = pruner.step()
    assert report.reason.startswith("finished")
    assert report.widths_before == report.widths_after == {"0": 5, "2": 3}
    assert report.before == report.after


def test_an_event_that_finds_no_scores_comes_back_at_the_next_due_epoch() -> None:
    model = mlp(4, 12, 3)
    pruner = pruner_for(model, torch.randn(2, 4), target=0.5, events=2)
    assert not pruner.step()
    assert not pruner.finished
    for event in range(2):
        prune_at_random(pruner, model, seed=event)
    assert pruner.widths["0"] == 6


def test_a_group_that_took_more_than_was_due_is_not_blamed_on_the_floors() -> None:
    model, inputs = CASES["in_place_sums"].build()  # one group is three neurons: 18 neurons, 3 due at each event
    pruner = pruner_for(model, inputs, target=0.5, events=9)
    prune_at_random(pruner, model)
    assert pruner.size.neurons == 15
    random_gradients(model, pruner._optimizer)
    report = pruner.step()
    assert not report
    assert "floor" not in report.reason
    assert report.reason


def test_neurons_whose_readers_have_no_gradient_stay_and_the_reason_says_so() -> None:
    model = mlp(4, 6, 6, 3)
    model[2].requires_grad_(False)
    pruner = pruner_for(model, torch.randn(2, 4), target=0.75)
    random_gradients(model, pruner._optimizer)
    report = pruner.step()
    assert report.widths_after == {"0": 6, "2": 1, "4": 3}
    assert "6 groups are read by layers whose weights had no gradient" in report.reason
    assert report.reason in str(report)


# ---------------------------------------------------------------- which


def test_the_smallest_theta_goes_first_over_all_layers() -> None:
    model = mlp(4, 4, 4, 3).double()
    pruner = pruner_for(model, torch.randn(2, 4), target=0.5)
    set_theta(pruner, model, [[0.5, -0.1, 3.0, -4.0], [0.2, 1.0, 0.3, -2.0]])
    report = pruner.step()
    assert {name: t.tolist() for name, t in report.removed.items()} == {"0": [0, 1], "2": [0, 2]}


def test_a_group_is_ranked_by_its_theta_per_neuron() -> None:
    groups = Groups.of({"a": torch.tensor([1, 2]), "b": torch.tensor([1, 2]), "c": torch.tensor([3, 4])})
    assert cheapest(groups, [1.0, 9.0, 0.6, 9.0], 1).tolist() == [1]
    assert cheapest(groups, [1.0, 9.0, 0.4, 9.0], 1).tolist() == [3]


def test_ties_are_broken_by_index() -> None:
    model = mlp(4, 4, 4, 3).double()
    pruner = pruner_for(model, torch.randn(2, 4), target=0.5, max_share=1.0)
    set_theta(pruner, model, [[0.0] * 4, [0.0] * 4])
    assert {name: t.tolist() for name, t in pruner.step().removed.items()} == {"0": [0, 1, 2], "2": [0]}


@pytest.mark.parametrize("floor", [1, 3, 7])
def test_every_layer_keeps_min_neurons(floor: int) -> None:
    model = mlp(4, 8, 12, 3).double()
    pruner = pruner_for(model, torch.randn(2, 4), target=(20 - 2 * floor) / 20, min_neurons=floor)
    set_theta(pruner, model, [[0.0] * 8, [1.0] * 12])
    report = pruner.step()
    assert report.widths_after == {"0": floor, "2": floor, "4": 3}
    assert report.reason == ""


@pytest.mark.parametrize(("widths", "after"), [((16, 24), (8, 8)), ((18, 21), (8, 8)), ((6, 24), (6, 8))])
def test_round_to_leaves_multiples_or_layers_as_they_are(widths: tuple[int, int], after: tuple[int, int]) -> None:
    model = mlp(4, *widths, 3)
    pruner = pruner_for(model, torch.randn(2, 4), target=1 - sum(after) / sum(widths), round_to=8)
    random_gradients(model, pruner._optimizer)
    report = pruner.step()
    assert (report.widths_after["0"], report.widths_after["2"]) == after


@pytest.mark.parametrize("seed", range(4))
def test_round_to_holds_after_every_event_for_layers_tied_by_residuals_and_groups(seed: int) -> None:
    def forward(net: Any, x: Tensor) -> Tensor:
        x = net.stem(x)
        x = x + net.b(torch.relu(net.a(x)))
        return net.fc(torch.relu(net.grouped(x)).mean((2, 3)))

    convs = {"stem": conv(2, 18), "a": conv(18, 11), "b": conv(11, 18), "grouped": conv(18, 20, groups=2)}
    model = Net(forward, **convs, fc=nn.Linear(20, 3))
    original = {"stem": 18, "a": 11, "b": 18, "grouped": 20, "fc": 3}
    pruner = pruner_for(model, torch.randn(2, 2, 4, 4), target=0.6, events=3, round_to=4)
    for event in range(3):
        random_gradients(model, pruner._optimizer, seed=10 * seed + event)
        pruner.step()
        assert all(w == original[n] or w % 4 == 0 for n, w in pruner.widths.items())
        assert pruner.widths["stem"] == pruner.widths["b"]
        assert model(torch.randn(2, 2, 4, 4)).shape == (2, 3)
    assert pruner.sparsity >= 0.4


@pytest.mark.parametrize(
    ("ignore", "whole"),
    [
        (["3.conv1"], {"3.conv1"}),
        (["*.conv1"], {"3.conv1", "4.conv1"}),
        (["3"], {"0", "3.conv1", "3.conv2"}),
        ([nn.BatchNorm2d], None),
        (["4.bn1"], {"4.conv1"}),
    ],
)
def test_ignored_layers_keep_all_their_neurons(ignore: list[Any], whole: set[str] | None) -> None:
    model, inputs = CASES["residual"].build()
    if whole is None:
        with pytest.raises(ValueError, match="ignored on request"):
            pruner_for(model, inputs, ignore=ignore)
        return
    pruner = pruner_for(model, inputs, ignore=ignore)
    original = pruner.widths
    prune_at_random(pruner, model)
    assert {name for name, width in pruner.widths.items() if width == original[name]} - {"7"} == whole
    assert whole <= pruner.frozen.keys()
    assert "ignored on request" in pruner.frozen.values()


# ---------------------------------------------------------------- what is said


def test_plan_changes_nothing_and_is_what_step_then_does() -> None:
    model, inputs = CASES["residual"].build()
    pruner = pruner_for(model, inputs, events=2)
    random_gradients(model, pruner._optimizer)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    plan = pruner.plan()
    assert plan
    assert pruner.history == []
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert pruner.widths == plan.widths_before
    report = pruner.step()
    for field in ("widths_before", "widths_after", "before", "after", "sparsity", "reason"):
        assert getattr(plan, field) == getattr(report, field)
    assert {n: t.tolist() for n, t in plan.removed.items()} == {n: t.tolist() for n, t in report.removed.items()}
    assert pruner.widths == plan.widths_after
    assert not pruner.plan()


def test_sizes_in_reports_are_counted_right() -> None:
    def forward(net: Any, x: Tensor) -> Tensor:
        x = net.depthwise(torch.relu(net.bn(net.conv(x))))
        return net.fc(torch.relu(net.grouped(x)).flatten(1))

    grouped = conv(8, 6, 1, groups=2, bias=False)
    first = {"conv": conv(2, 8, stride=2), "bn": nn.BatchNorm2d(8), "depthwise": conv(8, 8, groups=8)}
    model = Net(forward, **first, grouped=grouped, fc=nn.Linear(54, 3))
    x = torch.randn(5, 2, 6, 6)
    pruner = pruner_for(model, x, target=0.4)
    random_gradients(model, pruner._optimizer)
    report = pruner.step()
    for size, widths in ((report.before, report.widths_before), (report.after, report.widths_after)):
        c, d, g = widths["conv"], widths["depthwise"], widths["grouped"]
        assert c == d
        assert size.neurons == c + d + g
        assert size.macs == 9 * (c * 2 * 9 + d * 9 + g * (d // 2) + 3 * g)
        assert size.parameters == (c * 18 + c) + 2 * c + (d * 9 + d) + g * (d // 2) + (27 * g + 3)
    assert report.after.parameters == sum(p.numel() for p in model.parameters()) < report.before.parameters
    assert report.widths_after["conv"] == len(model.conv.weight)
    assert report.sparsity == pruner.sparsity == 1 - report.after.neurons / report.before.neurons
    text = str(report)
    assert f"{report.sparsity:.1%} of the neurons removed" in text
    assert f"{report.before.macs:,} -> {report.after.macs:,} macs" in text
    assert f"conv 8 -> {len(model.conv.weight)}" in text


def test_removed_channels_are_positions_in_the_original_layer_over_several_events() -> None:
    model = mlp(4, 12, 10, 3).double()
    tags = {"0": torch.arange(12.0), "2": torch.arange(10.0)}
    for name, tag in tags.items():
        model.get_submodule(name).bias.data = tag.double()  # the bias says which neuron this was
    pruner = pruner_for(model, torch.randn(2, 4).double(), target=0.75, events=4)
    gone: dict[str, list[int]] = {"0": [], "2": []}
    for event in range(4):
        prune_at_random(pruner, model, seed=event)
        for name, channels in pruner.history[-1].removed.items():
            assert channels.tolist() == sorted(channels.tolist())
            gone[name] += channels.tolist()
        for name, tag in tags.items():
            left = model.get_submodule(name).bias.detach().long().tolist()
            assert sorted(left + gone[name]) == tag.long().tolist()
            assert pruner.state_dict()["layers"][name]["out"].tolist() == left
    assert sum(map(len, gone.values())) == 16


# ---------------------------------------------------------------- the choice itself


@st.composite
def networks(draw: Any) -> tuple[Groups, list[float]]:
    """Layers alone or tied to one or two others; each neuron counts once or twice in its layer; some cannot go."""
    outputs: dict[str, Tensor] = {}
    next_id = 1
    for block in range(draw(st.integers(1, 4))):
        width = draw(st.integers(1, 9))
        fixed = draw(st.integers(0, 2))
        ids = torch.arange(next_id, next_id + width)
        next_id += width
        for layer in range(draw(st.integers(1, 3))):
            repeated = ids.repeat_interleave(draw(st.integers(1, 2)))
            outputs[f"{block}.{layer}"] = torch.cat([repeated, torch.zeros(fixed, dtype=torch.long)])
    scores = draw(
        st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.5, 7.0, math.inf]), min_size=next_id - 1, max_size=next_id - 1)
    )
    return Groups.of(outputs), scores


def members(groups: Groups, g: int) -> dict[str, int]:
    return next(kind.members for kind in groups.kinds if g in kind.groups.tolist())


def neurons(groups: Groups, g: int) -> int:
    return sum(members(groups, g).values())


@settings(max_examples=150, deadline=None, derandomize=True)
@given(network=networks(), count=st.integers(0, 40), floor=st.integers(1, 4))
def test_the_cheapest_groups_go_as_far_as_the_floors_allow(
    network: tuple[Groups, list[float]], count: int, floor: int
) -> None:
    groups, scores = network
    chosen = set(cheapest(groups, scores, count, floor).tolist())
    positions = {i: g for g, i in enumerate(groups.ids.tolist())}
    picked = {positions[i] for i in chosen}
    left = dict(groups.widths)
    for g in picked:
        assert scores[g] < math.inf
        for name, number in members(groups, g).items():
            left[name] -= number
    for name, width in left.items():
        assert width >= floor or width == groups.widths[name]
    removed = sum(neurons(groups, g) for g in picked)

    def fits(g: int) -> bool:
        return all(left[name] - number >= floor for name, number in members(groups, g).items())

    waiting = [g for g in range(len(scores)) if g not in picked and scores[g] < math.inf]
    if removed < count:
        assert not any(fits(g) for g in waiting)
    for g in picked:  # the last one that went was still needed
        worth = scores[g] / neurons(groups, g)
        dearer = [h for h in picked if scores[h] / neurons(groups, h) > worth]
        assert not dearer or removed - sum(neurons(groups, h) for h in dearer) < count
    for g in waiting:  # nothing cheaper was passed over for something dearer of its own kind
        for h in picked:
            if members(groups, g) == members(groups, h):
                assert (scores[h], h) <= (scores[g], g)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(network=networks(), count=st.integers(0, 40), multiple=st.integers(2, 5))
def test_rounding_leaves_multiples_or_whole_layers(
    network: tuple[Groups, list[float]], count: int, multiple: int
) -> None:
    groups, scores = network
    chosen = cheapest(groups, scores, count, round_to=multiple).tolist()
    positions = {i: g for g, i in enumerate(groups.ids.tolist())}
    left = dict(groups.widths)
    for i in chosen:
        for name, number in members(groups, positions[i]).items():
            left[name] -= number
    assert all(w == groups.widths[n] or (w % multiple == 0 and w >= multiple) for n, w in left.items())


@settings(max_examples=150, deadline=None, derandomize=True)
@given(network=networks(), seed=st.integers(0, 2**32))
def test_the_cut_that_is_tried_takes_an_odd_number_of_each_kind_and_leaves_some(
    network: tuple[Groups, list[float]], seed: int
) -> None:
    groups, _ = network
    gone = groups.about_half(torch.Generator().manual_seed(seed))
    assert gone.tolist() == sorted(set(gone.tolist()) & set(groups.ids.tolist()))
    for kind in groups.kinds:
        went = int(torch.isin(groups.ids[kind.groups], gone).sum())
        assert went == 0 if len(kind.groups) == 1 else went % 2 == 1 or went == len(kind.groups) - 1
        assert went < len(kind.groups)
        assert abs(went - len(kind.groups) / 2) <= len(kind.groups) / 8 + 1.5
