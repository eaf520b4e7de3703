"""A network whose smaller self is built and filled by hand, knowing nothing of the library but which neurons went."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from kfac_flat import NeuronPruner
from tests.pruning.nets import conv, images

Widths: TypeAlias = dict[str, int]
WIDTHS: Widths = {"0": 6, "3": 8, "7": 7}
PIXELS = 9  # of each channel, when the last feature map is flattened
Make: TypeAlias = Callable[[Iterable[nn.Parameter]], Optimizer]


def network(widths: Mapping[str, int] = WIDTHS) -> nn.Sequential:
    """Return convolutions, BatchNorm, flattening and linear layers of these widths, by name."""
    a, b, c = (widths[name] for name in WIDTHS)
    return nn.Sequential(
        conv(2, a, bias=False), nn.BatchNorm2d(a), nn.ReLU(), conv(a, b), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(b * PIXELS, c), nn.Tanh(), nn.Linear(c, 3),
    )  # fmt: skip


@dataclass(frozen=True)
class Remaining:
    """The neurons that remain of the network's layers, by name."""

    neurons: dict[str, Tensor]

    @classmethod
    def after(cls, pruner: NeuronPruner) -> Remaining:
        """Read off the reports what has gone."""
        neurons = {}
        for name, width in WIDTHS.items():
            gone = {i for report in pruner.history for i in report.removed.get(name, torch.tensor([])).tolist()}
            neurons[name] = torch.tensor([i for i in range(width) if i not in gone])
        return cls(neurons)

    @property
    def widths(self) -> Widths:
        return {name: len(left) for name, left in self.neurons.items()}

    def along(self, name: str) -> tuple[Tensor | None, ...]:
        """Which entries remain along each axis of a parameter or buffer; None where all do."""
        a, b, c = self.neurons.values()
        module, _, which = name.partition(".")
        if module == "1" or which == "bias":
            return {"1": (a,), "3": (b,), "7": (c,), "9": (None,)}[module]
        flattened = (b[:, None] * PIXELS + torch.arange(PIXELS)).flatten()
        return {"0": (a, None), "3": (b, a), "7": (c, flattened), "9": (None, c)}[module]

    def of(self, name: str, t: Tensor) -> Tensor:
        """Cut a parameter, a buffer or what is kept for one; a single entry along an axis stands for the whole."""
        channels_last = t.dim() == 4 and t.is_contiguous(memory_format=torch.channels_last) and not t.is_contiguous()
        for dim, index in enumerate(self.along(name) if t.dim() else ()):
            if index is not None and t.shape[dim] > 1:
                t = t.index_select(dim, index)
        return t.clone(memory_format=torch.channels_last if channels_last else torch.contiguous_format)

    def of_all(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Cut the tensors of a model's state dict."""
        return {name: self.of(name, t) for name, t in tensors.items()}


@dataclass(frozen=True)
class Before:
    """Copies of all that a reference is made from, taken before a cut."""

    model: dict[str, Tensor]
    optimizer: dict[str, Any]
    gradients: dict[str, Tensor]
    names: list[str]  # of the optimizer's parameters, in its order

    @classmethod
    def of(cls, model: nn.Module, optimizer: Optimizer) -> Before:
        names = {id(p): name for name, p in model.named_parameters()}
        order = [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        return cls(*copy.deepcopy((dict(model.state_dict()), optimizer.state_dict(), gradients)), order)

    def optimizer_state(self, left: Remaining) -> dict[str, Any]:
        """Cut the optimizer's state dict."""
        cut = copy.deepcopy(self.optimizer)
        for number, state in cut["state"].items():
            state |= {k: left.of(self.names[number], t) for k, t in state.items() if isinstance(t, Tensor)}
        if "kfac_flat" in cut:
            cut["kfac_flat"] = self._curvature(cut["kfac_flat"], left)
        return cut

    def _curvature(self, own: dict[str, Any], left: Remaining) -> dict[str, Any]:
        for terms in ("mask_terms", "weight_terms"):
            columns = {layer: left.along(f"{layer}.weight")[1] for layer in own[terms]}
            own[terms] = {k: t if columns[k] is None else t[columns[k]] for k, t in own[terms].items()}
        own["outdated"] = True  # all layers are looked at next
        for layer, v in own["eigenvectors"].items():
            rows, columns = left.along(f"{layer}.weight")
            area = self.model[f"{layer}.weight"][0, 0].numel()
            A = v["A"].reshape(-1, area)
            A, G = A if columns is None else A[columns], v["G"] if rows is None else v["G"][:, rows]
            A = A.reshape(1, -1)
            own["eigenvectors"][layer] = {"A": A / A.norm(dim=1, keepdim=True), "G": G / G.norm(dim=1, keepdim=True)}
        return own


def batch(n: int = 12, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Return images of noise and labels."""
    return images(n).to(dtype), torch.arange(n) % 3


def train(model: nn.Module, optimizer: Optimizer, x: Tensor, y: Tensor, steps: int) -> list[float]:
    """Take some steps and return their losses."""
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def pruner_of(model: nn.Module, optimizer: Optimizer, x: Tensor, **options: Any) -> NeuronPruner:
    """Return a pruner that removes half of the neurons at its first step."""
    return NeuronPruner(model, optimizer, x, **{"target": 0.5, "start": 1, "every": 1, "events": 1, **options})


def assert_same_state(ours: Optimizer, theirs: Optimizer) -> int:
    """Assert that two optimizers keep the same for their parameters, bit for bit; returns how many tensors that is."""
    a, b = ours.state_dict(), theirs.state_dict()
    assert a["param_groups"] == b["param_groups"]
    assert a["state"].keys() == b["state"].keys()
    tensors = 0
    for number, state in a["state"].items():
        assert state.keys() == b["state"][number].keys()
        for key, value in state.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(b["state"][number][key])), (number, key)
            tensors += isinstance(value, Tensor) and value.dim() > 0
    return tensors


def assert_same_tensors(ours: nn.Module, theirs: nn.Module) -> None:
    """Assert that two models hold the same parameters and buffers, bit for bit and laid out alike."""
    a, b = ours.state_dict(), theirs.state_dict()
    assert a.keys() == b.keys()
    for name, t in a.items():
        assert t.dtype == b[name].dtype
        assert t.stride() == b[name].stride(), name
        assert torch.equal(t, b[name]), name
