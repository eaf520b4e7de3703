"""The cut: modules, parameters, gradients and optimizer state lose the same channels, or nothing changes.

``torch.utils.swap_tensors`` puts the smaller tensor into the very Parameter that optimizer, user and module hold.
Everything is computed before anything is swapped, and what was swapped can be swapped back.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from kfac_flat.attention import FewerHeadsAttention
from kfac_flat.changes import Change, make_all, setting, updating
from kfac_flat.pruning import layers
from kfac_flat.pruning.errors import CutError
from kfac_flat.structure import Kept

# Which positions stay along which axes of a tensor.
Selection: TypeAlias = dict[int, Tensor]

# Entries from which on one axis after the other takes longer than both at once: for the memory in between.
_LARGE = 2**22


@dataclass(frozen=True)
class ModuleCut:
    """What a module becomes: the selection of each of its tensors, by name, and its new attributes."""

    tensors: dict[str, Selection]
    attributes: dict[str, Any]


def module_cut(module: nn.Module | layers.SizeAttribute, kept: Kept) -> ModuleCut:
    """Work out what keeping some channels means for a module.

    Raises:
        CutError: if the module has no rule, or a grouped convolution would get groups of unequal size.
    """
    inputs, outputs = kept.inputs, kept.outputs
    if isinstance(module, layers.SizeAttribute):
        return ModuleCut({}, {module.name: len(outputs)})
    if isinstance(module, nn.MultiheadAttention):
        return _attention_cut(module, kept)
    if isinstance(module, nn.Linear):
        return ModuleCut(
            {"weight": {0: outputs, 1: inputs}, "bias": {0: outputs}},
            {"in_features": len(inputs), "out_features": len(outputs)},
        )
    if isinstance(module, nn.PReLU):
        return ModuleCut({"weight": {0: outputs}}, {"num_parameters": len(outputs)})
    if isinstance(module, nn.GroupNorm):
        groups = _whole_blocks(outputs, module.num_channels // module.num_groups, f"groups of {module}")
        return ModuleCut(
            {"weight": {0: outputs}, "bias": {0: outputs}}, {"num_channels": len(outputs), "num_groups": len(groups)}
        )
    if isinstance(module, (*layers.BATCH_NORMS, *layers.INSTANCE_NORMS)):
        names = ("weight", "bias", "running_mean", "running_var")
        return ModuleCut({name: {0: outputs} for name in names}, {"num_features": len(outputs)})
    if isinstance(module, layers.TRANSPOSED):
        return ModuleCut(
            {"weight": {0: inputs, 1: outputs}, "bias": {0: outputs}},
            {"in_channels": len(inputs), "out_channels": len(outputs)},
        )
    if isinstance(module, layers.CONVS):
        attributes = {"in_channels": len(inputs), "out_channels": len(outputs)}
        if layers.is_depthwise(module):
            return ModuleCut({"weight": {0: outputs}, "bias": {0: outputs}}, attributes | {"groups": len(inputs)})
        per_group = module.in_channels // module.groups
        columns = inputs[inputs < per_group]
        if not torch.equal(torch.cat([columns + g * per_group for g in range(module.groups)]), inputs):
            raise CutError(f"the groups of {module} would lose different input channels, and they must stay alike")
        if len(outputs) % module.groups:
            raise CutError(f"the groups of {module} would have outputs of unequal number, and they must stay alike")
        return ModuleCut({"weight": {0: outputs, 1: columns}, "bias": {0: outputs}}, attributes)
    raise CutError(f"{type(module).__name__} has no rule for cutting")


def _attention_cut(module: nn.MultiheadAttention, kept: Kept) -> ModuleCut:
    """Remove heads, the same of query, key and value, or input features."""
    heads = _whole_blocks(kept.outputs, module.head_dim, f"heads of {module}")
    per_projection = module.in_proj_weight.shape[0] // (3 * module.head_dim)
    if not torch.equal(torch.cat([heads[heads < per_projection] + i * per_projection for i in range(3)]), heads):
        raise CutError(f"query, key and value of {module} would lose different heads")
    width = len(kept.inputs)
    return ModuleCut(
        {"in_proj_weight": {0: kept.outputs, 1: kept.inputs}, "in_proj_bias": {0: kept.outputs}},
        {
            "__class__": FewerHeadsAttention,
            "num_heads": len(heads) // 3,
            **dict.fromkeys(("embed_dim", "kdim", "vdim"), width),
        },
    )


def _whole_blocks(positions: Tensor, length: int, what: str) -> Tensor:
    """Return which blocks of this many channels the positions consist of.

    Raises:
        CutError: if some block is there only in part.
    """
    blocks = positions[::length] // length
    if not torch.equal((blocks[:, None] * length + torch.arange(length)).flatten(), positions):
        raise CutError(f"{what} would be cut in part, and can only go as a whole")
    return blocks


def select(t: Tensor, selection: Selection) -> Tensor:
    """Return a copy of ``t`` with only the selected positions, in the same memory format, without a graph."""
    kept = {dim: index.to(t.device) for dim, index in selection.items() if len(index) < t.shape[dim]}
    selected = t.detach()
    if kept.keys() == {0, 1} and t.numel() > _LARGE:
        selected = selected[kept[0][:, None], kept[1]]
    else:
        for dim, index in kept.items():
            selected = selected.index_select(dim, index)
    # An axis of length one shares its stride with another one, which comes first.
    in_memory = sorted(range(t.dim()), key=lambda d: (t.stride(d), t.shape[d], -d), reverse=True)
    if in_memory == sorted(in_memory) and selected.shape != t.shape:
        return selected  # index_select has made it so
    dense = selected.permute(in_memory).clone(memory_format=torch.contiguous_format)
    return dense.permute([in_memory.index(d) for d in range(t.dim())])


def _swap(a: Tensor, b: Tensor) -> None:
    torch.utils.swap_tensors(a, b)  # type: ignore[no-untyped-call]


def replacement(t: Tensor, new: Tensor, gradient: Tensor | None) -> Tensor:
    """Make a tensor with other values and gradient that can take the place of ``t``: same class, flags and hooks."""
    if isinstance(t, nn.Parameter):
        if type(new) is Tensor:
            new = Tensor._make_subclass(type(t), new, t.requires_grad)
        else:  # a tensor class of its own, which Parameter marks as one
            new = nn.Parameter(new, t.requires_grad)
        if hasattr(t, "grad_dtype"):  # not in every version of torch
            new.grad_dtype = t.grad_dtype
        new.grad = gradient
    vars(new).update(vars(t) | vars(new))  # a tensor class may keep what it holds in attributes
    for hooks in ("_backward_hooks", "_post_accumulate_grad_hooks"):
        if getattr(t, hooks, None):
            setattr(new, hooks, getattr(t, hooks))
    return new


def exchange(t: Tensor, new: Tensor, name: str) -> Change:
    """Put what ``new`` holds into the very object ``t``.

    Raises:
        CutError: when it is made, if torch refuses.
    """
    before: int = t._cdata

    def make() -> None:
        try:
            _swap(t, new)
        except RuntimeError as error:
            raise CutError(
                f"{name} cannot be cut while something else holds it. Most likely the result of a forward "
                "pass is still alive whose backward has not been run: run it, delete the result, or compute it under "
                "torch.no_grad(). A DistributedDataParallel lets go of it within kfac_flat.rewrap(wrapper) "
                f"({error})"
            ) from error

    def take_back() -> None:
        if t._cdata != before:
            # Not the tensor swapped out, but another one on its memory: torch lets no later backward use the former.
            again = replacement(new, new.detach(), new.grad)
            vars(again).update(vars(new))
            _swap(t, again)

    return Change(make, take_back)


def difference(model: nn.Module, other: nn.Module) -> str:
    """Say where the structure of two models differs: their modules, the channels and the shapes; empty if nowhere."""
    modules, others = dict(model.named_modules()), dict(other.named_modules())
    if modules.keys() != others.keys():
        return f"only one of them has {min(modules.keys() ^ others.keys())!r}"
    for name, module in modules.items():
        ours, theirs = _structure(module), _structure(others[name])
        if ours != theirs:
            return f"{name or 'the model'} is {theirs} and not {ours}"
    return ""


def _structure(module: nn.Module) -> str:
    """Describe what of a module matters to a cut."""
    channels = "{} to {} channels, ".format(*layers.channel_counts(module)) if layers.has_channels(module) else ""
    tensors = {**module._parameters, **module._buffers}
    shapes = ", ".join(f"{name} {list(t.shape)}" for name, t in tensors.items() if t is not None)
    return f"a {type(module).__name__} ({channels}{shapes or 'no tensors'})"


class Surgery:
    """A prepared cut of a model and of what follows it.

    Args:
        model: The model.
        kept: What remains of each module that loses channels, by name.
        optimizer: Whose state for the parameters is cut along.
        copies: Models of the same structure that are cut alike.

    Attributes:
        changes: All that it consists of, to be made together.
        attributes: Modules and their new attributes.
        selections: What is kept of each tensor.
        names: What each of them is called.

    Raises:
        CutError: if it cannot be done; nothing has been changed.
    """

    @torch.inference_mode(False)  # a tensor made there can never be trained again
    def __init__(
        self,
        model: nn.Module,
        kept: Mapping[str, Kept],
        optimizer: Optimizer | None = None,
        copies: Sequence[nn.Module] = (),
    ) -> None:
        self.attributes: list[tuple[nn.Module, dict[str, Any]]] = []
        self.selections: dict[Tensor, Selection] = {}
        self.names: dict[Tensor, str] = {}
        self._plan(model, kept)
        for i, copied in enumerate(copies):
            different = difference(model, copied)
            if different:
                raise CutError(f"copies[{i}] is no copy of the model any more: {different}")
            self._plan(copied, kept, f" of copies[{i}]")
        self._check_weak_references()
        self.changes = [*self._exchanges(), *(setting(module, values) for module, values in self.attributes)]
        if optimizer is not None:
            for _, state, selections in self.states(optimizer):
                self.changes.append(updating(state, {k: select(state[k], s) for k, s in selections.items()}))
        follow = getattr(optimizer, "prepare_cut", None)
        if follow is not None:
            self.changes += follow(kept, self.like)

    def like(self, p: Tensor, t: Tensor) -> Tensor:
        """Cut a tensor of the shape of the parameter ``p`` as ``p`` itself will be."""
        return select(t, self.selections[p]) if p in self.selections else t

    @torch.inference_mode(False)
    def apply(self) -> None:
        """Make the cut, wholly or not at all.

        Raises:
            CutError: if torch refuses to exchange a tensor; everything is as before.
        """
        make_all(self.changes)

    def _exchanges(self) -> Iterator[Change]:
        for t, selection in self.selections.items():
            gradient = None if t.grad is None else select(t.grad, selection)
            yield exchange(t, replacement(t, select(t, selection), gradient), self.names[t])

    def _plan(self, model: nn.Module, kept: Mapping[str, Kept], where: str = "") -> None:
        """Note what the modules of a model become."""
        for name, keep in kept.items():
            part = layers.part(model, name)
            cut = module_cut(part, keep)
            module = part.module if isinstance(part, layers.SizeAttribute) else part
            self.attributes.append((module, cut.attributes))
            for tensor_name, selection in cut.tensors.items():
                t = getattr(module, tensor_name)
                if t is not None:
                    self.names.setdefault(t, f"{name}.{tensor_name}{where}")
                    self._note(t, selection)

    def _note(self, t: Tensor, selection: Selection) -> None:
        """Remember a tensor's selection; a tensor that two modules share must be asked for the same."""
        before = self.selections.setdefault(t, selection)
        if before.keys() != selection.keys() or any(not torch.equal(before[d], selection[d]) for d in before):
            raise CutError(f"{self.names[t]} is shared by modules that would keep different parts of it")

    def _check_weak_references(self) -> None:
        """Refuse early what torch would refuse in the middle."""
        for t, name in self.names.items():
            if weakref.getweakrefs(t):
                raise CutError(
                    f"{name} cannot be cut while something holds a weak reference to it: "
                    "drop that, or name the layer in ignore="
                )

    def states(self, optimizer: Optimizer) -> Iterator[tuple[Tensor, dict[str, Any], dict[str, Selection]]]:
        """Yield each parameter, the optimizer's state of it, and what of the state's entries is kept, by key.

        Parameters that stay whole are looked at too: what is kept with them may concern others that do not.

        Raises:
            CutError: if the state cannot be cut along.
        """
        for p, state in optimizer.state.items():
            if isinstance(p, Tensor):
                selections = {key: self._of_state(key, value, p) for key, value in state.items()}
                yield p, state, {key: selection for key, selection in selections.items() if selection}

    def _of_state(self, key: str, value: Any, p: Tensor) -> Selection:
        """Return what to keep of an entry of the parameter's shape, or of length one where it summarises an axis."""
        if (isinstance(value, Tensor) and value.dim() == 0) or not isinstance(value, (Tensor, list, tuple, dict)):
            return {}
        if isinstance(value, Tensor) and value.dim() == p.dim():
            sizes = list(zip(value.shape, p.shape, strict=True))
            if all(size in (1, full) for size, full in sizes):
                selection = self.selections.get(p, {})
                return {d: index for d, index in selection.items() if sizes[d][0] == sizes[d][1]}
        raise CutError(
            f"the optimizer keeps {key!r} for {self.names.get(p, 'a parameter')} in a form that cannot be cut along; "
            "choose an optimizer whose state has the parameters' shapes, or ignore the layer; "
            "to resume a run, load the pruner's state before the optimizer's"
        )


def shrink(model: nn.Module, manifest: Mapping[str, Any]) -> nn.Module:
    """Cut a fresh dense model to the shape that a manifest records, so that the pruned weights load into it.

    Args:
        model: The dense model; changed in place.
        manifest: What :meth:`NeuronPruner.state_dict` returned.

    Returns:
        The model.

    Raises:
        CutError: if the manifest does not fit the model; the model has not been changed.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> kept = {"0": {"in": torch.arange(4), "out": torch.tensor([0, 2])},
        ...         "2": {"in": torch.tensor([0, 2]), "out": torch.arange(2)}}
        >>> shrink(model, {"layers": kept})
        Sequential(
          (0): Linear(in_features=4, out_features=2, bias=True)
          (1): ReLU()
          (2): Linear(in_features=2, out_features=2, bias=True)
        )
    """
    if "layers" not in manifest:
        raise CutError('this is no manifest: it has no "layers", as NeuronPruner.state_dict() has')
    kept = {name: Kept(entry["in"].cpu(), entry["out"].cpu()) for name, entry in manifest["layers"].items()}
    for name, keep in kept.items():
        inputs, outputs = _counts(model, name)
        for what, positions, size in (("input", keep.inputs, inputs), ("output", keep.outputs, outputs)):
            if positions.dtype != torch.int64 or (positions.diff() <= 0).any() or (positions < 0).any():
                raise CutError(f"the manifest's {what} channels of {name} are no ascending int64 positions")
            if len(positions) and int(positions.max()) >= size:
                raise CutError(
                    f"{name} has {size} {what} channels, fewer than the manifest keeps: is it the dense model?"
                )
    Surgery(model, kept).apply()
    return model


def _counts(model: nn.Module, name: str) -> tuple[int, int]:
    """Number of channels of what the manifest calls by this name.

    Raises:
        CutError: if the model has none such.
    """
    try:
        part = layers.part(model, name)
    except AttributeError as error:
        raise CutError(f"the manifest names a module {name!r} that the model does not have") from error
    if isinstance(part, nn.Module) and not layers.has_channels(part):
        raise CutError(f"{name} ({type(part).__name__}) has no channels, but the manifest cuts it")
    return layers.channel_counts(part)
