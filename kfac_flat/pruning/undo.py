"""Putting the neurons of a cut back: what it took is remembered, and joined to what has become of the rest."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import Optimizer

from kfac_flat.changes import Change, setting, updating
from kfac_flat.pruning.errors import CutError
from kfac_flat.pruning.surgery import Selection, Surgery, exchange, replacement
from kfac_flat.structure import Kept


@dataclass(frozen=True)
class Removed:
    """The entries of a tensor that a cut takes.

    Attributes:
        like: Shape and memory format of the whole tensor, without data.
        selection: What the cut keeps.
        values: The rest, in a row.

    Example:
        >>> t = torch.arange(6).reshape(2, 3)
        >>> removed = Removed.of(t, {1: torch.tensor([0, 2])})
        >>> removed.values
        tensor([1, 4])
        >>> removed.joined_to(10 * t[:, [0, 2]])
        tensor([[ 0,  1, 20],
                [30,  4, 50]])
    """

    like: Tensor
    selection: Selection
    values: Tensor

    @classmethod
    def of(cls, t: Tensor, selection: Selection) -> Removed:
        """Remember what a cut takes from ``t``."""
        t = t.detach()
        return cls(torch.empty_like(t, device="meta"), selection, t[~_kept(t.shape, selection).to(t.device)])

    def joined_to(self, t: Tensor) -> Tensor:
        """Return the whole tensor, with ``t`` at the entries that the cut kept.

        Raises:
            CutError: if ``t`` has not the shape that the cut left.
        """
        left = [len(self.selection.get(d, range(size))) for d, size in enumerate(self.like.shape)]
        if list(t.shape) != left:
            raise CutError(f"a tensor of shape {list(t.shape)} is not what the cut left, {left}")
        whole = torch.empty_like(self.like, dtype=t.dtype, device=t.device)
        kept = _kept(whole.shape, self.selection).to(t.device)
        whole[kept] = t.detach().reshape(-1)
        whole[~kept] = self.values.to(t)
        return whole


def _kept(shape: torch.Size, selection: Selection) -> Tensor:
    """Mask of the selected entries."""
    mask = torch.ones(shape, dtype=torch.bool)
    for dim, index in selection.items():
        gone = torch.ones(shape[dim], dtype=torch.bool)
        gone[index.cpu()] = False
        mask.movedim(dim, -1)[..., gone] = False
    return mask


class Undo:
    """What takes back a surgery that is about to happen.

    Args:
        surgery: The surgery.
        kept: What remains of each module that loses channels, by name.
        optimizer: Whose state is cut along.
    """

    def __init__(self, surgery: Surgery, kept: Mapping[str, Kept], optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._selections = surgery.selections
        self._names = surgery.names
        self._attributes = [(m, {name: getattr(m, name) for name in values}) for m, values in surgery.attributes]
        self._values = {t: Removed.of(t, selection) for t, selection in self._selections.items()}
        self._gradients = {t: Removed.of(t.grad, self._selections[t]) for t in self._values if t.grad is not None}
        self._states = {
            p: {key: Removed.of(state[key], selection) for key, selection in selections.items()}
            for p, state, selections in surgery.states(optimizer)
        }
        keep = getattr(optimizer, "keep_removed", None)
        self._follow = None if keep is None else keep(kept, self._join)

    def changes(self) -> list[Change]:
        """Return all that it takes, to be made together.

        Raises:
            CutError: if the optimizer holds something that was not there when the neurons went.
        """
        found = [*self._exchanges(), *(setting(module, values) for module, values in self._attributes)]
        found += [updating(*whole) for whole in self._whole_states()]
        return found + ([] if self._follow is None else self._follow())

    def _join(self, p: Tensor, t: Tensor) -> Callable[[Tensor], Tensor]:
        """Remember what a tensor of the shape of the parameter ``p`` loses when ``p`` is cut."""
        return Removed.of(t, self._selections.get(p, {})).joined_to

    def _exchanges(self) -> Iterator[Change]:
        for t, removed in self._values.items():
            gradient = None
            if t.grad is not None:  # those that went had none since
                none = Removed.of(torch.zeros_like(removed.like, device=t.device), removed.selection)
                gradient = self._gradients.get(t, none).joined_to(t.grad)
            yield exchange(t, replacement(t, removed.joined_to(t), gradient), self._names[t])

    def _whole_states(self) -> Iterator[tuple[dict[str, object], dict[str, object]]]:
        """Yield the optimizer's state of each parameter that was cut, and its whole tensors."""
        for p, state in self._optimizer.state.items():
            removed = self._states.get(p, {})
            for key, value in state.items() if p in self._values else ():
                if key not in removed and isinstance(value, Tensor) and value.shape == p.shape and value.dim():
                    raise CutError(
                        f"the optimizer keeps {key!r} for {self._names[p]} only since neurons went, and nothing of the "
                        "kind is known for those: undo a removal before training in another way"
                    )
            yield state, {key: r.joined_to(state[key]) for key, r in removed.items() if key in state}
