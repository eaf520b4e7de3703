"""What a pruning step did, or would do."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from torch import Tensor

from kfac_flat.pruning.text import aligned, fewer


@dataclass(frozen=True)
class Size:
    """Size of a model: hidden neurons, parameters, multiply-accumulates of one example in eval mode.

    Where the budget is latency, also the seconds that a call in eval mode takes on the model's device.
    """

    neurons: int
    parameters: int
    macs: int
    latency: float | None = None


def scalars(sparsity: float, size: Size, widths: Mapping[str, int]) -> dict[str, float]:
    """Name what a logger draws: see :meth:`PruneReport.scalars`."""
    named = {"sparsity": sparsity, **vars(size)} | {f"width/{name}": width for name, width in widths.items()}
    return {f"pruning/{name}": float(value) for name, value in named.items() if value is not None}


@dataclass(frozen=True)
class PruneReport:
    """One call of :meth:`NeuronPruner.step` or :meth:`NeuronPruner.plan`.

    Print it for the news of an epoch, :meth:`table` for all layers, :meth:`plot` for a picture, :meth:`html` for a
    page, :meth:`scalars` for a logger such as TensorBoard. Reports can be compared, copied and pickled.

    Attributes:
        epoch: Number of ``step()`` calls so far, this one included.
        removed: Channels that went, by layer: positions in the ORIGINAL layer, ascending, ``int64``.
        widths_before: Output channels of each layer before, by name.
        widths_after: The same afterwards.
        before: Size of the model before.
        after: Its size afterwards.
        sparsity: Removed neurons / original neurons, afterwards.
        reason: Why nothing went, or less than was due; empty otherwise.
        frozen: Layers with neurons that cannot go, by name, and why.

    Example:
        >>> report = PruneReport(
        ...     epoch=5, widths_before={"features.0": 64, "features.3": 192, "head": 10},
        ...     widths_after={"features.0": 32, "features.3": 64, "head": 10},
        ...     before=Size(256, 30_842, 2_116_224), after=Size(96, 5_634, 310_400), sparsity=0.625,
        ...     frozen={"head": "forms the model's output"},
        ... )
        >>> print(report.table())
        epoch 5: 62.5% of the neurons removed
        <BLANKLINE>
        layer       before  after  removed  share
        features.0      64     32       32  50.0%
        features.3     192     64      128  66.7%
        head            10     10        -      -  [1]
        <BLANKLINE>
        neurons           256  ->       96  2.67x fewer
        parameters     30,842  ->    5,634  5.47x fewer
        MACs        2,116,224  ->  310,400  6.82x fewer
        <BLANKLINE>
        [1] frozen: forms the model's output
        >>> report.scalars()["pruning/width/features.3"]
        64.0
    """

    epoch: int
    widths_before: dict[str, int]
    widths_after: dict[str, int]
    before: Size
    after: Size
    sparsity: float
    removed: dict[str, Tensor] = field(default_factory=dict)
    reason: str = ""
    frozen: dict[str, str] = field(default_factory=dict)

    def __bool__(self) -> bool:
        """Tell whether anything went."""
        return bool(self.removed)

    def __eq__(self, other: object) -> bool:
        """Tell whether two reports say the same; their tensors could not be compared as a whole."""
        return self._plain() == other._plain() if isinstance(other, PruneReport) else NotImplemented

    __hash__ = None  # type: ignore[assignment]

    def _plain(self) -> dict[str, Any]:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return values | {"removed": {name: positions.tolist() for name, positions in self.removed.items()}}

    def __str__(self) -> str:
        if not self.removed:
            return f"{self._head}; nothing went: {self.reason}"
        sizes = ", ".join(f"{before:,} -> {after:,} {what.lower()}" for what, before, after in self._sizes)
        changed = [n for n, width in self.widths_after.items() if width != self.widths_before[n]]
        widths = ", ".join(f"{n} {self.widths_before[n]} -> {self.widths_after[n]}" for n in changed)
        return "\n".join(filter(None, [self._head, f"  {sizes}", f"  {widths}", self.reason and f"  {self.reason}"]))

    @property
    def _head(self) -> str:
        return f"epoch {self.epoch}: {self.sparsity:.1%} of the neurons removed"

    @property
    def _sizes(self) -> list[tuple[str, int, int]]:
        names = {"neurons": "neurons", "parameters": "parameters", "MACs": "macs"}
        sizes = [(what, getattr(self.before, name), getattr(self.after, name)) for what, name in names.items()]
        if self.before.latency is not None and self.after.latency is not None:
            sizes.append(("microseconds", round(self.before.latency * 1e6), round(self.after.latency * 1e6)))
        return sizes

    def table(self, width: int = 80) -> str:
        """Lay out all layers' widths and the model's sizes as plain text.

        Args:
            width: Characters of a line. Words in long names are shortened in the middle to fit, names to no less
                than 12 characters.

        Returns:
            Lines without a trailing newline; numbers in brackets refer to the reasons at the end, where frozen
            parts that have no width of their own, such as an LSTM, are named as well.
        """
        given = dict.fromkeys(self.frozen[name] for name in self.widths_before if name in self.frozen)
        marks = {reason: f"[{i}]" for i, reason in enumerate(given, 1)}
        layers = [("layer", "before", "after", "removed", "share", "")]
        for name, before in self.widths_before.items():
            after = self.widths_after[name]
            lost = (f"{before - after:,}", f"{(before - after) / before:.1%}") if after < before else ("-", "-")
            layers.append((name, f"{before:,}", f"{after:,}", *lost, marks.get(self.frozen.get(name, ""), "")))
        sizes = [(what, f"{before:,}", "->", f"{after:,}", fewer(before, after)) for what, before, after in self._sizes]
        notes = {mark: reason for reason, mark in marks.items()} | self._frozen_without_width()
        reasons = [
            textwrap.fill(f"{what} frozen: {reason}", width, subsequent_indent=" " * 4)
            for what, reason in notes.items()
        ]
        head = "\n".join(filter(None, [self._head, textwrap.fill(self.reason, width)]))
        return "\n\n".join(
            filter(None, [head, *("\n".join(aligned(rows, width)) for rows in (layers, sizes)), "\n".join(reasons)])
        )

    def _frozen_without_width(self) -> dict[str, str]:
        """Tell why parts that are no layers with a width, such as an LSTM, are frozen, by the names of those alike."""
        names: dict[str, list[str]] = {}
        for name, reason in self.frozen.items():
            if name not in self.widths_before:
                names.setdefault(reason, []).append(name)
        return {", ".join(alike): reason for reason, alike in names.items()}

    def scalars(self) -> dict[str, float]:
        """Return what a logger draws over the epochs: sparsity, sizes and widths as they are afterwards.

        Returns:
            Values by name, which are ``pruning/sparsity``, ``pruning/neurons``, ``pruning/parameters``,
            ``pruning/macs``, ``pruning/latency`` where it is the budget, and ``pruning/width/<layer>`` for each layer.
            For TensorBoard::

                for name, value in report.scalars().items():
                    writer.add_scalar(name, value, report.epoch)
        """
        return scalars(self.sparsity, self.after, self.widths_after)

    def html(self, path: str | os.PathLike[str], *, title: str = "Pruning report") -> Path:
        """Write this step as a page to look at in a browser: sizes, every layer, which channels went, what is frozen.

        The file needs nothing else, and no network. :meth:`NeuronPruner.html` writes the page of a whole run.

        Args:
            path: Where to save the page.
            title: Stands above it.

        Returns:
            The path.

        Example:
            >>> from tempfile import TemporaryDirectory
            >>> report = PruneReport(1, {"hidden": 4}, {"hidden": 2}, Size(4, 40, 32), Size(2, 20, 16), 0.5)
            >>> with TemporaryDirectory() as folder:
            ...     report.html(f"{folder}/report.html").name
            'report.html'
        """
        from kfac_flat.pruning import page  # which writes reports, and so needs to know of them

        return page.write_step(self, path, title)

    def plot(self, path: str | os.PathLike[str]) -> Path:
        """Draw each layer's width, before and after, as horizontal bars.

        Args:
            path: Where to save the picture; the ending tells the format: ``.png``, ``.pdf``, ``.svg``.

        Returns:
            The path.

        Raises:
            ImportError: if matplotlib is not installed; it comes with the extra ``plot``.
            ValueError: if matplotlib does not know the format.
        """
        try:
            from kfac_flat.pruning import picture
        except ModuleNotFoundError as error:
            if (error.name or "").partition(".")[0] != "matplotlib":
                raise
            raise ImportError("PruneReport.plot draws with matplotlib: pip install matplotlib") from error
        sizes = [f"{before:,} → {after:,} {what}, {fewer(before, after)}" for what, before, after in self._sizes]
        return picture.draw_widths(
            self.widths_before,
            {"kept": self.widths_after},
            Path(path),
            title="\n".join([self._head, *sizes]),
            rest="removed",
            whole=[n for n, width in self.widths_after.items() if n in self.frozen and width == self.widths_before[n]],
        )
