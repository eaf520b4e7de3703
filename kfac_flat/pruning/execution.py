"""Running a traced model without data: for the shapes of all results, and to count what it multiplies."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils.flop_counter import FlopCounterMode

from kfac_flat.nested import map_tensors
from kfac_flat.pruning import layers, rules
from kfac_flat.pruning.tracing import Program, empty, without_data


class Run(fx.Interpreter):
    """Runs a trace on a skeleton, without the notes that torch.fx makes at each operation for a compiler.

    Args:
        bare: A skeleton of the model.
        program: The trace.
    """

    def __init__(self, bare: nn.Module, program: Program) -> None:
        super().__init__(bare, graph=program.graph)
        self.extra_traceback = False  # errors here are the user's, and say which operation they concern
        self._program = program

    def fetch_attr(self, target: str) -> Any:
        """Look up a parameter, buffer, or tensor that was made while tracing."""
        return self._program.constants[target] if target in self._program.constants else super().fetch_attr(target)

    def run_node(self, n: fx.Node) -> Any:
        """Run one operation."""
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        return getattr(self, n.op)(n.target, args, kwargs)


class DryRun(Run):
    """Runs a traced model on tensors without data.

    Where the shape of a result is known beforehand the call is not made: torch's own computation of shapes takes most
    of the time.

    Args:
        bare: A skeleton of the model.
        program: Its trace.
        counts: Whether to count what is multiplied.

    Attributes:
        flops: Floating-point operations of layers, and of products of activations by torch's own counter.
    """

    def __init__(self, bare: nn.Module, program: Program, counts: bool) -> None:
        super().__init__(_prepared(bare, program), program)
        self.flops = 0
        self._counts = counts

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a function, if need be."""
        like = rules.same_as_result(target, args, kwargs)
        if like is not None:
            return empty(like)
        rule = rules.find(target)
        with _new_tensors(rule is not None, args):
            return self._counted(rule, lambda: target(*args, **kwargs))

    def call_method(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a method of a tensor."""
        rule = rules.find(target)
        with _new_tensors(rule is not None, args):
            return self._counted(rule, lambda: super(DryRun, self).call_method(target, args, kwargs))

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a submodule, if need be; one that could not be traced runs on zeros, for the shape of its result."""
        if target in self._program.opaque:
            return self._counted(None, lambda: on_zeros(self._program.opaque[target], args, kwargs))
        module = self.submodules[target]
        x = args[0] if len(args) == 1 and not kwargs else None
        if x is not None and rules.changes_no_shape(module, x):
            return empty(x)
        if x is not None and layers.is_producer(module) and not layers.is_attention(module):
            result = _linear(module, x) if isinstance(module, nn.Linear) else module(x)
            self.flops += 2 * layers.positions(module, x, result) * layers.weight_of(module).numel()
            return result
        rule = rules.find(module)
        with _new_tensors(rule is not None, args):
            return self._counted(rule, lambda: module(*args, **kwargs))

    def _counted(self, rule: rules.Rule | None, call: Any) -> Any:
        """Make a call, and count what it multiplies if it may multiply anything."""
        if not self._counts or (rule is not None and rule not in rules.PRODUCTS):
            return call()
        with FlopCounterMode(display=False) as counter:
            result = call()
        self.flops += int(counter.get_total_flops())
        return result


def _linear(module: nn.Linear, x: Tensor) -> Tensor:
    """Return what a Linear layer makes of ``x``; asking torch takes a third of a millisecond."""
    if x.dim() == 0 or x.shape[-1] != module.weight.shape[1]:
        raise RuntimeError(f"it reads {module.weight.shape[1]} features, not {list(x.shape)}")
    return torch.empty((*x.shape[:-1], module.weight.shape[0]), dtype=x.dtype, device="meta")


def _new_tensors(known: bool, args: tuple[Any, ...]) -> AbstractContextManager[Any]:
    """Make new tensors without data, unless the call is known to make none but from those that it is given."""
    given = any(isinstance(a, (Tensor, list, tuple)) for a in args)
    return nullcontext() if known and given else torch.device("meta")


def on_zeros(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run a module that has data on zeros, for the shape of its result."""
    device = next((t.device for t in (*module.parameters(), *module.buffers())), torch.device("cpu"))
    zeros = map_tensors(lambda t: torch.zeros_like(t, device=device), (args, dict(kwargs)))
    with torch.device(device), torch.random.fork_rng(devices=[]):
        return without_data(module.eval()(*zeros[0], **zeros[1]))


def _prepared(bare: nn.Module, program: Program) -> nn.Module:
    """Put a skeleton into the mode of the trace."""
    bare.train(program.training)
    for module in bare.modules():
        if isinstance(module, (*layers.BATCH_NORMS, *layers.INSTANCE_NORMS)):
            module.eval()  # its channels are the same, and it would refuse a single example
    return bare
