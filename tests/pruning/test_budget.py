"""How much goes, of what, from where: the choice against a slow reference, and each option of the pruner by itself."""

from __future__ import annotations

import copy
import io
import itertools
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor, nn

from kfac_flat import NeuronPruner
from kfac_flat.pruning.budget import Ranking, Schedule
from kfac_flat.pruning.graph import kept_without
from kfac_flat.pruning.groups import Groups
from kfac_flat.pruning.surgery import Surgery
from tests.pruning.masking import layers_of, prune_at_random, pruner_for, random_gradients
from tests.pruning.nets import CASES
from tests.pruning.test_costs import real_size
from tests.pruning.test_schedule import mlp, set_theta

# ---------------------------------------------------------------- the order, one group at a time


@dataclass
class Network:
    """Layers as lists of group numbers, 0 for channels that stay, with what the groups are worth and how far to go."""

    layers: dict[str, list[int]]
    scores: dict[int, float]
    costs: dict[int, float]
    floors: dict[str, int]
    round_to: int = 1

    @property
    def members(self) -> dict[int, Counter[str]]:
        """How many neurons of which layer each group has."""
        found: dict[int, Counter[str]] = {}
        for name, ids in self.layers.items():
            for i in ids:
                if i:
                    found.setdefault(i, Counter())[name] += 1
        return dict(sorted(found.items()))

    @property
    def widths(self) -> dict[str, int]:
        return {name: len(ids) for name, ids in self.layers.items()}

    def chunks(self, alike: Mapping[int, Counter[str]] | None = None) -> list[list[int]]:
        """Take what is cheapest at the moment, again and again, until nothing can go."""
        members, left, result = self.members, self.widths, []
        waiting = [i for i in members if self.costs[i] and self.scores[i] < math.inf]
        waiting.sort(key=lambda i: (self.scores[i] / self.costs[i], i))
        lost: Counter[frozenset[tuple[str, int]]] = Counter()
        if alike is not None:
            lost.update(frozenset(m.items()) for i, m in alike.items() if i not in members)
            total = Counter(frozenset(m.items()) for m in alike.values())
        while True:
            found = []
            for kind in {frozenset(members[i].items()) for i in waiting}:
                own = [i for i in waiting if members[i] == dict(kind)]
                for count in range(1, len(own) + 1):
                    after = {name: left[name] - count * number for name, number in kind}
                    if all(w >= self.floors[n] and w % self.round_to == 0 for n, w in after.items()):
                        chunk = own[:count]
                        value = sum(self.scores[i] for i in chunk) / sum(self.costs[i] for i in chunk)
                        if alike is not None:
                            value = 1 - (total[kind] - lost[kind] - count) / total[kind]
                        found.append((value, chunk[0], chunk, kind, after))
                        break
            if not found:
                return result
            _, _, chunk, kind, after = min(found, key=lambda choice: choice[:2])
            left |= after
            lost[kind] += len(chunk)
            waiting = [i for i in waiting if i not in chunk]
            result.append(chunk)

    def groups(self) -> Groups:
        return Groups.of({name: torch.tensor(ids).long() for name, ids in self.layers.items()})

    def order(self, alike: Groups | None = None) -> list[list[int]]:
        """The library's answer."""
        groups = self.groups()
        scores, costs = (
            torch.tensor([of[i] for i in groups.ids.tolist()], dtype=torch.float64) for of in (self.scores, self.costs)
        )
        order = groups.order(scores, costs, floors=self.floors, round_to=self.round_to, alike=alike)
        ends = order.ends.tolist()
        return [order.ids[start:end].tolist() for start, end in zip([0, *ends], ends, strict=False)]


@st.composite
def networks(draw: Any, multiples: st.SearchStrategy[int]) -> Network:
    """Layers made of pools of groups: a pool may be in several layers, a layer may hold several pools."""
    pools, start = [], 1
    for _ in range(draw(st.integers(1, 4))):
        size = draw(st.integers(1, 9))
        pools.append(list(range(start, start + size)))
        start += size
    layers = {}
    for name in "abcde"[: draw(st.integers(1, 5))]:
        ids = [0] * draw(st.integers(0, 3))
        for pool in draw(st.lists(st.sampled_from(pools), min_size=1, max_size=3, unique_by=tuple)):
            ids += pool * draw(st.integers(1, 2))
        layers[name] = ids
    numbers = st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0, 1.75, 2.5, 7.0, math.inf]), min_size=start, max_size=start)
    costs = st.lists(st.sampled_from([1.0, 1.0, 2.0, 3.0, 5.0, 0.0]), min_size=start, max_size=start)
    floors = {name: draw(st.integers(1, 5)) for name in layers}
    return Network(layers, dict(enumerate(draw(numbers))), dict(enumerate(draw(costs))), floors, draw(multiples))


def shared_widths(network: Network) -> list[int]:
    """Widths of layers that have groups of several kinds."""
    kinds = {frozenset(m.items()) for m in network.members.values()}
    return [w for name, w in network.widths.items() if sum(name in dict(kind) for kind in kinds) > 1]


@given(network=networks(st.just(1)))
def test_groups_go_in_the_order_in_which_one_would_pick_them_by_hand(network: Network) -> None:
    assert network.order() == network.chunks()


@given(network=networks(st.integers(2, 5)))
def test_chunks_of_rounded_layers_go_in_the_order_in_which_one_would_pick_them_by_hand(network: Network) -> None:
    assume(all(width % network.round_to == 0 for width in shared_widths(network)))
    assert network.order() == network.chunks()


@given(network=networks(st.integers(1, 3)), gone=st.integers(0, 6))
def test_layers_that_lose_alike_go_in_the_order_in_which_one_would_pick_them_by_hand(
    network: Network, gone: int
) -> None:
    members = network.members
    lost = set(list(members)[:: gone + 1][:gone])  # earlier, by whatever reasons
    smaller = copy.copy(network)
    smaller.layers = {name: [i for i in ids if i not in lost] for name, ids in network.layers.items()}
    assume(all(width % network.round_to == 0 for width in shared_widths(smaller)))
    assert smaller.order(network.groups()) == smaller.chunks(members)


@given(network=networks(st.integers(1, 6)))
def test_wherever_one_stops_layers_are_multiples_and_not_below_their_floors(network: Network) -> None:
    left, members, seen = network.widths, network.members, set()
    for chunk in network.order():
        assert not seen & set(chunk)
        seen |= set(chunk)
        assert len({frozenset(members[i].items()) for i in chunk}) == 1
        for i in chunk:
            assert network.scores[i] < math.inf
            assert network.costs[i] > 0
            for name, number in members[i].items():
                left[name] -= number
        for name, width in left.items():
            assert width == network.widths[name] or (width % network.round_to == 0 and width >= network.floors[name])
    for i in members:  # whoever stays is not cheaper than one of its kind that went
        for j in seen:
            if i not in seen and members[i] == members[j] and network.costs[i]:
                ratios = [(network.scores[g] / network.costs[g], g) for g in (j, i)]
                assert ratios[0] < ratios[1]


@given(
    network=networks(st.just(1)),
    limit=st.integers(0, 60),
)
def test_as_few_chunks_go_as_are_enough(network: Network, limit: int) -> None:
    groups, chunks = network.groups(), network.chunks()
    order = groups.order(
        *(torch.tensor([of[i] for i in groups.ids.tolist()]).double() for of in (network.scores, network.costs)),
        floors=network.floors,
    )
    count = 0
    while count < len(chunks) and sum(sum(network.members[i].values()) for c in chunks[:count] for i in c) < limit:
        count += 1
    expected = sorted(i for chunk in chunks[:count] for i in chunk)
    assert order.fewest(lambda gone: groups.neurons_of(gone) >= limit).tolist() == expected


@pytest.mark.parametrize("score", [0.1, 0.3, 0.7, 1 / 3, 1e-300])
@pytest.mark.parametrize("width", range(5, 24))
def test_rounding_errors_of_sums_do_not_bring_a_later_chunk_forward(width: int, score: float) -> None:
    network = Network({"a": list(range(1, width + 1))}, dict.fromkeys(range(1, width + 1), score), {}, {"a": 1}, 8)
    network.costs = dict.fromkeys(network.scores, 1.0)
    found = network.order()
    assert [i for chunk in found for i in chunk] == list(range(1, width - 7 if width >= 8 else 1))
    assert [len(chunk) for chunk in found] == ([width % 8] if width % 8 and width > 8 else []) + [8] * (width // 8 - 1)


def test_two_kinds_do_not_both_bring_a_layer_that_they_share_down_to_a_multiple() -> None:
    ids = list(range(1, 19))  # ten of them are in both layers
    network = Network({"a": ids, "b": ids[:10]}, dict.fromkeys(ids, 1.0), dict.fromkeys(ids, 1.0), {"a": 1, "b": 1}, 4)
    assert network.order() == [[1, 2], [3, 4, 5, 6], [11, 12, 13, 14], [15, 16, 17, 18]]


# ---------------------------------------------------------------- the pruner: budgets


def fake_latency(model: nn.Module, inputs: Any) -> float:
    """Time as hardware might take it, but always the same: wider layers cost more, in steps of four."""
    sizes = [module.weight.shape for module in layers_of(model).values()]
    return 1e-6 + 1e-7 * sum(math.ceil(shape[0] / 4) * math.ceil(shape[1] / 4) for shape in sizes)


def amounts(pruner: NeuronPruner, gone: Tensor) -> dict[str, float]:
    """What the model would be without these groups, counted on one that is really cut."""
    small = copy.deepcopy(pruner._model).eval()
    Surgery(small, kept_without(pruner._channels, gone)).apply()
    inputs = torch.zeros(1, *pruner._graph.inputs.args[0].shape[1:], dtype=torch.float64)
    parameters, macs = real_size(small, inputs, 1)
    neurons = sum(module.weight.shape[0] for name, module in layers_of(small).items() if name in pruner._graph.hidden)
    return {"neurons": neurons, "parameters": parameters, "macs": macs, "latency": fake_latency(small, None)}


PACES = {"linear": lambda t: t, "cubic": lambda t: 1 - (1 - t) ** 3}


@pytest.mark.parametrize("pace", PACES)
@pytest.mark.parametrize("budget", ["neurons", "parameters", "macs", "latency"])
@pytest.mark.parametrize("name", ["mlp", "residual", "grouped", "depthwise_separable", "channel_shuffle"])
def test_every_event_reaches_its_goal_with_as_few_groups_as_possible(
    name: str, budget: str, pace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kfac_flat.pruning.remaining.latency", fake_latency)
    model, inputs = CASES[name].build()
    target, events = 0.4, 3
    if budget == "latency":
        floor = fake_latency(nn.Sequential(), None)
        target = 0.4 * (1 - floor / fake_latency(model, None))
    pruner = pruner_for(model, inputs, target=target, events=events, budget=budget, pace=pace, max_share=1.0)
    original = amounts(pruner, torch.tensor([]).long())[budget]
    for event in range(1, events + 1):
        if pruner.finished:  # the last removal but one has gone a little too far
            break
        random_gradients(model, pruner._optimizer, seed=event)
        scores, groups, ids = pruner._scores(), pruner._groups, pruner._groups.ids.tolist()
        layers = {name: pruner._channels[name].outputs.tolist() for name in pruner._graph.hidden}
        network = Network(layers, dict(zip(ids, scores, strict=True)), {}, dict.fromkeys(layers, 1))
        network.costs = dict(zip(ids, map(float, groups.neurons.tolist()), strict=True))
        chunks = [torch.tensor(chunk) for chunk in network.chunks()]
        due = target * PACES[pace](event / events) * original
        goal = original - (round(due) if budget == "neurons" else due)
        count, gone = 0, torch.tensor([]).long()
        while amounts(pruner, gone)[budget] > goal * (1 + 1e-12):
            gone, count = torch.cat(chunks[: count + 1]), count + 1
        left, before = amounts(pruner, gone), {n: len(c.outputs) for n, c in pruner._channels.items()}
        lost = {n: int(torch.isin(c.outputs, gone).sum()) for n, c in pruner._channels.items()}
        report = pruner.step()
        assert bool(report) == bool(count)
        assert report.widths_after == {n: before[n] - lost[n] for n in report.widths_after}
        assert {n: len(t) for n, t in report.removed.items()} == {
            n: number for n, number in lost.items() if number and n in report.widths_after
        }
        assert getattr(report.after, budget) == left[budget]
        assert pruner.progress == 1 - left[budget] / original
    assert pruner.finished
    assert pruner.progress >= target - (0.5 / original if budget == "neurons" else 1e-12)


@pytest.mark.parametrize("lost", range(1, 50))
def test_a_target_that_neurons_meet_exactly_takes_no_neuron_more(lost: int) -> None:
    model = nn.Sequential(nn.Linear(1, 50, bias=False), nn.Tanh(), nn.Linear(50, 1, bias=False))
    pruner = pruner_for(model, torch.zeros(1, 1), target=lost / 50, budget="parameters")
    prune_at_random(pruner, model)
    assert pruner.widths["0"] == 50 - lost


@pytest.mark.parametrize("budget", ["neurons", "parameters", "macs", "latency"])
def test_a_target_out_of_reach_is_refused_in_the_budgets_own_numbers(
    budget: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kfac_flat.pruning.remaining.latency", fake_latency)
    model = mlp(4, 10, 10, 3)
    with pytest.raises(ValueError, match=r"target=0\.9 cannot be reached: ") as error:
        pruner_for(model, torch.zeros(1, 4), target=0.9, budget=budget, min_neurons=3)
    before, after = mlp(4, 10, 10, 3), mlp(4, 3, 3, 3)
    amount = {
        "neurons": lambda m: sum(layer.out_features for layer in layers_of(m).values()) - 3,
        "parameters": lambda m: sum(p.numel() for p in m.parameters()),
        "macs": lambda m: sum(layer.weight.numel() for layer in layers_of(m).values()),
        "latency": lambda m: fake_latency(m, None),
    }[budget]
    every, least = amount(before), amount(after)
    found = f"{every - least:,.9g} of the model's {every:,.9g} {budget} can be removed"
    if budget == "latency":
        found = f"a call takes {1e6 * every:,.3g} microseconds, and {1e6 * least:,.3g} where all goes that can"
    assert f"{found} with min_neurons=3" in str(error.value)
    assert "round_to" not in str(error.value), "nobody asked for it"


def test_the_real_latency_of_a_small_model_goes_down_with_its_layers() -> None:
    model = mlp(64, 2048, 2048, 3)
    x = torch.zeros(64, 64)
    pruner = pruner_for(model, x, target=0.3, budget="latency", min_neurons=8)
    assert pruner.size.latency is not None
    assert 0 < pruner.size.latency < 60
    training = model.training
    prune_at_random(pruner, model)
    assert model.training == training
    assert pruner.size.latency is not None
    assert pruner.size.latency > 0
    assert pruner.widths["0"] + pruner.widths["2"] < 4096
    assert model(x).shape == (64, 3)
    assert pruner.finished


# ---------------------------------------------------------------- the pruner: caps and paces


@pytest.mark.parametrize("name", ["mlp", "residual", "grouped", "depthwise_separable", "densenet"])
@pytest.mark.parametrize(("share", "step"), [(0.5, 1.0), (1.0, 0.25), (0.6, 0.3)])
def test_no_layer_loses_more_than_its_share_in_one_event_or_altogether(name: str, share: float, step: float) -> None:
    model, inputs = CASES[name].build()
    pruner = pruner_for(model, inputs, target=0.3, events=4, max_share=share, max_step=step)
    original, capped = pruner.widths, 0
    for event in range(4):
        before = pruner.widths
        generator = torch.Generator().manual_seed(event)
        for i, p in enumerate(model.parameters()):  # one end of the model matters far less
            p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype) * 10.0**i
        pruner._optimizer.step()
        pruner.step()
        for layer, width in pruner.widths.items():
            assert original[layer] - width <= share * original[layer] + 1e-9
            assert before[layer] - width <= step * before[layer] + 1e-9
            capped += share * original[layer] - (original[layer] - width) < 1
            capped += width < before[layer] and step * before[layer] - (before[layer] - width) < 1
    assert capped, "no cap was ever met, so that they mean nothing"
    assert pruner.sparsity > 0


def test_without_a_cap_a_layer_that_matters_least_collapses_and_with_one_it_does_not() -> None:
    left = {}
    for share in (1.0, 0.5):
        model = mlp(4, 10, 10, 3).double()
        pruner = pruner_for(model, torch.zeros(1, 4), target=0.45, max_share=share)
        set_theta(pruner, model, [[0.01] * 10, [1.0] * 10])
        pruner.step()
        left[share] = (pruner.widths["0"], pruner.widths["2"])
    assert left == {1.0: (1, 10), 0.5: (5, 6)}


def test_a_fixed_number_of_neurons_goes_each_time_as_often_as_it_takes() -> None:
    model = mlp(4, 20, 30, 3)
    pruner = pruner_for(model, torch.zeros(1, 4), target=0.5, events=2, neurons_per_event=7)
    left = []
    while not pruner.finished:
        prune_at_random(pruner, model, seed=len(left))
        left.append(pruner.size.neurons)
    assert left == [43, 36, 29, 25]
    random_gradients(model, pruner._optimizer)
    assert pruner.step().reason.startswith("finished")


def test_the_share_of_a_layer_that_goes_in_one_event_is_that_of_what_is_left() -> None:
    model = mlp(4, 16, 3)
    pruner = pruner_for(model, torch.zeros(1, 4), target=0.75, events=2, neurons_per_event=8, max_step=0.5)
    for width in (8, 4):
        prune_at_random(pruner, model)
        assert pruner.widths["0"] == width


def test_a_fixed_number_for_a_target_of_less_than_a_neuron_is_no_error() -> None:
    model = mlp(4, 10, 3)
    pruner = pruner_for(model, torch.zeros(1, 4), target=0.01, neurons_per_event=3)
    random_gradients(model, pruner._optimizer)
    assert not pruner.step()
    assert pruner.widths["0"] == 10
    assert pruner.finished


# ---------------------------------------------------------------- the pruner: rankings


@pytest.mark.parametrize("events", [1, 3, 10])
def test_ranked_by_layer_all_layers_lose_the_same_share_after_every_event(events: int) -> None:
    widths = (4, 10, 23, 200)
    model = mlp(4, *widths, 3)
    pruner = pruner_for(model, torch.zeros(1, 4), target=0.5, events=events, ranking="layer")
    for event in range(1, events + 1):
        prune_at_random(pruner, model, seed=event)
        lost = [(width, width - pruner.widths[str(2 * i)]) for i, width in enumerate(widths)]
        assert sum(gone for _, gone in lost) == round(0.5 * event / events * sum(widths))
        for (width, gone), (other, less) in itertools.product(lost, lost):  # a neuron less would be too few
            assert gone / width <= (less + 1) / other
    assert pruner.size.neurons == sum(widths) - round(sum(widths) / 2)


def test_ranked_by_layer_scores_decide_within_each_layer() -> None:
    model = mlp(4, 4, 4, 3).double()
    pruner = pruner_for(model, torch.zeros(1, 4), target=0.5, ranking="layer")
    set_theta(pruner, model, [[3.0, 1.0, 2.0, 4.0], [300.0, 400.0, 200.0, 100.0]])
    assert {name: t.tolist() for name, t in pruner.step().removed.items()} == {"0": [1, 2], "2": [2, 3]}


@pytest.mark.parametrize("normalize", [None, "mean", "max", "l2"])
def test_normalised_scores_do_not_care_how_large_those_of_a_layer_are(normalize: str | None) -> None:
    theta, gone = [[0.5, 0.1, 3.0, 4.0, 2.0], [0.2, 1.0, 0.3, 2.0]], []
    for factor in (1.0, 1e4):
        model = mlp(4, 5, 4, 3).double()
        pruner = pruner_for(model, torch.zeros(1, 4), target=0.5, max_share=1.0, normalize=normalize)
        set_theta(pruner, model, [[factor * t for t in theta[0]], theta[1]])
        gone.append({name: t.tolist() for name, t in pruner.step().removed.items()})
    assert (gone[0] == gone[1]) == (normalize is not None)


@pytest.mark.parametrize("normalize", ["mean", "max", "l2"])
def test_normalising_divides_by_the_norm_of_what_is_known_in_the_same_layers(normalize: str) -> None:
    groups = Groups.of({"a": torch.tensor([1, 2, 3, 0]), "b": torch.tensor([1, 2, 3]), "c": torch.tensor([4, 5])})
    scores = torch.tensor([3.0, math.inf, 4.0, 0.0, 0.0], dtype=torch.float64)
    norm = {"mean": 3.5, "max": 4.0, "l2": 5.0}[normalize]
    assert groups.normalised(scores, normalize).tolist() == [3 / norm, math.inf, 4 / norm, 0.0, 0.0]
    assert scores.tolist() == [3.0, math.inf, 4.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("per", "gone"),
    [("neuron", {"2": [0]}), ("group", {"2": [0]}), ("mac", {"0": [0]}), ("parameter", {"0": [0]})],
)
def test_scores_are_counted_per_what_a_removal_saves(per: str, gone: dict[str, list[int]]) -> None:
    model = mlp(50, 4, 4, 3).double()  # a neuron of "0" costs 54 products, one of "2" 7
    pruner = pruner_for(model, torch.zeros(1, 50), target=1 / 8, per=per)
    set_theta(pruner, model, [[2.0, 9.0, 9.0, 9.0], [1.0, 9.0, 9.0, 9.0]])
    assert {name: t.tolist() for name, t in pruner.step().removed.items()} == gone


@pytest.mark.parametrize(("per", "first"), [("group", "residual"), ("neuron", "alone")])
def test_a_group_of_several_neurons_is_weighed_as_one_or_by_their_number(per: str, first: str) -> None:
    outputs = {"a": torch.arange(1, 4), "b": torch.arange(1, 4), "c": torch.arange(4, 7)}
    groups, scores = Groups.of(outputs), torch.tensor([1.0, 9, 9, 0.75, 9, 9], dtype=torch.float64)
    costs = {"neuron": groups.neurons.double(), "group": torch.ones(6).double()}[per]
    order = groups.order(scores, costs, floors=dict.fromkeys(outputs, 1))
    assert order.first(1).tolist() == ([4] if first == "residual" else [1])


@pytest.mark.parametrize("budget", ["neurons", "parameters", "macs", "latency"])
@pytest.mark.parametrize("ranking", ["global", "layer"])
def test_two_runs_are_the_same_and_equal_scores_go_by_index(
    budget: str, ranking: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kfac_flat.pruning.remaining.latency", fake_latency)
    reports = []
    for _ in range(2):
        model = mlp(6, 8, 8, 3).double()
        options = {"budget": budget, "ranking": ranking, "target": 0.25}
        pruner = pruner_for(model, torch.zeros(1, 6), events=2, **options)
        set_theta(pruner, model, [[1.0] * 8, [1.0] * 8])
        reports.append(pruner.step())
    assert reports[0] == reports[1]
    for channels in reports[0].removed.values():
        assert channels.tolist() == list(range(len(channels)))
    assert reports[0]


# ---------------------------------------------------------------- the pruner: resuming, wrong values


@pytest.mark.parametrize("budget", ["neurons", "parameters", "macs", "latency"])
def test_a_resumed_pruner_goes_on_towards_the_same_target(budget: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kfac_flat.pruning.remaining.latency", fake_latency)

    def fresh() -> tuple[nn.Module, NeuronPruner]:
        torch.manual_seed(0)
        model = mlp(6, 16, 20, 3)
        return model, pruner_for(model, torch.zeros(1, 6), target=0.4, events=3, budget=budget, pace="cubic")

    whole, pruner = fresh()
    prune_at_random(pruner, whole, seed=1)
    random_gradients(whole, pruner._optimizer, seed=2)
    file = io.BytesIO()
    torch.save({"pruner": pruner.state_dict(), "model": whole.state_dict()}, file)
    assert pruner.step()
    random_gradients(whole, pruner._optimizer, seed=3)
    pruner.step()

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    if budget == "latency":  # measured on a machine that now takes three times as long
        monkeypatch.setattr("kfac_flat.pruning.remaining.latency", lambda *of: 3 * fake_latency(*of))
    again, resumed = fresh()
    monkeypatch.setattr("kfac_flat.pruning.remaining.latency", fake_latency)
    resumed.load_state_dict(saved["pruner"])
    again.load_state_dict(saved["model"])
    assert resumed.step()
    random_gradients(again, resumed._optimizer, seed=3)
    resumed.step()
    assert resumed.widths == pruner.widths
    assert resumed.progress == pruner.progress
    assert resumed.state_dict()["original"] == pruner.state_dict()["original"] == saved["pruner"]["original"]
    assert {n: t.tolist() for n, t in resumed.survivors.items()} == {n: t.tolist() for n, t in pruner.survivors.items()}
    assert resumed.finished
    assert pruner.finished


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("budget", "flops", r"budget='flops' must be one of 'neurons', 'parameters', 'macs', 'latency'"),
        ("pace", "fast", r"pace='fast' must be one of 'linear', 'cubic'"),
        ("ranking", "local", r"ranking='local' must be one of 'global', 'layer'"),
        ("normalize", "sum", r"normalize='sum' must be one of None, 'mean', 'max', 'l2'"),
        ("per", "layer", r"per='layer' must be one of 'neuron', 'parameter', 'mac', 'group'"),
        *((name, value, rf"{name}=.* must lie in \(0, 1\]") for name in ("max_share", "max_step")
          for value in (0, 1.5, -0.1, math.nan, "all")),
        ("max_step", None, r"max_step=None must lie in \(0, 1\]"),
        *((name, value, rf"{name}=.* must be a whole number, at least 1")
          for name in ("neurons_per_event", "round_to", "min_neurons") for value in (0, -3, 2.0, True, "2")),
    ],
)  # fmt: skip
def test_wrong_values_are_refused_by_name(option: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pruner_for(mlp(4, 10, 3), torch.zeros(1, 4), **{option: value})


@pytest.mark.parametrize("events", [1, 4])
@pytest.mark.parametrize("target", [0.3, 0.5, 0.75, 0.9])
def test_by_default_no_layer_becomes_a_bottleneck(target: float, events: int) -> None:
    widths = {}
    for share in (None, 1.0):
        model = mlp(4, 40, 30, 3).double()
        pruner = pruner_for(model, torch.zeros(1, 4), target=target, events=events, max_share=share)
        while not pruner.finished:
            random_gradients(model, pruner._optimizer, seed=0)
            pruner._saliency.total[:] = 1 + torch.rand(len(pruner._groups.ids))
            narrow = torch.isin(pruner._groups.ids, pruner._channels["0"].outputs)
            pruner._saliency.total[narrow] /= 1000  # all of the first layer goes first
            pruner.step()
        assert pruner.sparsity == pytest.approx(target, abs=0.02)
        widths[share] = pruner.widths
    even = (1 - target) * 40
    assert widths[None]["0"] == math.ceil(0.7 * even - 1e-9)
    assert widths[1.0]["0"] == max(1, 40 - round(target * 70))


def test_floors_that_nobody_asked_for_are_rounded_down_where_the_target_asks_for_it() -> None:
    model = mlp(4, 40, 16, 16, 16, 16, 16, 3).double()  # 0.7 of even shares: 2.8 and 1.12, and 12 neurons are to stay
    pruner = pruner_for(model, torch.zeros(1, 4), target=0.9)
    random_gradients(model, pruner._optimizer, seed=0)
    pruner._saliency.total[:] = 1 + torch.rand(len(pruner._groups.ids))
    pruner._saliency.total[torch.isin(pruner._groups.ids, pruner._channels["0"].outputs)] /= 1000
    assert pruner.step().widths_after["0"] == 2
    assert sum(pruner.widths.values()) == 12 + 3


def test_floors_that_nobody_asked_for_give_way_to_the_target() -> None:
    options = {"target": 0.5, "ignore": ["2"]}  # of the 40 that can go, 35 have to, and the usual floor is 14
    given = pruner_for(mlp(4, 40, 30, 3), torch.zeros(1, 4), **options)
    random_gradients(given._model, given._optimizer, seed=0)
    assert given.step().widths_after == {"0": 5, "2": 30, "4": 3}
    with pytest.raises(ValueError, match=r"target=0.5 cannot be reached: 26 of .* with min_neurons=1, max_share=0.65"):
        pruner_for(mlp(4, 40, 30, 3), torch.zeros(1, 4), **options, max_share=0.65)


def test_a_number_of_neurons_is_no_budget_of_anything_else() -> None:
    with pytest.raises(ValueError, match="neurons_per_event is a number of neurons, but budget='macs'"):
        pruner_for(mlp(4, 10, 3), torch.zeros(1, 4), budget="macs", neurons_per_event=2)


@given(events=st.integers(1, 50), pace=st.sampled_from(["linear", "cubic"]))
def test_shares_grow_to_one_and_the_cubic_pace_is_ahead(events: int, pace: str) -> None:
    shares = [Schedule(1, 1, events, pace).share(event) for event in range(1, events + 3)]
    assert shares == sorted(shares)
    assert shares[events - 1 :] == [1.0] * 3
    assert all(share >= event / events for event, share in enumerate(shares[:events], 1))


def test_a_ranking_has_defaults_that_are_those_of_the_pruner() -> None:
    assert Ranking() == Ranking("global", None, "neuron")
