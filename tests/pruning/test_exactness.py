"""A pruned model computes what the dense model computes without the removed neurons: pruned(x) == masked(x)."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.pruning.masking import assert_exact, prune_at_random, pruner_for, removed_inputs
from tests.pruning.nets import CASES, Block, Case, conv, images, vectors


@pytest.mark.parametrize("name", CASES)
def test_pruned_equals_masked_in_eval_and_train_mode(name: str) -> None:
    model, inputs = CASES[name].build()
    dense = copy.deepcopy(model)
    pruner = pruner_for(model, inputs)
    prune_at_random(pruner, model)
    assert sum(p.numel() for p in model.parameters()) < sum(p.numel() for p in dense.parameters())
    assert_exact(dense, model, pruner.state_dict(), inputs)


@pytest.mark.parametrize("name", ["residual", "densenet", "squeeze_excite", "depthwise_multiplier", "permuted_flatten"])
def test_pruned_equals_masked_after_several_removals(name: str) -> None:
    model, inputs = CASES[name].build()
    dense = copy.deepcopy(model)
    pruner = pruner_for(model, inputs, target=0.5, events=3)
    for event in range(3):
        prune_at_random(pruner, model, seed=event)
        assert_exact(dense, model, pruner.state_dict(), inputs)


def test_every_hidden_layer_of_the_nets_can_be_cut() -> None:
    stuck = {}
    for name, case in CASES.items():
        model, inputs = case.build()
        stuck[name] = set(pruner_for(model, inputs, target=0.1).frozen.values())
    reasons = {reason for found in stuck.values() for reason in found}
    assert reasons == {"forms the model's output", "norm1 (LayerNorm) takes its statistics over all neurons"}


@pytest.mark.parametrize("name", CASES)
def test_a_single_example_is_traced_like_a_batch(name: str) -> None:
    model, inputs = CASES[name].build()
    usual = pruner_for(model, inputs, target=0.1)
    single = pruner_for(model, CASES[name].inputs(1), target=0.1)
    for layer, channels in usual._channels.items():
        assert torch.equal(channels.outputs, single._channels[layer].outputs)
        assert torch.equal(channels.inputs, single._channels[layer].inputs)


def test_the_probe_finds_the_columns_that_a_flatten_spreads_a_channel_over() -> None:
    flat, inputs = CASES["cnn_flatten"].build()
    assert removed_inputs(flat, inputs, {"3": [2]}) == {"6": set(range(18, 27))}
    permuted, inputs = CASES["permuted_flatten"].build()
    assert removed_inputs(permuted, inputs, {"conv": [2]}) == {"fc": set(range(2, 216, 6))}


def test_the_probe_refuses_a_mask_that_would_take_inputs_of_neurons_that_stay() -> None:
    model, inputs = CASES["in_place_sums"].build()
    with pytest.raises(AssertionError, match="fed by neurons that stay"):
        removed_inputs(model, inputs, {"a": [0]})


widths = st.integers(4, 6)
nonlinearities = st.sampled_from([nn.ReLU, nn.Tanh, nn.SiLU, nn.Identity, nn.LeakyReLU])


@st.composite
def mlps(draw: Any) -> Case:
    sizes = [6, *draw(st.lists(widths, min_size=1, max_size=3)), 3]
    layers: list[Callable[[], nn.Module]] = []
    for i, (a, b) in enumerate(pairwise(sizes)):
        layers.append(partial(nn.Linear, a, b, bias=draw(st.booleans())))
        if i < len(sizes) - 2:
            layers += [partial(nn.BatchNorm1d, b)] * draw(st.booleans()) + [draw(nonlinearities)]
    return Case(lambda: nn.Sequential(*(make() for make in layers)), vectors)


@st.composite
def cnns(draw: Any) -> Case:
    layers: list[Callable[[], nn.Module]] = []
    width = 2
    for _ in range(draw(st.integers(1, 3))):
        after = draw(widths)
        kind = draw(st.sampled_from(["conv", "block", "grouped", "depthwise"]))
        if kind == "block":
            layers.append(partial(Block, width, after))
        elif kind == "grouped" and layers and width % 2 == 0 and after % 2 == 0:
            layers.append(partial(conv, width, after, groups=2))
        elif kind == "depthwise" and layers:
            after = width * draw(st.integers(1, 2))
            layers.append(partial(conv, width, after, groups=width))
        else:
            layers.append(partial(conv, width, after, draw(st.sampled_from([1, 3])), bias=draw(st.booleans())))
        layers += [partial(nn.BatchNorm2d, after)] * draw(st.booleans()) + [draw(nonlinearities)]
        width = after
    head: list[Callable[[], nn.Module]] = [nn.Flatten, partial(nn.Linear, width * 36, 3)]
    if draw(st.booleans()):
        head = [partial(nn.AdaptiveAvgPool2d, 1), nn.Flatten, partial(nn.Linear, width, 3)]
    return Case(lambda: nn.Sequential(*(make() for make in (*layers, *head))), images)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(case=st.one_of(mlps(), cnns()), seed=st.integers(0, 99))
def test_pruned_equals_masked_for_random_networks(case: Case, seed: int) -> None:
    model, inputs = case.build(seed)
    dense = copy.deepcopy(model)
    pruner = pruner_for(model, inputs, target=0.34)
    prune_at_random(pruner, model, seed)
    assert_exact(dense, model, pruner.state_dict(), inputs)
