"""EigenDamage: structured pruning in the Kronecker-factored eigenbasis [Wang et al., arXiv 1905.05934]."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from baselines.eigenbasis import BASES, CORE, Eigenbasis, Positions, RotatedLayer, channel_factors
from baselines.fisher import fisher_statistics
from kfac_flat import FlatKFAC
from kfac_flat.changes import Change, appending, make_all, setting, updating
from kfac_flat.curvature.kronecker import KroneckerProduct
from kfac_flat.curvature.layers import Layer, groups_of, input_factor, is_layer, output_factor, output_gradients
from kfac_flat.curvature.likelihood import Likelihood, resolve
from kfac_flat.curvature.radius import LayerData
from kfac_flat.curvature.twin import unread_modules
from kfac_flat.pruning.budget import Options, Ranking, Schedule
from kfac_flat.pruning.checks import check_kinds, check_shared, ignored, trained_elsewhere
from kfac_flat.pruning.errors import CutError
from kfac_flat.pruning.graph import UNCALLED_REASON, NeuronGraph
from kfac_flat.pruning.groups import Groups, Order
from kfac_flat.pruning.propagation import OUTPUT_REASON
from kfac_flat.pruning.report import PruneReport, Size
from kfac_flat.pruning.tracing import skeleton, without_data
from kfac_flat.structure import unwrap

SIDES = ("in", "out")
Value = TypeVar("Value")


@dataclass(frozen=True)
class _Reading:
    """What the data show of a layer: its eigenbasis and where it is applied."""

    basis: Eigenbasis
    positions: Positions


class EigenDamagePruner:
    """Replace layers by bottlenecks that leave out the directions that matter least, while training goes on.

    A direction is an eigenvector of the covariance of a layer's inputs (A) or of its output gradients (G), under the
    true Fisher in eval mode over ``data``. Its importance is twice the rise of the loss that the Kronecker-factored
    Fisher predicts when it goes; input and output directions of all layers compete under one threshold. A layer that
    loses some becomes a ``nn.Sequential`` of plain layers, ``project`` (kept input eigenvectors), ``core`` and
    ``restore`` (kept output eigenvectors, and the bias), of which a side that loses none has no projection. When it
    loses more later, the core is decomposed anew and the projections take the rotation up.

    What costs more than it saves is not done: of a layer's four forms (both projections, either one, none) that with
    the fewest parameters is taken, or multiply-accumulates where these are the budget, and the directions of a side
    without projection all stay. Layers that form the model's output stay whole, as in the authors' implementation, and
    so does what :attr:`frozen` names. Biases are not rotated, and a BatchNorm behind a layer stays as it is.

    It is stepped once an epoch like :class:`kfac_flat.NeuronPruner`, and its reports read alike; "neurons" are
    directions there, the widths ``name.in`` and ``name.out`` are a layer's input and output directions, and removed
    positions count from the smallest eigenvalue of the bases as they were before the removal.

    Weights that are rotated become new Parameters in the same parameter group, in the old one's place, with no
    optimizer state: momentum starts from zero. The bias stays the same Parameter and keeps its state. All this is for
    training in one process.

    Args:
        model: The model being trained.
        optimizer: Any torch optimizer over its parameters but :class:`kfac_flat.FlatKFAC`, which follows fixed layers.
        example_inputs: What the model is called with, as for :class:`kfac_flat.NeuronPruner`.
        data: Batches, as a DataLoader yields them; see ``baselines.fisher.fisher_statistics``. Of the same size as
            the example inputs.
        target: Share of the budget to remove in the end, in (0, 1).
        budget: What ``target`` is a share of: "parameters", "macs" or "neurons" (directions). With "neurons" it says
            how many lie below the threshold, as in the paper; as those that do not pay stay, fewer go.
        start: Epochs of training before the first removal.
        every: Epochs from one removal to the next.
        events: Number of removals.
        pace: "linear" or "cubic", as for :class:`kfac_flat.NeuronPruner`.
        max_step: Share of the directions of each side of a layer that go at most in one removal; None for 0.95 of a
            single removal and 0.5 of each of several, as in the paper.
        basis: Whether a convolution's input directions are those of its "channels" (projection 1 x 1, core with the
            kernel), or of its "patches" (projection with the kernel, core 1 x 1).
        ignore: Layers that stay: names (shell patterns allowed) or classes.
        likelihood: What the model's output means, as for :class:`kfac_flat.FlatKFAC`.
        seed: Of the labels drawn.

    Attributes:
        history: The reports of all :meth:`step` calls of this object, oldest first.

    Raises:
        TypeError: if ``model`` or ``optimizer`` is of another kind.
        ValueError: if an option is out of range, or the model cannot be traced or run.

    Example:
        >>> model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 3))
        >>> optimizer, data = torch.optim.SGD(model.parameters(), lr=0.1), [torch.randn(64, 16)]
        >>> pruner = EigenDamagePruner(model, optimizer, data[0], data, target=0.5, start=1, events=1)
        >>> report = pruner.step()
        >>> report.after.parameters <= report.before.parameters / 2
        True
        >>> isinstance(model[0], nn.Sequential)
        True
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        example_inputs: Any,
        data: Iterable[Any],
        *,
        target: float,
        budget: str = "parameters",
        start: int = 1,
        every: int = 1,
        events: int = 1,
        pace: str = "linear",
        max_step: float | None = None,
        basis: str = "channels",
        ignore: Iterable[str | type[nn.Module]] = (),
        likelihood: str | Likelihood = "categorical",
        seed: int = 0,
    ) -> None:
        self._schedule = Schedule(start, every, events, pace)
        if max_step is None:
            max_step = 0.95 if events == 1 else 0.5
        self._options = Options(target, budget, None, 1, 1.0, max_step, 1, Ranking())
        if self._options.times:
            raise ValueError('budget="latency" is not to be had here: choose "parameters", "macs" or "neurons"')
        if basis not in BASES:
            raise ValueError(f"basis={basis!r} must be one of {', '.join(map(repr, BASES))}")
        self._by_patch = basis == "patches"
        check_kinds(model, optimizer)
        if isinstance(optimizer, FlatKFAC):
            raise TypeError("EigenDamage replaces layers, which FlatKFAC does not follow: give a plain optimizer")
        self._model, self._optimizer = unwrap(model), optimizer
        check_shared(self._model, optimizer)
        self._data, self._likelihood, self._seed = data, resolve(likelihood), seed
        self._inputs = without_data(example_inputs)
        elsewhere, asked = trained_elsewhere(self._model, optimizer), ignored(self._model, ignore)
        graph = NeuronGraph(self._model, example_inputs)
        chosen = {name: reason for name, reason in (elsewhere | asked).items() if name in graph.producers}
        self._frozen = _stays(self._model, graph) | chosen
        self._layers: dict[str, RotatedLayer] = {
            name: RotatedLayer(module, by_patch=self._by_patch)
            for name, module in self._model.named_modules()
            if name in graph.producers and name not in self._frozen
        }
        self._outputs = graph.positions
        self._original = self._ranks
        self._dense = self._size = Size(self._directions, _count(self._model), graph.macs)
        self._epoch = self._event = 0
        self.history: list[PruneReport] = []

    # ---------------------------------------------------------------- reading

    @property
    def sparsity(self) -> float:
        """Directions removed so far / original directions."""
        return 1 - self._size.neurons / max(1, self._dense.neurons)

    @property
    def progress(self) -> float:
        """Share of the budget removed so far."""
        return 1 - self._options.amount(self._size) / max(1.0, self._options.amount(self._dense))

    @property
    def finished(self) -> bool:
        """Whether the target has been reached, or all events have passed."""
        return self._options.reached(self.progress) or self._event >= self._schedule.events

    @property
    def size(self) -> Size:
        """Directions, parameters and multiply-accumulates of the model as it is."""
        return self._size

    @property
    def frozen(self) -> dict[str, str]:
        """Layers that stay whole, by name, and why."""
        return dict(self._frozen)

    @property
    def widths(self) -> dict[str, int]:
        """Input and output directions of each layer that can lose any, by name."""
        return _by_side(self._ranks)

    @property
    def _ranks(self) -> dict[str, tuple[int, int]]:
        return {name: layer.present for name, layer in self._layers.items()}

    @property
    def _directions(self) -> int:
        return sum(map(sum, self._ranks.values()))

    # ---------------------------------------------------------------- stepping

    @torch.inference_mode(False)  # what is made there could never be trained
    def step(self) -> PruneReport:
        """End an epoch: replace layers if the schedule says so, and report.

        Raises:
            CutError: if it cannot be done; model, optimizer and pruner are as they were before the call.
            ValueError: if the data show nothing of the Fisher; likewise.
        """
        epoch = self._epoch + 1
        own: dict[str, Any] = {"_epoch": epoch}
        changes: list[Change] = []
        if self.finished:
            report = self._report(epoch, reason=self._options.why_finished(self.progress))
        elif not self._schedule.is_due(epoch):
            report = self._report(epoch, reason=f"the schedule has no removal at the end of epoch {epoch}")
        else:
            report, layers = self._choose(epoch)
            own["_event"] = self._event + 1
            if report:
                changes = self._replacing(layers, report.after)
        make_all([*changes, setting(self, own), appending(self.history, report)])
        return report

    def plan(self) -> PruneReport:
        """Tell what the next removal would do if it came now; nothing changes."""
        if self.finished:
            return self._report(self._epoch, reason=self._options.why_finished(self.progress))
        return self._choose(self._epoch)[0]

    def _choose(self, epoch: int) -> tuple[PruneReport, dict[str, RotatedLayer]]:
        """Choose the directions that go with the next event, and make the layers that do without them."""
        self._check_known()
        event = self._event + 1
        goal = self._options.goal(self._options.amount(self._dense), event, self._schedule.share(event))
        if self._options.amount(self._size) <= goal:
            return self._report(epoch, reason="an earlier removal took this one's share along"), {}
        seen, unread = self._read()
        order, sides = self._order(seen)
        gone = order.fewest(lambda some: self._amount(seen, sides, some) <= goal)
        chosen = self._chosen(seen, sides, gone)
        layers, removed = {}, dict[str, Tensor]()
        for name, kept in chosen.items():
            before = self._layers[name].present
            if tuple(map(len, kept)) != before:
                layers[name] = self._layers[name].without(seen[name].basis, *kept)
                lost = (torch.arange(d)[~torch.isin(torch.arange(d), k)] for d, k in zip(before, kept, strict=True))
                removed |= {side: gone for side, gone in _by_side({name: tuple(lost)}).items() if len(gone)}
        reasons = [f"{name} is not decomposed: {reason}" for name, reason in unread.items()]
        if not layers:
            return self._report(epoch, reason="; ".join(["nothing that can go would pay", *reasons])), {}
        after = self._measured(layers)
        if self._options.amount(after) > goal:
            reasons.append(
                "fewer directions went than were due: the others would not pay, or what is left is at its floor "
                f"({self._options})"
            )
        return self._report(epoch, layers, after, removed, "; ".join(reasons)), layers

    def _read(self) -> tuple[dict[str, _Reading], dict[str, str]]:
        """Read the Fisher of all layers, as they are now; and why some have none."""
        names = {(f"{n}.{CORE}" if self._is_rotated(n) else n): n for n in self._layers}
        found, unread = fisher_statistics(
            self._model, self._data, self._statistic, names, likelihood=self._likelihood, seed=self._seed
        )
        seen = {}
        for path, (A, G, reads, writes) in found.items():
            name = names[path]
            if writes != self._outputs[name]:
                raise ValueError(
                    f"{name} is applied at {writes:g} positions on the data and at {self._outputs[name]:g} on "
                    "example_inputs: give both the same size"
                )
            seen[name] = _Reading(Eigenbasis.of(KroneckerProduct(A, G)), Positions(float(reads), float(writes)))
        return seen, {names[path]: reason for path, reason in unread.items()}

    def _statistic(self, data: LayerData) -> list[Tensor]:
        factors = (
            (input_factor(data.layer, data.a)[0], output_factor(data.layer, data.g)[0])
            if self._by_patch
            else channel_factors(data)
        )
        reads = data.a[0, 0].numel() if isinstance(data.layer, nn.Conv2d) else data.a[0, ..., 0].numel()
        writes = output_gradients(data.layer, data.g).shape[-1]
        return [*factors, torch.tensor(reads), torch.tensor(writes)]

    def _order(self, seen: Mapping[str, _Reading]) -> tuple[Order, dict[str, tuple[Tensor, Tensor]]]:
        """Put all directions in the order in which they go, as far as the floors allow; and number them, by layer."""
        sides, scores, first = {}, [], 1
        for name, reading in seen.items():
            own = reading.basis.importances(self._layers[name].weight())
            between = first + len(own[0])
            sides[name] = torch.arange(first, between), torch.arange(between, first := between + len(own[1]))
            scores += [of_side.cpu() for of_side in own]
        groups = Groups.of(_by_side(sides))
        every = torch.cat(scores) if scores else torch.zeros(0, dtype=torch.float64)
        floors = self._options.floors(groups.widths, _by_side(self._original))
        return groups.order(every, torch.ones_like(every), floors=floors), sides

    def _chosen(
        self, seen: Mapping[str, _Reading], sides: Mapping[str, tuple[Tensor, Tensor]], gone: Tensor
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """Input and output directions that stay when these go, but for those that do not pay, by layer."""
        chosen = {}
        for name, both in sides.items():
            kept = [(~torch.isin(ids, gone)).nonzero().flatten() for ids in both]
            ranks = self._layers[name].cheapest(len(kept[0]), len(kept[1]), self._each(seen[name]))
            inputs, outputs = (k if len(k) == rank else torch.arange(rank) for k, rank in zip(kept, ranks, strict=True))
            chosen[name] = (inputs, outputs)
        return chosen

    def _amount(self, seen: Mapping[str, _Reading], sides: Mapping[str, tuple[Tensor, Tensor]], gone: Tensor) -> float:
        """What the model would be without these directions, in terms of the budget."""
        amount = self._options.amount(self._size)
        if self._options.budget == "neurons":
            return amount - len(gone)
        for name, (inputs, outputs) in self._chosen(seen, sides, gone).items():
            layer, each = self._layers[name], self._each(seen[name])
            amount += layer.cost(len(inputs), len(outputs), each) - layer.cost(*layer.present, each)
        return amount

    def _each(self, reading: _Reading) -> Positions:
        """What one weight costs."""
        return reading.positions if self._options.budget == "macs" else Positions(1, 1)

    def _measured(self, layers: Mapping[str, RotatedLayer]) -> Size:
        """Return the size of the model with these layers in place, found on a skeleton of it that is traced and run.

        Raises:
            CutError: if it cannot do with them.
        """
        small = skeleton(self._model)
        for name, layer in layers.items():
            small.set_submodule(name, skeleton(layer.module()))
        try:
            macs = NeuronGraph(small, self._inputs).macs
        except ValueError as error:
            raise CutError(
                f"the model cannot do with other modules in place of {', '.join(layers)}: {error}. "
                "Name those that its code looks into in ignore="
            ) from error
        ranks = self._ranks | {name: layer.present for name, layer in layers.items()}
        return Size(sum(map(sum, ranks.values())), _count(small), macs)

    def _replacing(self, layers: Mapping[str, RotatedLayer], size: Size) -> list[Change]:
        """Prepare to put these layers in place of the present ones, and their parameters into the optimizer."""
        changes: list[Change] = []
        exchanged: dict[nn.Parameter, Sequence[tuple[str, nn.Parameter]]] = {}
        for name, new in layers.items():
            old = self._layers[name]
            holder, _, attribute = name.rpartition(".")
            changes.append(setting(self._model.get_submodule(holder), {attribute: new.module()}))
            before, after = set(old.parameters().values()), new.parameters()
            exchanged |= dict.fromkeys(before - set(after.values()), ())
            made = [(f"{name}.{path}", p) for path, p in after.items() if p not in before]
            exchanged[old.parameters()[f"{CORE}.weight" if self._is_rotated(name) else "weight"]] = made
        changes += _regrouped(self._optimizer, exchanged)
        return [*changes, setting(self, {"_layers": self._layers | dict(layers), "_size": size})]

    def _is_rotated(self, name: str) -> bool:
        return self._layers[name].module() is not self._layers[name].core

    def _check_known(self) -> None:
        """See that the layers in the model are those that this pruner knows."""
        for name, layer in self._layers.items():
            own = dict(self._model.get_submodule(name).named_parameters())
            if {n: id(p) for n, p in own.items()} != {n: id(p) for n, p in layer.parameters().items()}:
                raise CutError(
                    f"{name} has been changed by something else: make a new pruner for the model as it is now"
                )

    def _report(
        self,
        epoch: int,
        layers: Mapping[str, RotatedLayer] | None = None,
        after: Size | None = None,
        removed: dict[str, Tensor] | None = None,
        reason: str = "",
    ) -> PruneReport:
        size = after or self._size
        ranks = self._ranks | {name: layer.present for name, layer in (layers or {}).items()}
        return PruneReport(
            epoch=epoch,
            widths_before=self.widths,
            widths_after=_by_side(ranks),
            before=self._size,
            after=size,
            sparsity=1 - size.neurons / max(1, self._dense.neurons),
            removed=removed or {},
            reason=reason,
            frozen=self.frozen,
        )

    # ---------------------------------------------------------------- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Return what is needed to go on, numbers and names; :func:`rotated` needs no more than ``["layers"]``."""
        return {
            "layers": {
                name: {"in": layer.present[0], "out": layer.present[1], "by_patch": layer.by_patch}
                for name, layer in self._layers.items()
            },
            "epoch": self._epoch,
            "event": self._event,
        }

    @torch.inference_mode(False)
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Give a fresh dense model the recorded shape and go on from there.

        Load the model's and the optimizer's own state dicts afterwards.

        Raises:
            CutError: if the state belongs to another model; nothing has changed.
        """
        layers = {
            name: layer
            for name, layer in _shaped(self._model, state_dict).items()
            if layer.present != self._layers[name].present
        }
        changes = self._replacing(layers, self._measured(layers)) if layers else []
        make_all([*changes, setting(self, {"_epoch": state_dict["epoch"], "_event": state_dict["event"]})])


def rotated(model: nn.Module, manifest: Mapping[str, Any]) -> nn.Module:
    """Give a fresh dense model the shape that a manifest records, so that the pruned weights load into it.

    Args:
        model: The dense model; changed in place.
        manifest: What :meth:`EigenDamagePruner.state_dict` returned.

    Returns:
        The model.

    Raises:
        CutError: if the manifest does not fit the model; the model has not been changed.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2))
        >>> rotated(model, {"layers": {"0": {"in": 3, "out": 6, "by_patch": False}}})
        Sequential(
          (0): Sequential(
            (project): Linear(in_features=8, out_features=3, bias=False)
            (core): Linear(in_features=3, out_features=6, bias=True)
          )
          (1): ReLU()
          (2): Linear(in_features=6, out_features=2, bias=True)
        )
    """
    for name, layer in _shaped(model, manifest).items():
        model.set_submodule(name, layer.module())
    return model


def _shaped(model: nn.Module, manifest: Mapping[str, Any]) -> dict[str, RotatedLayer]:
    """Make layers of the shapes that a manifest records; their weights mean nothing yet."""
    modules, layers = dict(model.named_modules()), {}
    for name, entry in manifest["layers"].items():
        module = modules.get(name)
        if module is None or not is_layer(module):
            raise CutError(
                f"the manifest names {name}, which is no Linear or Conv2d of this model: is it the dense one?"
            )
        layer = RotatedLayer(module, by_patch=entry["by_patch"])
        d_in, d_out = layer.present
        if not (0 < entry["in"] <= d_in and 0 < entry["out"] <= d_out):
            raise CutError(
                f"{name} has {d_in} and {d_out} directions, fewer than the manifest keeps: is it the dense one?"
            )
        kept = torch.arange(entry["in"]), torch.arange(entry["out"])
        layers[name] = layer.without(Eigenbasis.trivial(d_in, d_out), *kept)
    return layers


def _regrouped(
    optimizer: Optimizer, exchanged: Mapping[nn.Parameter, Sequence[tuple[str, nn.Parameter]]]
) -> Iterator[Change]:
    """Put parameters in place of others, in the same groups and without state."""
    for p in exchanged:
        if p in optimizer.state:
            yield _forgetting(optimizer.state, p)
    for group in optimizer.param_groups:
        if any(p in exchanged for p in group["params"]):
            names = group.get("param_names", [""] * len(group["params"]))
            pairs = [
                pair for name, p in zip(names, group["params"], strict=True) for pair in exchanged.get(p, [(name, p)])
            ]
            new: dict[str, Any] = {"params": [p for _, p in pairs]}
            if "param_names" in group:
                new["param_names"] = [name for name, _ in pairs]
            yield updating(group, new)


def _forgetting(state: dict[Any, Any], p: nn.Parameter) -> Change:
    """Drop the optimizer's state of a parameter."""
    kept = state[p]
    return Change(lambda: state.pop(p, None), lambda: state.update({p: kept}))


def _stays(model: nn.Module, graph: NeuronGraph) -> dict[str, str]:
    """Layers that cannot be replaced, by name, and why."""
    stays = dict(unread_modules(model))
    paths = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    holders = Counter(id(p) for m in model.modules() for p in m._parameters.values() if p is not None)
    for name, module in model.named_modules():
        if not is_layer(module):
            continue
        layer: Layer = module
        if not name:
            stays["the model"] = "is a layer itself, which nothing holds that could hold another"
        elif name not in graph.positions:
            stays[name] = UNCALLED_REASON
        elif groups_of(layer) > 1:
            stays[name] = "is a grouped convolution, of which each group would need a basis of its own"
        elif graph.frozen.get(name) == OUTPUT_REASON:
            stays[name] = OUTPUT_REASON
        elif "weight" not in layer._parameters or layer._forward_hooks or layer._forward_pre_hooks:
            stays[name] = "has a weight that is computed, or hooks, which would be lost"
        elif paths[id(layer)] > 1 or any(holders[id(p)] > 1 for p in layer.parameters()):
            stays[name] = "is shared, or shares a parameter"
    return stays


def _by_side(of_layers: Mapping[str, tuple[Value, ...]]) -> dict[str, Value]:
    """Name what belongs to the inputs and to the outputs of each layer."""
    return {f"{name}.{side}": v for name, both in of_layers.items() for side, v in zip(SIDES, both, strict=True)}


def _count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())
