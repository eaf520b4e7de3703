"""A device that is not the CPU, for machines without a GPU: it holds tensors of the CPU, and refuses what a GPU would.

Operations on tensors of both devices raise :class:`MixedDevicesError`; those that make the host wait for the device
raise :class:`HostWaitsError` within :meth:`PretendGPU.without_waiting`, as with
``torch.cuda.set_sync_debug_mode("error")``. Results are those of the CPU to the last bit. Registering such a device
changes what torch takes for the accelerator of the whole process, so nothing else should run in it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch._dynamo  # which reads torch.Generator as a type
from torch import Tensor
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

aten = torch.ops.aten

# What asks the device for a value, for a shape that depends on values, or whether a matrix could be decomposed.
WAITING = {
    aten._local_scalar_dense.default, aten.allclose.default, aten.equal.default, aten.is_nonzero.default,
    aten.nonzero.default, aten.masked_select.default, aten.bincount.default, aten.unique_consecutive.default,
    aten.unique_dim.default, aten._unique2.default, aten.repeat_interleave.Tensor, aten.multinomial.default,
    aten._linalg_eigh.default, aten._linalg_svd.default, aten._linalg_check_errors.default, aten.linalg_lstsq.default,
}  # fmt: skip
JOINING = {
    aten.cat.default,
    aten.stack.default,
}  # unlike what works on numbers one by one, no scalars of the CPU either
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}


class MixedDevicesError(RuntimeError):
    """An operation has tensors of both devices."""


class HostWaitsError(RuntimeError):
    """An operation makes the host wait for the device."""


class _Module(backend_registration._DummyBackendModule):
    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def get_rng_state(self, device: object = None) -> Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: Tensor, device: object = None) -> None:
        torch.set_rng_state(state)


class Generator(torch.Generator):
    """Draws what one on the CPU does, for tensors of the device that it was asked for."""

    asked: dict[int, str] = {}  # noqa: RUF012 -- by _cdata, for operations are given another Python object

    def __new__(cls, device: str | torch.device = "cpu") -> Generator:
        generator: Generator = super().__new__(cls, "cpu")
        cls.asked[generator._cdata] = torch.device(device).type
        return generator

    @property
    def device(self) -> torch.device:
        return torch.device(self.asked[self._cdata])


def register() -> torch.device:
    """Make the device known to torch, for as long as the process lives."""
    backend_registration._setup_privateuseone_for_python_backend("pretend", _Module())
    torch.Generator = Generator  # type: ignore[misc]
    return torch.device("pretend", 0)


class OnDevice(Tensor):
    """A tensor on the pretended device; ``held`` is the one of the CPU."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> OnDevice:
        return Tensor._make_wrapper_subclass(  # type: ignore[attr-defined, no-any-return]
            *(cls, held.size()),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=torch.device("pretend", 0),
        )

    def __init__(self, held: Tensor) -> None:
        self.held = held

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{operation} outside of PretendGPU")

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def __repr__(self) -> str:  # type: ignore[override]
        return f"OnDevice({self.cpu()})"


class PretendGPU(TorchDispatchMode):
    """Runs operations on the pretended device, while it is entered.

    Attributes:
        waiting_allowed: Whether the host may wait for the device.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waiting_allowed = True
        self.on_the_way: set[int] = set()  # what is being copied to the host, by id

    def __enter__(self) -> PretendGPU:
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device=...) goes by way of the CPU
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        torch._C._set_only_lift_cpu_tensors(False)
        super().__exit__(*error)

    @contextmanager
    def without_waiting(self) -> Iterator[None]:
        """Raise HostWaitsError for what makes the host wait."""
        before, self.waiting_allowed = self.waiting_allowed, False
        self.on_the_way.clear()
        try:
            yield
        finally:
            self.waiting_allowed = before

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation on what the tensors hold."""
        flat, structure = tree_flatten((args, kwargs or {}))
        there = [x for x in flat if isinstance(x, OnDevice)]
        here = [x for x in flat if isinstance(x, Tensor) and not isinstance(x, OnDevice)]
        asked = (kwargs or {}).get("device")
        goes_there = bool(there) if asked is None else torch.device(asked).type == "pretend"
        self._check(operation, args, kwargs or {}, there, here, goes_there)

        held = [x.held if isinstance(x, OnDevice) else x for x in flat]
        own_args, own_kwargs = tree_unflatten(held, structure)
        if asked is not None:
            own_kwargs["device"] = torch.device("cpu")
        result = operation(*own_args, **own_kwargs)
        if not goes_there:
            return result
        holders = {id(x.held): x for x in there}
        wrapped = tree_map_only(Tensor, lambda t: holders[id(t)] if id(t) in holders else OnDevice(t), result)
        return return_and_correct_aliasing(operation, args, kwargs or {}, wrapped)

    def _check(
        self, operation: Any, args: Any, kwargs: dict[str, Any], there: list[Any], here: list[Any], goes_there: bool
    ) -> None:
        """Raise what a GPU would, or what the host has to wait for."""
        copies = operation in (aten.copy_.default, aten._to_copy.default)
        positions = args[1] if operation in INDEXING else []  # which torch takes from either device
        taken = [t for t in here if (not t.dim() and operation not in JOINING) or any(t is i for i in positions)]
        writes_here = operation._schema.is_mutable and args and any(args[0] is t for t in here)
        if there and not copies and (len(taken) < len(here) or writes_here):
            raise MixedDevicesError(f"{operation} has tensors of both devices")
        generator = kwargs.get("generator")
        if generator is not None and (Generator.asked[generator._cdata] == "pretend") != goes_there:
            raise MixedDevicesError(f"{operation} has a generator of another device")
        if self.waiting_allowed or not (there or goes_there):
            return
        crosses = bool(there and here) if operation is aten.copy_.default else goes_there != bool(there)
        waits = (
            operation in WAITING
            or (copies and crosses)
            or any(i is not None and (i.dtype == torch.bool or not isinstance(i, OnDevice)) for i in positions)
        )
        if waits:
            raise HostWaitsError(f"{operation} makes the host wait")
