"""Several processes, one cut: what ranks agree on before it, and DistributedDataParallel around it.

Every process of the default group trains a replica of one model. A cut comes in two steps: each process makes it in a
way that it can still undo, and keeps it only once all processes have told that they could. All that is ever said is one
round after another in which everybody tells everybody; who has failed says so in the next round and takes part in none
after it. No round is ever mistaken for another, and nobody waits for one who has left. Should a process die in the
last round, some may hear of it and some not; even then each of them has the whole cut or nothing of it.
"""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Iterator
from types import TracebackType
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from kfac_flat.pruning.errors import CutError

# Replicas whose gradients have been averaged score alike but for the rounding of what was not computed in one place.
TOLERANCE = 1e-3


class Agreement:
    """What the processes of the default group decide on together; a process on its own agrees with itself.

    As a context it tells the others of an exception that leaves it, so that they need not wait.

    Args:
        needed: Whether there is anything to decide. If not, no process hears of the others.
    """

    def __init__(self, needed: bool) -> None:
        self._open = needed and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1

    def __enter__(self) -> Agreement:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._open and isinstance(error, Exception):  # an interrupted process ends, which the others notice
            with contextlib.suppress(CutError):  # the error under way is the one to report
                self._tell(None, failure=f"{type(error).__name__}: {error}")

    def on_scores(self, own: list[float] | None) -> list[float] | None:
        """Return the scores that every process goes by, those of rank 0.

        Raises:
            CutError: if a process has found others than rounding explains, has failed, or is gone.
        """
        if not self._open:
            return own
        scores: list[list[float] | None] = self._tell(own)
        different = [rank for rank, found in enumerate(scores) if not _alike(found, scores[0])]
        if different:
            self._open = False  # all processes see what this one sees
            raise CutError(
                f"ranks {_listed(different)} have scored the neurons unlike rank 0, so that replicas would lose "
                "different ones: train them through DistributedDataParallel, on gradients reduced over the processes "
                "(none accumulated under no_sync() alone), and step every pruner at the same time"
            )
        return scores[0]

    def on_cut(self, gone: Tensor) -> None:
        """Return once every process is ready to keep the same cut.

        Raises:
            CutError: if a process has chosen otherwise, has failed, or is gone.
        """
        if not self._open:
            return
        choices = self._tell(gone.tolist())
        self._open = False
        different = [rank for rank, choice in enumerate(choices) if choice != choices[0]]
        if different:
            raise CutError(
                f"ranks {_listed(different)} would remove other neurons than rank 0, so none are removed: "
                "make model and pruner alike in every process"
            )

    def _tell(self, value: Any, failure: str = "") -> list[Any]:
        """Tell every process a value, and return what each has told, by rank."""
        self._open = False
        told: list[Any] = [None] * dist.get_world_size()
        try:
            dist.all_gather_object(told, (value, failure))
        except RuntimeError as error:
            raise CutError(
                f"a process is gone or has not come to step(), so this one leaves its model uncut ({error})"
            ) from error
        failures = [f"rank {rank}: {failure}" for rank, (_, failure) in enumerate(told) if failure]
        if failures:
            raise CutError(f"not every process could make the cut, so none has made it: {'; '.join(failures)}")
        self._open = True
        return [value for value, _ in told]


def _alike(a: list[float] | None, b: list[float] | None) -> bool:
    """Tell whether scores are equal but for rounding, relative to the largest finite one."""
    if a is None or b is None or len(a) != len(b):
        return a is b
    largest = max((score for score in b if score < math.inf), default=0.0)
    return all(x == y or abs(x - y) <= TOLERANCE * largest for x, y in zip(a, b, strict=True))


def _listed(ranks: list[int]) -> str:
    return ", ".join(map(str, ranks))


@contextlib.contextmanager
def rewrap(wrapper: nn.Module) -> Iterator[None]:
    """Make a DistributedDataParallel wrapper release its model's parameters, and take them up anew afterwards.

    A wrapper holds its parameters in the sizes that they had when it was made, and torch lets none of them change
    while it does. So end an epoch within this context, whether a removal is due or not. The wrapper stays the same
    object, with the same settings, communication hooks and module hooks; only its buckets are built anew. No process
    waits for another in here, and no parameter or buffer is sent: what was equal in all of them stays equal. A hook's
    own state is kept as it is; one that remembers gradients by bucket, such as PowerSGD's, must be made anew by you.

    Within the context, and after it if the wrapper cannot be made anew, calling the wrapper is an error.

    Args:
        wrapper: The DistributedDataParallel. Where ``torch.compile`` has compiled it or the model in it, torch keeps
            more references to the parameters, and a cut is refused.

    Raises:
        TypeError: if ``wrapper`` is something else.
        ValueError: if it was made with a setting that cannot be carried over; nothing has changed.

    Example:
        >>> import kfac_flat, torch
        >>> torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> wrapper = DistributedDataParallel(model)
        >>> optimizer = torch.optim.SGD(wrapper.parameters(), lr=0.1, momentum=0.9)
        >>> pruner = kfac_flat.NeuronPruner(model, optimizer, torch.randn(1, 4), target=0.5, start=1, every=1, events=1)
        >>> nn.functional.cross_entropy(wrapper(torch.randn(16, 4)), torch.randint(3, (16,))).backward()
        >>> optimizer.step()
        >>> with kfac_flat.rewrap(wrapper):
        ...     pruner.step().widths_after
        {'0': 4, '2': 3}
        >>> wrapper(torch.randn(16, 4)).shape
        torch.Size([16, 3])
        >>> torch.distributed.destroy_process_group()
    """
    if not isinstance(wrapper, DistributedDataParallel):
        raise TypeError(
            f"rewrap takes the DistributedDataParallel around the model, not {type(wrapper).__name__}; "
            "where torch.compile is used with it, that keeps hold of the parameters as well, so they cannot be cut"
        )
    _check_can_be_made_anew(wrapper)
    refusal = wrapper.register_forward_pre_hook(_refuse_to_run)
    vars(wrapper).pop("logger", None)  # it keeps the reducer, which keeps the parameters
    vars(wrapper).pop("reducer", None)
    try:
        yield
    finally:  # after a failed cut the wrapper goes on with the model as it was
        _make_anew(wrapper)
        refusal.remove()


def _refuse_to_run(ddp: nn.Module, args: Any) -> None:
    raise RuntimeError(
        "this DistributedDataParallel has let go of its parameters and would not reduce their gradients: "
        "call it after the end of kfac_flat.rewrap(...), or make a new one if that has failed"
    )


def _check_can_be_made_anew(ddp: DistributedDataParallel) -> None:
    """Refuse settings that the wrapper does not tell, or that it has left in the model."""
    unlike = {
        "mixed_precision": ddp.mixed_precision is not None,
        "device_mesh": getattr(ddp, "device_mesh", None) is not None,
        "delay_all_reduce_named_params": bool(ddp._delay_all_reduce_params),
        "the python reducer of compiled autograd": ddp._use_python_reducer,
        "optimizers that run in the backward pass": any(
            hasattr(p, "_in_backward_optimizers") for p in ddp.parameters()
        ),
        "a built-in communication hook": not ddp._comm_hooks and _reducer_has_hook(ddp),
    }
    found = [setting for setting, used in unlike.items() if used]
    if found:
        raise ValueError(
            f"a DistributedDataParallel with {' and '.join(found)} cannot be made anew as it was: make it without, and "
            "register a hook of your own where you need one"
        )


def _reducer_has_hook(ddp: DistributedDataParallel) -> bool:
    data: dict[str, Any] = ddp._get_ddp_logging_data()  # type: ignore[no-untyped-call]
    return bool(data.get("comm_hook"))


def _make_anew(ddp: DistributedDataParallel) -> None:
    """Run the constructor again with the settings that it had; what hangs on the wrapper as a module stays there."""
    as_module = {name: vars(ddp)[name] for name in vars(nn.Module())}
    hooks = ddp._comm_hooks
    try:
        DistributedDataParallel.__init__(ddp, ddp.module, init_sync=False, **_settings(ddp))
    finally:
        vars(ddp).update(as_module)
    for hook, state in hooks:
        ddp.register_comm_hook(state, hook)


def _settings(ddp: DistributedDataParallel) -> dict[str, Any]:
    """Arguments of the constructor: torch keeps each under its own name, but for the sizes of the buckets."""
    names = set(inspect.signature(DistributedDataParallel.__init__).parameters) - {"self", "module"}
    if "forward_sync_buffers" in names:
        names.remove("broadcast_buffers")  # its name in older versions of torch
    settings = {name: getattr(ddp, name) for name in names if hasattr(ddp, name)}
    sizes = [size / 2**20 for size in getattr(ddp, "bucket_bytes_cap_list", ())]
    if sizes:
        settings["bucket_cap_mb_list"] = sizes
    elif not ddp.bucket_bytes_cap_default:
        settings["bucket_cap_mb"] = ddp.bucket_bytes_cap / 2**20
    return settings
