"""What removing neurons must mean, found by running the network, not by reading it.

A neuron is disturbed while the outputs of all other layers are held at what they were: whatever entries of a layer's
input move then are read from that neuron, through whatever lies between. No tracing, no ids, none of the library.
"""

from __future__ import annotations

import copy
import itertools
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kfac_flat import NeuronPruner
from tests.pruning.nets import BATCH_NORMS, CONVS, LAYERS, TRANSPOSED, call


def is_depthwise(module: nn.Module) -> bool:
    return isinstance(module, CONVS) and 1 < module.groups == module.in_channels


def channel_axis(module: nn.Module, t: Tensor) -> int:
    return t.dim() - 1 if isinstance(module, nn.Linear) else 1


def widths_of(module: nn.Module) -> tuple[int, int]:
    """Input and output channels, read off the weight."""
    first, second = module.weight.shape[:2]
    second *= getattr(module, "groups", 1)
    return (first, second) if isinstance(module, TRANSPOSED) else (second, first)


def layers_of(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LAYERS)}


class Probe:
    """Finds out which input channels of which layers move with an output channel of a layer."""

    def __init__(self, model: nn.Module, inputs: Any) -> None:
        self._model = copy.deepcopy(model).train()  # train mode: auxiliary heads are there as well
        self._inputs = inputs
        self._layers = layers_of(self._model)
        self._read: dict[str, list[Tensor]] = {}
        self._held: dict[str, list[Tensor]] = {}
        self._seen: dict[str, list[Tensor]] = {}
        for module in self._model.modules():
            if isinstance(module, BATCH_NORMS):
                module.eval()  # statistics of the disturbed batch would undo most of the disturbance
        self._disturbed: Mapping[str, Iterable[int]] = {}
        self._strength, self._noise = 0.0, torch.Generator()
        for name, module in self._layers.items():
            module.register_forward_hook(self._hook(name))
        self._run()
        self._held, self._baseline = self._seen, self._read

    def _run(self) -> None:
        self._read, self._seen = defaultdict(list), defaultdict(list)
        with torch.no_grad():
            call(self._model, self._inputs)

    def _hook(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor | None:
            i = len(self._seen[name])
            self._read[name].append(args[0].clone())
            self._seen[name].append(output.clone())
            if not self._held:
                return None
            held = output if is_depthwise(module) else self._held[name][i].clone()
            strength = self._strength * max(1.0, float(held.std()))
            for channel in self._disturbed.get(name, ()):
                disturbed = held.select(channel_axis(module, held), channel)
                noise = torch.randn(disturbed.shape, dtype=disturbed.dtype, generator=self._noise)
                disturbed += strength * noise
            return held

        return hook

    def readers(self, neurons: Mapping[str, Iterable[int]], draws: int = 1) -> dict[str, set[int]]:
        """Input channels, by layer, that move with these output channels; depthwise layers are no readers."""
        found: defaultdict[str, set[int]] = defaultdict(set)
        self._disturbed = neurons
        for draw, self._strength in itertools.product(range(draws), (20.0, -20.0)):  # a ReLU hides one of them
            self._noise.manual_seed(draw)
            self._run()
            for reader, module in self._layers.items():
                if is_depthwise(module):
                    continue
                for before, after in zip(self._baseline.get(reader, []), self._read[reader], strict=True):
                    different = (before != after).movedim(channel_axis(module, before), 0).flatten(1).any(1)
                    found[reader] |= set(different.nonzero().flatten().tolist())
        return found

    def empty(self, draws: int = 1) -> dict[str, set[int]]:
        """Input channels, by layer, that are zero whatever the neurons do: padding."""
        moving = self.readers({name: range(widths_of(module)[1]) for name, module in self._layers.items()}, draws)
        found = {}
        for name, module in self._layers.items():  # no call: nothing but zeros, and nothing moves
            zero = torch.ones(widths_of(module)[0], dtype=torch.bool)
            for x in self._baseline.get(name, []):
                zero &= (x == 0).movedim(channel_axis(module, x), 0).flatten(1).all(1)
            found[name] = set(zero.nonzero().flatten().tolist()) - moving[name]
        return found


def removed_outputs(model: nn.Module, layers: Mapping[str, Mapping[str, Tensor]]) -> dict[str, list[int]]:
    """Output channels of the dense model's layers that the manifest does not keep."""
    modules = layers_of(model)
    found = {}
    for name, entry in layers.items():
        if name in modules:
            found[name] = sorted(set(range(widths_of(modules[name])[1])) - set(entry["out"].tolist()))
    return found


def removed_inputs(
    model: nn.Module, inputs: Any, removed: Mapping[str, Iterable[int]], draws: int = 1
) -> dict[str, set[int]]:
    """Input channels, by layer, that removed neurons feed; no neuron that stays may feed them as well."""
    probe = Probe(model, inputs)
    stay = {n: set(range(widths_of(module)[1])) - set(removed.get(n, ())) for n, module in layers_of(model).items()}
    gone, read_on = probe.readers(removed, draws), probe.readers(stay, draws)
    for reader, columns in gone.items():
        assert not columns & read_on[reader], f"{reader} would lose inputs fed by neurons that stay"
    return {reader: columns for reader, columns in gone.items() if columns}


@torch.no_grad()
def masked(model: nn.Module, columns: Mapping[str, Iterable[int]]) -> nn.Module:
    """Copy the dense model and set to zero the weights by which layers read these input channels."""
    model = copy.deepcopy(model)
    for name, module in layers_of(model).items():
        for column in columns.get(name, ()):
            if isinstance(module, TRANSPOSED):
                module.weight[column] = 0
                continue
            groups = getattr(module, "groups", 1)
            per_group, rows = module.weight.shape[1], len(module.weight) // groups
            group, position = divmod(column, per_group)
            module.weight[group * rows : (group + 1) * rows, position] = 0
    return model


def outputs_of(model: nn.Module, inputs: Any) -> list[Tensor]:
    """Tensors that the model returns, on a copy so that no running statistic moves."""
    with torch.no_grad():
        result = call(copy.deepcopy(model), inputs)
    if isinstance(result, dict):
        return list(result.values())
    return list(result) if isinstance(result, tuple) else [result]


def distance(a: list[Tensor], b: list[Tensor]) -> float:
    """Largest difference relative to the size of ``b``."""
    assert [t.shape for t in a] == [t.shape for t in b]
    return max(float((s - t).abs().max() / t.abs().max()) for s, t in zip(a, b, strict=True))


def random_gradients(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int = 0) -> None:
    """Step on random gradients, so that which neurons go has nothing to do with which matter."""
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        if p.requires_grad:
            p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)
    optimizer.step()
    optimizer.zero_grad()


def pruner_for(model: nn.Module, inputs: Any, *, target: float = 0.4, events: int = 1, **options: Any) -> NeuronPruner:
    """Return a pruner with an optimizer that leaves the weights where they are."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)
    options = {"pace": "linear", **options}
    return NeuronPruner(model, optimizer, inputs, target=target, start=1, every=1, events=events, **options)


def prune_at_random(pruner: NeuronPruner, model: nn.Module, seed: int = 0) -> None:
    """Let one event pass."""
    random_gradients(model, pruner._optimizer, seed)
    report = pruner.step()
    assert report, report.reason


def assert_unlike(expected: list[Tensor], whole: list[Tensor], found: list[Tensor], least: float = 1e-3) -> None:
    """Assert that the pruned model's outputs are the masked one's, and that the mask changes the dense one's."""
    assert distance(expected, whole) >= least, "the mask changes nothing, so the comparison means nothing"
    assert distance(found, expected) < 1e-9


def assert_exact(
    dense: nn.Module, pruned: nn.Module, manifest: Mapping[str, Any], inputs: Any, least: float = 1e-3
) -> None:
    """Assert that the pruned model computes what the dense one does without what was removed, and that it matters."""
    try:
        _assert_exact(dense, pruned, manifest, inputs, least, draws=1)
    except AssertionError:  # a norm and a ReLU may hide an input from few disturbances, but hardly from many
        _assert_exact(dense, pruned, manifest, inputs, least, draws=16)


def _assert_exact(
    dense: nn.Module, pruned: nn.Module, manifest: Mapping[str, Any], inputs: Any, least: float, draws: int
) -> None:
    removed = removed_outputs(dense, manifest["layers"])
    columns = removed_inputs(dense, inputs, removed, draws)
    reference, empty = masked(dense, columns), Probe(dense, inputs).empty(draws)
    for name, module in layers_of(dense).items():
        if name in manifest["layers"] and not is_depthwise(module):
            kept = set(range(widths_of(module)[0])) - columns.get(name, set())
            found = set(manifest["layers"][name]["in"].tolist())
            assert found | empty[name] == kept | empty[name], f"{name} reads other channels than it should"
    for training in (False, True):
        assert_unlike(*(outputs_of(m.train(training), inputs) for m in (reference, dense, pruned)), least)
