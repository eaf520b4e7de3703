"""Which neurons must go together: groups of output channels tied by what reads and combines them.

The traced model runs on tensors without data, and the ids of neurons run along (``ids.py``, ``rules.py``). Two neurons
that meet in an addition are tied; a neuron that reaches the model's output, or an operation that no rule covers, is
frozen. The same run on a model that has been cut proves that every layer reads exactly the neurons it should; a cut
that is tried on a copy without data finds whatever the rules get wrong, before any real one is made.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from kfac_flat.pruning import layers, rules
from kfac_flat.pruning.collection import no_collection
from kfac_flat.pruning.errors import CutError
from kfac_flat.pruning.faithful import Results, first_difference
from kfac_flat.pruning.groups import Groups
from kfac_flat.pruning.ids import FIXED, components, fixed, membership, narrowed
from kfac_flat.pruning.propagation import OUTPUT_REASON, FailedAtError, Propagation, described
from kfac_flat.pruning.report import Size
from kfac_flat.pruning.rules import Place
from kfac_flat.pruning.surgery import Surgery
from kfac_flat.pruning.tracing import ExampleInputs, Program, UntraceableError, skeleton, trace, unseen, wiring
from kfac_flat.structure import Kept

UNCALLED_REASON = "is not called by itself: it is unused, or inside a module that is not looked into"
TOGETHER_REASON = "its neurons can only go all at once"


@dataclass(frozen=True)
class Channels:
    """The group of each channel of a module, :data:`FIXED` where it cannot go.

    Attributes:
        inputs: ``[C_in]``.
        outputs: ``[C_out]``.
    """

    inputs: Tensor
    outputs: Tensor


def without(channels: Mapping[str, Channels], gone: Tensor) -> dict[str, Channels]:
    """Return the channels that remain when these groups have left."""
    stays = _stays(channels, gone)
    return {name: Channels(c.inputs[stays[c.inputs]], c.outputs[stays[c.outputs]]) for name, c in channels.items()}


def kept_without(channels: Mapping[str, Channels], gone: Tensor) -> dict[str, Kept]:
    """Positions that remain when these groups have left, of each module that loses any."""
    stays, kept = _stays(channels, gone), {}
    for name, c in channels.items():
        inputs, outputs = (stays[ids].nonzero().flatten() for ids in (c.inputs, c.outputs))
        if len(inputs) < len(c.inputs) or len(outputs) < len(c.outputs):
            kept[name] = Kept(inputs, outputs)
    return kept


def _before_products(bare: nn.Module, program: Program) -> Iterator[Place]:
    """Yield the movements of data that lead to a product of activations with no layer in between."""
    leading: set[fx.Node] = set()
    for i, node in reversed(list(enumerate(program.graph.nodes))):
        target = bare.get_submodule(str(node.target)) if node.op == "call_module" else node.target
        rule = None if isinstance(target, nn.Module) and layers.has_channels(target) else rules.find(target)
        if rule in rules.PRODUCTS or (rule is not None and node in leading):
            leading.update(node.all_input_nodes)
            if node in leading and rule in rules.MOVES:
                yield program.training, i


def _stays(channels: Mapping[str, Channels], gone: Tensor) -> Tensor:
    """Return for each group whether it stays."""
    ids = (ids for c in channels.values() for ids in (c.inputs, c.outputs))
    return ~membership(gone, max((int(i.max()) for i in ids if len(i)), default=FIXED) + 1)


class NeuronGraph:
    """The groups of neurons of a model.

    Args:
        model: The model, free of wrappers. It is not changed, and not run but for submodules that cannot be traced.
        example_inputs: What it is called with; values do not matter.
        ignore: Modules whose neurons stay, by name, with the reason.
        whole: Modules whose parameters stay as they are, by name, with the reason.

    Attributes:
        channels: The groups of every module that has channels, by name; also those of numbers that modules hold and
            that follow the neurons, such as that of attention heads, by the module's name and the attribute's.
        producers: Names of the modules whose output channels are neurons: Linear and convolutions.
        hidden: Those whose outputs do not form the model's output.
        consumers: Those that read neurons; a depthwise convolution goes with what it reads.
        positions: How often each module's weight is applied for one example in eval mode, by name.
        macs: Multiply-accumulates of one example in eval mode.
        inputs: How the model is called.
        frozen: For each producer with neurons that cannot go, by name, the first reason.

    Raises:
        ValueError: if the model cannot be traced or does not run on the example inputs.
    """

    @no_collection()
    def __init__(
        self,
        model: nn.Module,
        example_inputs: Any,
        ignore: Mapping[str, str] | None = None,
        whole: Mapping[str, str] | None = None,
    ) -> None:
        self.inputs = ExampleInputs.of(example_inputs)
        self._bare = skeleton(model)
        programs = trace(model, self._bare, self.inputs, rules.is_leaf)
        self._results = Results()
        self._check_traces(model, programs)
        alike = programs[True].same_as(programs[False], rules.keeps_shape)
        self._programs = {False: programs[False]} if alike else programs
        self._ignore, self._whole = dict(ignore or {}), self._within_opaque(programs[False]) | dict(whole or {})
        self._stuck: dict[Place, str] = {}  # operations that no rule gets right, found by trial
        # Where neurons are dealt out to rows that go whole: attention heads, as far as can be foreseen.
        self._whole_rows = {
            place for program in self._programs.values() for place in _before_products(self._bare, program)
        }
        self._numbers: dict[Place, Any] = {}  # what operations compute with, in the dense model
        self.positions: dict[str, float] = {}
        self.macs = 0
        self.channels, self.frozen = self._group()
        while (failure := self._try_cut()) is not None:
            if failure.place in self._stuck:
                raise ValueError(
                    f"{failure}, whichever neurons are cut: the model's code depends on the widths of its layers. "
                    "Name the layers concerned in ignore="
                )
            self._stuck[failure.place] = str(failure)
            self.channels, self.frozen = self._group()
        modules = {name: layers.part(model, name) for name in self.channels}
        self.producers = [name for name, module in modules.items() if layers.is_producer(module)]
        self.hidden = [name for name in self.producers if self.frozen.get(name) != OUTPUT_REASON]
        self._name_what_is_never_cut(model)
        self.consumers = [name for name in self.producers if not layers.is_depthwise(modules[name])]

    def _check_traces(self, model: nn.Module, programs: Mapping[bool, Program]) -> None:
        """Refuse a model whose code has not been followed as it runs, in either mode."""
        for program in programs.values():
            differs = first_difference(self._bare, program, self.inputs, self._results)
            if differs is not None:
                node = list(program.graph.nodes)[differs]
                raise ValueError(
                    f"{type(model).__name__}.forward does something else when it is traced by torch.fx, at or before "
                    f"{node.name} ({node.target}): let it not ask whether a value is a tensor (isinstance, hasattr, "
                    "is None), nor look sizes up in a dict or set; or move that part into a module of its own and "
                    "register a rule for it"
                )

    def _within_opaque(self, program: Program) -> dict[str, str]:
        """Name what submodules that are not looked into hold: even if it is called from elsewhere, they use it."""
        outer = {part: name for name in program.opaque for part in self._bare.get_submodule(name).modules()}
        return {
            name: f"is inside {outer[module]}, which is not looked into"
            for name, module in self._bare.named_modules()
            if outer.get(module, name) != name
        }

    def check_code(self, model: nn.Module) -> None:
        """See that no submodule has been given code since that tracing could not see.

        Raises:
            CutError: if one has.
        """
        for name, reason in unseen(model, self.inputs, rules.is_leaf).items():
            if name not in self._programs[False].opaque:
                raise CutError(
                    f"the model has changed since this pruner was made, at {name}: {reason}. Remove what has been "
                    "added, or make a new pruner"
                )

    def _name_what_is_never_cut(self, model: nn.Module) -> None:
        """Layers with weights that stay whole, because they have no rule or are never reached."""
        for name, module in model.named_modules():
            held = any(p is not None and p.dim() > 1 for p in module._parameters.values())
            computed = isinstance(getattr(module, "parametrizations", None), nn.ModuleDict)
            if name in self.channels or ".parametrizations." in name:
                continue
            if held and not name:  # the model itself has no name to go by
                own = (p for p, _ in module.named_parameters(recurse=False))
                self.frozen |= dict.fromkeys(own, "is a parameter of the model itself, which stays whole")
            elif held or computed:
                self.frozen.setdefault(name, f"{type(module).__name__} has no rule, or is not called as a module")

    def measure(self, model: nn.Module, channels: Mapping[str, Channels], gone: Tensor) -> Size:
        """Cut a skeleton of the model, prove that it can do without these groups, and return the size it would have.

        Raises:
            CutError: if a layer would read other neurons than it should, or the model would no longer run.
        """
        small, macs = self._cut_skeleton(model, channels, gone)
        remaining = without(channels, gone)
        neurons = sum(len(remaining[name].outputs) for name in self.hidden)
        return Size(neurons, sum(p.numel() for p in small.parameters()), macs)

    def _cut_skeleton(
        self, model: nn.Module, channels: Mapping[str, Channels], gone: Tensor, *, trial: bool = False
    ) -> tuple[nn.Module, int]:
        """Return a skeleton of the model that does without these groups, and its multiply-accumulates if asked to."""
        small = skeleton(model)
        Surgery(small, kept_without(channels, gone)).apply()
        return small, self._verify(small, without(channels, gone), trial)

    def _verify(self, pruned: nn.Module, channels: Mapping[str, Channels], trial: bool) -> int:
        """Prove on a skeleton that has been cut that each module reads exactly the neurons it should.

        The smaller model is traced anew, so that what its code makes of its own widths is seen as well, and the trace
        compared with the code. That is left out in a trial where the code asks for no size, nothing is counted either,
        and the verification of the real cut finds what may be left.

        Returns:
            Multiply-accumulates of one example in eval mode, biases and norms not counted; 0 in a trial.

        Raises:
            CutError: if a module reads others, or the model no longer runs or computes with other numbers.
        """
        macs, modules = 0, dict(pruned.named_modules())
        for training, dense in self._programs.items():
            try:
                small = Program.of(pruned, self.inputs, training, rules.is_leaf, dense.opaque)
            except UntraceableError as error:
                raise CutError(f"after the cut, the model cannot be traced: {error}") from error
            small.opaque = dense.opaque
            differs = first_difference(pruned, small, self.inputs, self._results) if small.asks or not trial else None
            if differs is not None:
                raise FailedAtError(
                    (training, differs), "what the code does around it depends on the number of neurons"
                )
            for i, (a, b) in enumerate(zip(dense.graph.nodes, small.graph.nodes, strict=False)):
                if (a.op, a.target) != (b.op, b.target):
                    raise FailedAtError(
                        (training, i), f"{described(a, modules)} is reached or not depending on the number of neurons"
                    )
                if wiring(a) != wiring(b):
                    raise FailedAtError(
                        (training, i), f"{described(a, modules)} reads what depends on the number of neurons"
                    )
            ran = self._run(pruned, small, _Verification(channels), self._numbers, counts=not trial and not training)
            macs = ran.flops // (2 * self.inputs.batch_size)  # eval mode comes last
        return macs

    def _run(
        self,
        bare: nn.Module,
        program: Program,
        table: rules.Table,
        expected: Mapping[Place, Any] | None = None,
        *,
        counts: bool,
    ) -> Propagation:
        """Run the ids of neurons through a skeleton."""
        propagation = Propagation(bare, program, table, self._stuck, self._whole_rows, expected, counts)
        with torch.no_grad():
            propagation.run(*self.inputs.arguments(bare.forward).values())
        return propagation

    def _group(self) -> tuple[dict[str, Channels], dict[str, str]]:
        """Collect who goes with whom; once more where it turns out that rows can only go as a whole."""
        while True:
            table = self._grouped()
            if table.heads <= self._whole_rows:
                return table.groups()
            self._whole_rows |= table.heads

    def _grouped(self) -> _Grouping:
        """Run the rules in every mode."""
        table = _Grouping(self._bare, self._whole)
        for program in self._programs.values():
            try:
                table.positions.clear()
                ran = self._run(self._bare, program, table, counts=not program.training)
            except FailedAtError as error:
                why = str(error).rstrip(".")
                raise ValueError(
                    f"the model does not run on example_inputs: {why}. Give what the model is called with: a tensor, "
                    "a tuple of positional or a dict of keyword arguments"
                ) from error
            self._numbers.update(ran.numbers)
            self.macs = ran.flops // (2 * self.inputs.batch_size)
        self.positions = {name: n / self.inputs.batch_size for name, n in table.positions.items()}  # eval came last
        for name, reason in self._ignore.items():
            if name in table.outputs:
                table.freeze(table.outputs[name], reason)
        return table

    def _try_cut(self) -> FailedAtError | None:
        """Cut a skeleton somehow and verify it; returns what went wrong, if anything did."""
        groups = Groups.of({name: c.outputs for name, c in self.channels.items()})
        gone = groups.about_half(torch.Generator().manual_seed(0))
        try:
            self._cut_skeleton(self._bare, self.channels, gone, trial=True)
        except FailedAtError as failure:
            return failure
        return None


class _Grouping(rules.Table):
    """Hands out ids and collects who is tied to whom."""

    def __init__(self, model: nn.Module, whole: Mapping[str, str]) -> None:
        self._model = model
        self._next = FIXED + 1
        self._ties: list[Tensor] = []
        self._reasons: dict[int, str] = {FIXED: "goes together with what is no neuron"}
        self._pinned = dict(whole)
        self._dealt: dict[Place, Tensor] = {}
        self.heads: set[Place] = set()
        self.inputs: dict[str, Tensor] = {}
        self.outputs: dict[str, Tensor] = {}
        self.positions: dict[str, float] = {}

    def tie(self, a: Tensor, b: Tensor) -> None:
        pairs = torch.unique(a.flatten() << 32 | b.flatten())  # each pair as one number: much faster than as columns
        self._ties.append(torch.stack([pairs >> 32, pairs & 0xFFFFFFFF]))

    def freeze(self, ids: Tensor, reason: str) -> None:
        (small,) = narrowed(ids)
        for i in torch.unique(small).tolist():
            self._reasons.setdefault(i, reason)

    def used_elsewhere(self, name: str) -> None:
        self._pinned.setdefault(name.rpartition(".")[0], f"{name} is used outside its module")

    def dealt(self, place: Place, ids: Tensor) -> None:
        self._dealt[place] = ids

    def contracted(self, ids: Tensor) -> None:
        (small,) = narrowed(ids)
        summed = membership(small.flatten(), self._next)
        self.heads |= {place for place, dealt in self._dealt.items() if summed[dealt].any()}

    def sized(self, attribute: str, ids: Tensor) -> None:
        self.inputs[attribute] = ids[:0]
        self.tie(self.outputs.setdefault(attribute, ids), ids)  # wherever it is a size, it is that of the same neurons

    def layer(self, name: str, module: nn.Module, inputs: Tensor, positions: float) -> Tensor:
        self.positions[name] = self.positions.get(name, 0) + positions
        if name in self.inputs:  # called again: position i reads, and is, the same neuron both times
            self.tie(self.inputs[name], inputs)
            return self.outputs[name]
        if layers.passes_channels(module):
            outputs = inputs
            if isinstance(module, nn.GroupNorm):  # only whole groups: the statistics of each are its own
                groups = inputs.reshape(module.num_groups, -1)
                self.tie(groups[:, :1].expand_as(groups), groups)
        else:
            size = layers.channel_counts(module)[1]
            outputs = torch.arange(self._next, self._next + size)
            self._next += size
            self._tie_groups(module, inputs, outputs)
        self.inputs[name], self.outputs[name] = inputs, outputs
        return outputs

    def _tie_groups(self, module: nn.Module, inputs: Tensor, outputs: Tensor) -> None:
        if isinstance(module, nn.MultiheadAttention):
            heads = outputs.reshape(3, -1, module.head_dim)
            self.tie(heads[:1, :, :1].expand_as(heads), heads)
            return
        groups = int(getattr(module, "groups", 1))
        if layers.is_depthwise(module):
            self.tie(outputs, inputs.repeat_interleave(len(outputs) // len(inputs)))
        elif groups > 1:  # every group loses the same ones, so that they stay of one size
            for ids in (inputs.reshape(groups, -1), outputs.reshape(groups, -1)):
                self.tie(ids[:1].expand_as(ids), ids)

    def groups(self) -> tuple[dict[str, Channels], dict[str, str]]:
        """Return the group of every channel, and why producers have frozen ones."""
        self._tie_shared_parameters()
        self._add_uncalled()
        for name, reason in self._pinned.items():
            if name in self.inputs:
                self.freeze(torch.cat([self.inputs[name], self.outputs[name]]), reason)
        labels = components(self._next, torch.cat([torch.zeros(2, 0, dtype=torch.long), *self._ties], 1))
        why: dict[int, str] = {}
        for i in sorted(self._reasons, key=lambda i: (self._reasons[i] != OUTPUT_REASON, i == FIXED, i)):
            why.setdefault(int(labels[i]), self._reasons[i])
        labels[torch.isin(labels, torch.tensor(list(why)))] *= -1  # negative: cannot go
        channels, frozen = {}, {}
        for name in self.inputs:
            inputs, outputs = labels[self.inputs[name]], labels[self.outputs[name]]
            channels[name] = Channels(inputs.clamp(min=FIXED), outputs.clamp(min=FIXED))
            if not layers.is_producer(layers.part(self._model, name)):
                continue
            stuck = outputs[outputs <= FIXED]
            if len(stuck):
                frozen[name] = why[-int(stuck[0])]
            elif len(outputs) > 1 and bool((outputs == outputs[0]).all()):
                frozen[name] = TOGETHER_REASON
        return channels, frozen

    def _add_uncalled(self) -> None:
        """A layer that is never called as such has neurons too, of which nothing is known: they stay."""
        for name, module in self._model.named_modules():
            if name not in self.inputs and layers.is_producer(module):
                inputs, outputs = layers.channel_counts(module)
                self.inputs[name] = fixed(torch.Size([inputs]))
                self.outputs[name] = torch.arange(self._next, self._next + outputs)
                self._next += outputs
                self._pinned.setdefault(name, UNCALLED_REASON)

    def _tie_shared_parameters(self) -> None:
        """Modules that share a parameter are cut alike; a parameter shared with a module unknown here is not cut."""
        holders: dict[int, list[str]] = {}
        for name, module in self._model.named_modules():
            for p in module._parameters.values():
                if p is not None:
                    holders.setdefault(id(p), []).append(name)
        for names in holders.values():
            known = [name for name in names if name in self.inputs]
            if len(known) < len(names):
                for name in known:
                    self._pinned.setdefault(name, f"shares a parameter with {(set(names) - set(known)).pop()}")
            for name in known[1:]:
                for ids in (self.inputs, self.outputs):
                    if ids[name].shape == ids[known[0]].shape:
                        self.tie(ids[known[0]], ids[name])
                    else:
                        self._pinned[name] = self._pinned[known[0]] = f"{name} and {known[0]} share a parameter"


class _Verification(rules.Table):
    """Knows what each layer of a cut model should read, and checks that it does."""

    def __init__(self, channels: Mapping[str, Channels]) -> None:
        self._channels = channels

    def tie(self, a: Tensor, b: Tensor) -> None:
        if not torch.equal(a.flatten(), b.flatten()):
            raise CutError("after a cut, different neurons would meet here")

    def freeze(self, ids: Tensor, reason: str) -> None:
        (small,) = narrowed(ids)
        if bool((small != FIXED).any()):
            raise CutError(reason)

    def is_layer(self, name: str) -> bool:
        return name in self._channels

    def layer(self, name: str, module: nn.Module, inputs: Tensor, positions: float) -> Tensor:
        if not torch.equal(self._channels[name].inputs, inputs):
            raise CutError("after a cut, it would read other neurons than it should")
        return self._channels[name].outputs
