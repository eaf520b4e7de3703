"""The twin: a copy of the model that shares its parameters and on which the curvature is read.

``loss.backward(); optimizer.step()`` leaves no graph to differentiate a second time, and BackPACK's hooks on the user's
own model would cost time at every step and break on in-place operations, compilation and copies. The twin has the same
modules and the very same Parameter objects, but buffers of its own and none of the user's hooks; so whatever it
does, gradients taken on it are gradients of the user's parameters and nothing else of the user's model changes.
"""

from __future__ import annotations

import contextlib
import fnmatch
import functools
import sys
import threading
import types
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, TypeAlias

import torch
from backpack import backpack, hook_run_extensions, hook_store_io
from backpack.context import CTX
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import checkpoint

from kfac_flat.attention import PROJECTIONS, call_projections, is_attention, projection_parameters, projections
from kfac_flat.curvature.extension import LayerDataExtension
from kfac_flat.curvature.layers import Layer, is_layer
from kfac_flat.curvature.radius import LayerData
from kfac_flat.nested import batch_size, map_tensors
from kfac_flat.structure import structural_copy

# BackPACK keeps what is active in a global place, so one backward pass over twins at a time.
BACKPACK = threading.RLock()

Conditions: TypeAlias = Callable[[], contextlib.AbstractContextManager[None]]


class UnreadableError(RuntimeError):
    """A layer has no single input and output gradient in this forward pass.

    Args:
        layer: The layer.
        reason: Why not.
    """

    def __init__(self, layer: nn.Module, reason: str) -> None:
        super().__init__(reason)
        self.layer = layer


class Twin:
    """A parameter-sharing copy of a model, read layer by layer.

    Args:
        model: The user's model.
        names: Names of the layers to read, as :func:`layer_names` gives them.

    Raises:
        TypeError: if the model's structure cannot be copied.
    """

    def __init__(self, model: nn.Module, names: Iterable[str]) -> None:
        self._original = model
        self._fingerprint = _fingerprint(model)
        self.model = structural_copy(model, lambda t: t if isinstance(t, nn.Parameter) else t.detach().clone())
        self._pairs = list(zip(model.modules(), self.model.modules(), strict=True))
        for module in list(self.model.modules()):
            if is_attention(module):
                call_projections(module)
        self.layers: dict[str, Layer] = {name: self.model.get_submodule(name) for name in names}  # type: ignore[misc]
        for layer in self.layers.values():
            layer.__class__ = _probed(type(layer))  # type: ignore[assignment, arg-type]
        self._extension = LayerDataExtension({type(layer) for layer in self.layers.values()})

    @classmethod
    def current(cls, twin: Twin | None, model: nn.Module, names: Iterable[str]) -> Twin:
        """Return a twin that was made before if the model has not changed since, otherwise a new one."""
        return twin if twin is not None and twin.is_current() else cls(model, names)

    def is_current(self) -> bool:
        """Tell whether the model still has the parameters and buffers that the twin was made from."""
        return self._fingerprint == _fingerprint(self._original)

    def read(
        self,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        loss: Callable[[Any], Tensor],
        *,
        create_graph: bool,
        only: Collection[str] | None = None,
        conditions: Conditions = contextlib.nullcontext,
    ) -> dict[str, LayerData]:
        """Run the twin on a batch and read its layers, as far as the loss depends on them.

        Args:
            args: Positional arguments of the model's forward.
            kwargs: Keyword arguments of it.
            loss: From the model's output to the losses of the examples, ``[N]``, or to their SUM, a scalar; N is then
                the length of the first axis of the output.
            create_graph: Whether the data are to be differentiated.
            only: Names of the layers to read; None for all. The backward pass goes no deeper than these.
            conditions: Makes the context, of randomness and precision, that the forward pass runs in.

        Returns:
            The data of each layer that took part, by name.

        Raises:
            UnreadableError: if a layer is used more than once, or differentiated within the forward pass.
        """
        # Fused attention has no second derivative, the plain one does.
        with self._left_clean(), BACKPACK, torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), ExitStack() as hooks:
            wanted = {name: layer for name, layer in self.layers.items() if only is None or name in only}
            for layer in wanted.values():
                hooks.enter_context(layer.register_forward_hook(hook_store_io))
                hooks.enter_context(layer.register_full_backward_hook(_run_extensions))
                vars(layer)["_is_read"] = True
            output, losses = self.run(args, kwargs, loss, conditions)
            targets = [probe for layer in wanted.values() for probe in vars(layer).get("_probes", ())]
            self._backward(losses.sum(), targets, create_graph)
            found = {name: self._extension.collect(layer) for name, layer in wanted.items()}
        examples = len(losses) if losses.dim() else batch_size(output) or None
        return {name: replace(data, examples=examples) for name, data in found.items() if data is not None}

    def output(
        self,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        conditions: Conditions = contextlib.nullcontext,
        *,
        graph: bool = False,
    ) -> Any:
        """Run the twin on a batch, all arguments as for :meth:`read`, and return its output, without a graph.

        Args:
            args: Positional arguments of the model's forward.
            kwargs: Keyword arguments of it.
            conditions: Makes the context, of randomness and precision, that the forward pass runs in.
            graph: Whether there is one while it runs, without which some models compute something else.
        """
        with self._left_clean(), BACKPACK:
            output, _ = self.run(args, kwargs, lambda _: torch.zeros(()), conditions, graph=graph)
        return map_tensors(Tensor.detach, output)

    def run(
        self,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        loss: Callable[[Any], Tensor],
        conditions: Conditions = contextlib.nullcontext,
        *,
        graph: bool = True,
    ) -> tuple[Any, Tensor]:
        """Run the twin on a batch, all arguments as for :meth:`read`; returns output and loss, with graphs or not."""
        args, kwargs = map_tensors(torch.clone, (args, dict(kwargs)))  # the model may work in place
        with torch.set_grad_enabled(graph), _uncompiled(), _without_checkpoints():
            self._follow()
            with conditions():
                output = self.model(*args, **kwargs)
                return output, loss(output)

    @contextlib.contextmanager
    def _left_clean(self) -> Iterator[None]:
        """Let go of what a pass leaves on the twin, so that no graph outlives it."""
        try:
            yield
        finally:
            for layer in self.layers.values():
                self._extension.collect(layer)
                for leftover in ("_is_read", "_probes", "input0", "output"):
                    vars(layer).pop(leftover, None)
                # Part of a parameter, which could not be swapped for a smaller one while this refers to it.
                vars(layer).update({key: t.detach() for key, t in vars(layer).items() if isinstance(t, Tensor)})
            for _, twin in self._pairs:  # what the model has kept to itself would keep the graph
                kept = [(k, v) for k, v in _attributes(twin) if not _is_setting(v) and _holds_data(v)]
                vars(twin).update((k, map_tensors(Tensor.detach, v)) for k, v in kept)

    def _backward(self, total: Tensor, targets: list[Tensor], create_graph: bool) -> None:
        """Let the gradient flow past every layer, computing no weight gradient but where nothing else leads there."""
        if not targets or not total.requires_grad:
            return
        with backpack(self._extension), quiet_hooks():
            torch.autograd.grad(total, targets, create_graph=create_graph, allow_unused=True)

    @torch.no_grad()
    def _follow(self) -> None:
        """Take over flags and settings that may have changed since, and the values of the buffers."""
        for original, twin in self._pairs:
            own = vars(twin)
            for key, value in _attributes(original):
                if _is_setting(value):
                    own[key] = value
                elif _holds_data(value):
                    own[key] = map_tensors(_copy, value)
            if "inplace" in own:
                own["inplace"] = False  # BackPACK's hooks forbid in-place ops on a layer's output
            for name, buffer in original._buffers.items():
                if buffer is not None:
                    twin._buffers[name].copy_(buffer)  # type: ignore[union-attr]


def _uncompiled() -> contextlib.AbstractContextManager[None]:
    """Run parts of a model that are compiled as they were written: compiled, they have no second derivative."""
    if "torch._dynamo" not in sys.modules:  # which takes seconds to import, and nothing is compiled without
        return contextlib.nullcontext()
    stance: contextlib.AbstractContextManager[None] = torch.compiler.set_stance("force_eager")
    return stance


@contextlib.contextmanager
def _without_checkpoints() -> Iterator[None]:
    """Keep ``torch.utils.checkpoint`` from calling layers twice, or within a backward pass of its own.

    There is no switch for it. Whoever else uses it meanwhile gets the same results, for more memory.
    """

    def call(function: Callable[..., Any], preserve_rng_state: bool, *args: Any) -> Any:
        return function(*args)

    def around_call(*args: Any, **kwargs: Any) -> Iterator[None]:
        yield

    whole = checkpoint._checkpoint_without_reentrant_generator
    checkpoint._checkpoint_without_reentrant_generator = around_call
    checkpoint.CheckpointFunction.apply = call  # type: ignore[method-assign]
    try:
        yield
    finally:
        checkpoint._checkpoint_without_reentrant_generator = whole
        del checkpoint.CheckpointFunction.apply  # the one that it inherits


@contextlib.contextmanager
def quiet_hooks() -> Iterator[None]:
    """Silence torch's warning that a layer which reads the data has no input gradient: its output's is all we want."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Full backward hook is firing when gradients are computed")
        yield


def _run_extensions(layer: nn.Module, g_inp: Any, g_out: Any) -> None:
    """Read a layer as the backward pass comes by; when it is differentiated again, nothing is read."""
    if CTX.get_active_exts():
        hook_run_extensions(layer, g_inp, g_out)
    elif "_is_read" in vars(layer):  # the forward pass goes on
        raise UnreadableError(layer, "differentiated within the forward pass")


class _Probe(nn.Module):
    """Notes the input before BackPACK's hook wraps it, and hands on an output that may be changed in place.

    A layer that is not read has no hooks but those that compute its weight, as torch's weight_norm has them.
    """

    def __call__(self, input: Tensor) -> Tensor:  # named as in Linear and Conv2d
        if "_is_read" not in vars(self):
            unread: Tensor = super().__call__(input)
            return unread
        if "_probes" in vars(self):
            raise UnreadableError(self, "called more than once in one forward pass")
        # The gradient of the input flows past BackPACK's hook; where the input needs none, that of a parameter does.
        candidates = (input, *self.parameters(), *(t for t in vars(self).values() if isinstance(t, Tensor)))
        vars(self)["_probes"] = [t for t in candidates if t.requires_grad][:1]
        output: Tensor = super().__call__(input)
        return output.clone()


@functools.cache
def _probed(kind: Any) -> type[nn.Module]:
    """Return the class of the layers of class ``kind`` that are also probes."""
    return type(kind.__name__, (_Probe, kind), {})


def layer_names(model: nn.Module, only: Iterable[str | type[nn.Module]] | None = None) -> list[str]:
    """Names of the model's Linear and Conv2d layers, each module once, optionally only some of them.

    The projections of ``nn.MultiheadAttention`` are Linear layers as well: ``q_proj``, ``k_proj`` and ``v_proj``, even
    where one matrix holds all three, and ``out_proj``.

    Args:
        model: The model.
        only: Names (shell patterns such as ``"blocks.*"`` allowed) or classes.

    Raises:
        ValueError: if nothing is left, saying why.
    """
    layers = _layers(model)
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no Linear or Conv2d layer, so it has no Kronecker curvature to read"
        )
    if only is None:
        return list(layers)
    if isinstance(only, (str, type)):
        raise ValueError(f"layers={only!r} must be a collection of names and classes, such as [{only!r}]")
    chosen: set[str] = set()
    for choice in only:
        matches = {name for name, module in layers.items() if _matches(name, module, choice)}
        if not matches:
            raise ValueError(f"layers={choice!r} matches no Linear or Conv2d; there are {', '.join(layers)}")
        chosen |= matches
    return [name for name in layers if name in chosen]


def layer_shape(model: nn.Module, name: str) -> Layer:
    """Return the layer of this name, or one of its size where it is a part of attention."""
    holder, _, projection = name.rpartition(".")
    module = model.get_submodule(holder)
    found = projections(module).get(projection) if is_attention(module) else None
    return model.get_submodule(name) if found is None else found  # type: ignore[return-value]


def weight_of(model: nn.Module, name: str) -> nn.Parameter | None:
    """Return the parameter in which the layer of this name keeps its weight, perhaps among others.

    None for one that computes its weight from others, which it is not made to do here: that may leave traces.
    """
    holder, _, projection = name.rpartition(".")
    module = model.get_submodule(holder)
    if is_attention(module) and projection in PROJECTIONS:
        return projection_parameters(module)[PROJECTIONS.index(projection)]
    module = model.get_submodule(name)
    return module._parameters.get("in_proj_weight" if is_attention(module) else "weight")


def unread_modules(model: nn.Module) -> dict[str, str]:
    """Modules with a weight matrix whose curvature is not read, by name, and why."""
    unread: dict[str, str] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            if not is_attention(module):
                unread[name] = f"{type(module).__name__} has a forward of its own, unlike torch's MultiheadAttention"
                unread[f"{name}.out_proj"] = f"part of {type(module).__name__}, which has a forward of its own"
        elif not is_layer(module) and any(p is not None and p.dim() > 1 for p in module._parameters.values()):
            unread[name] = f"{type(module).__name__} has no rule: only Linear and Conv2d are read"
    return unread


def _layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the layers that can be read, by name; of a part of attention, one of its size."""
    layers: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if is_attention(module):
            prefix = f"{name}." if name else ""
            layers |= {prefix + part: layer for part, layer in projections(module).items()}
        elif is_layer(module):
            layers[name] = module
    return layers


def _matches(name: str, module: nn.Module, choice: str | type[nn.Module]) -> bool:
    return fnmatch.fnmatchcase(name, choice) if isinstance(choice, str) else isinstance(module, choice)


def _fingerprint(model: nn.Module) -> list[tuple[Any, ...]]:
    """Identity of modules, identity and shape of parameters; kind of buffers, whose values are copied anyway."""
    modules = list(model.modules())
    held = [model, *(m for module in modules for m in module._modules.values() if m is not None)]  # by several names
    parameters = [p for module in modules for p in module._parameters.values() if p is not None]
    buffers = [b for module in modules for b in module._buffers.values() if b is not None]
    return [
        *((id(p), p.shape, p.device, p.dtype) for p in parameters),
        *((b.shape, b.device, b.dtype) for b in buffers),
        *((id(module), type(module)) for module in held),
    ]


# What Module.compile() makes is among it, which runs the original.
_OF_EVERY_MODULE = frozenset(vars(nn.Module())) - {"training"} | {"_compiled_call_impl"}


def _attributes(module: nn.Module) -> list[tuple[str, Any]]:
    """Return the module's mode, and what it holds beside what every module does."""
    return [(name, value) for name, value in vars(module).items() if name not in _OF_EVERY_MODULE]


def _copy(t: Tensor) -> Tensor:
    return t.detach().clone()


def _holds_data(value: Any) -> bool:
    """Tell whether an attribute is a tensor, or a list or the like of tensors, settings and lists of them."""
    return _is_data(value) or _is_collection(value)


def _is_data(value: Any) -> bool:
    return isinstance(value, Tensor) and not isinstance(value, nn.Parameter)


def _is_collection(value: Any) -> bool:
    if isinstance(value, dict):
        value = list(value.values())
    if not isinstance(value, (list, tuple)):
        return False
    return all(_is_data(item) or _is_setting(item) or _is_collection(item) for item in value)


def _is_setting(value: Any) -> bool:
    """Tell whether an attribute is plain: None, a number, a word, a function, or a tuple of these."""
    if isinstance(value, tuple):
        return all(_is_setting(item) for item in value)
    if isinstance(value, types.FunctionType):
        return value.__closure__ is None and value.__defaults__ is None  # else it may hold modules of the original
    return type(value) in (types.NoneType, bool, int, float, str, types.BuiltinFunctionType)
