"""Whatever is built from these parts: what can go, goes exactly, and what cannot is named. Never a wrong number."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from hypothesis import Phase, find, given, settings
from hypothesis import strategies as st
from torch import nn

from kfac_flat import NeuronPruner
from tests.pruning.architectures import KEEPING, KINDS, Architecture, Interpreter, architectures
from tests.pruning.masking import assert_exact, distance, outputs_of, pruner_for, random_gradients


def counts_in(refusal: str) -> tuple[int, int]:
    """Read off how many neurons can be removed, of how many; no other reason to refuse is accepted."""
    if refusal.startswith("the model has no neurons to remove"):
        return 0, 0
    counts = re.search(r"(\d+) of the model's (\d+) neurons can be removed", refusal)
    assert counts, f"refused for another reason than what can go: {refusal}"
    return int(counts[1]), int(counts[2])


def pruner_of(model: nn.Module, inputs: Any, share: float) -> NeuronPruner | None:
    """Ask for a share of the neurons; where that is refused, for that share of those which can go, if any can."""
    try:
        return pruner_for(model, inputs, target=share, events=2)
    except ValueError as error:
        refusal = str(error)
    removable, neurons = counts_in(refusal)
    return pruner_for(model, inputs, target=share * removable / neurons, events=2) if removable else None


def make_a_step(model: nn.Module, inputs: Any, optimizer: torch.optim.Optimizer) -> None:
    loss = torch.stack([(output - 1).square().mean() for output in model(inputs)]).sum()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def assert_nothing_more_can_go(pruner: NeuronPruner) -> None:
    """Assert that each neuron left is frozen, in a layer that says why, or the last of some layer, or tied to it."""
    channels = {name: pruner._channels[name].outputs for name in pruner._graph.hidden}
    for name, outputs in channels.items():
        assert name in pruner.frozen or (outputs > 0).all(), f"{name} has frozen neurons and does not say why"
    for group in torch.unique(torch.cat(list(channels.values()))).tolist():
        last = any((outputs == group).all() for outputs in channels.values() if len(outputs))
        assert group == 0 or last, f"{group} could go"


def prune_and_compare(architecture: Architecture, seed: int, share: float) -> bool:
    """Put a network to the test; returns whether it lost neurons and computes something else since."""
    model, inputs = architecture.case.build(seed, n=4)
    dense = copy.deepcopy(model)
    pruner = pruner_of(model, inputs, share)
    if pruner is None:
        return False
    for number in range(2):
        random_gradients(model, pruner._optimizer, seed + number)
        report = pruner.step()
        assert report or "took this one's share along" in report.reason or pruner.finished, report.reason
        # A norm may undo what little a single net loses; that most change is asserted below.
        assert_exact(dense, model, pruner.state_dict(), inputs, least=0)
        make_a_step(model.eval(), inputs, pruner._optimizer)  # in train mode, statistics would move
    changed = distance(outputs_of(model, inputs), outputs_of(dense.eval(), inputs)) > 1e-3
    if share > 0.5:
        assert_nothing_more_can_go(pruner)
    pruner._optimizer.param_groups[0]["lr"] = 1e-3
    make_a_step(model.train(), inputs, pruner._optimizer)
    assert all(p.isfinite().all() for p in model.parameters())
    return changed


def test_pruned_equals_masked_whatever_the_architecture_and_most_lose_neurons() -> None:
    changed: list[bool] = []

    @given(architecture=architectures(), seed=st.integers(0, 99), share=st.sampled_from([0.5, 1 - 1e-9]))
    def law(architecture: Architecture, seed: int, share: float) -> None:
        changed.append(prune_and_compare(architecture, seed, share))

    law()
    assert sum(changed) > 0.6 * len(changed)


def shrunk(architecture: Architecture) -> set[str]:
    """Kinds of instructions that make or read something smaller once half of the neurons have gone, if that matters."""
    dense, inputs = architecture.case.build(n=4)
    model = copy.deepcopy(dense)
    pruner = pruner_of(model, inputs, 0.5)
    if pruner is None:
        return set()
    random_gradients(model, pruner._optimizer)
    assert pruner.step()
    assert isinstance(dense, Interpreter)
    assert isinstance(model, Interpreter)
    if distance(outputs_of(model, inputs), outputs_of(dense, inputs)) < 1e-3:
        return set()
    with torch.no_grad():
        smaller = [a.shape != b.shape for a, b in zip(dense.values(inputs), model.values(inputs), strict=True)]
    found, made = set(), 1
    for step in architecture.steps:
        if any(smaller[made : made + step.results]) or any(smaller[i] for i in step.sources):
            found.add(step.kind)
        made += step.results
    return found


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in KEEPING])
def test_every_kind_of_instruction_meets_neurons_that_go(kind: str) -> None:
    def meets(architecture: Architecture) -> bool:
        return any(step.kind == kind for step in architecture.steps) and kind in shrunk(architecture)

    find(architectures((kind,)), meets, settings=settings(derandomize=True, database=None, phases=[Phase.generate]))
