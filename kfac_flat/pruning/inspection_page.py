"""What could be pruned of a model, as a page to look at in a browser."""

from __future__ import annotations

import os
from pathlib import Path

from kfac_flat.page.markup import Column, Markup, Section, dotted, element, joined, table
from kfac_flat.pruning.inspection import COLUMNS, Inspection
from kfac_flat.pruning.page import SIZES, frozen_section, layer_label, layers_section, tile, write


def write_inspection(found: Inspection, path: str | os.PathLike[str], title: str) -> Path:
    """Write the page, and return its path."""
    sections = [
        Section("size", "Size of the model", _sizes(found)),
        *_even_cut(found),
        Section("costs", "Layers and what they cost", _costs(found)),
        Section("groups", "What goes together", _tied(found)),
        *frozen_section(found.frozen),
    ]
    return write(path, title, [found.reach], sections)


def _sizes(found: Inspection) -> Markup:
    tiles = []
    for (title, now, *others), name in zip(found.sizes(), SIZES, strict=False):  # not the latency
        note = ", ".join(f"{value} {state}" for state, value in zip(found.states[1:], others, strict=True))
        share = getattr(found.least, name) / max(getattr(found.size, name), 1)
        tiles.append(tile(_upper(title), now, share, note))
    return element("dl", *tiles, class_="tiles")


def _even_cut(found: Inspection) -> list[Section]:
    if found.even is None:
        return []
    share = f"{found.even.target:.0%}"
    before = {name: layer.outputs for name, layer in found.layers.items()}
    caption = f"Output channels of each layer, now and with {share} of the neurons gone, of all layers alike"
    even = layers_section(before, found.even.widths, found.frozen, caption)
    return [Section("layers", f"An even cut of {share}", even.content)]


def _costs(found: Inspection) -> Markup:
    columns = [Column(_upper(title), "number" if i else "text") for i, title in enumerate(COLUMNS)]
    rows = [[layer_label(name, found.frozen), *layer.cells] for name, layer in found.layers.items()]
    caption = "Channels, how many of them can go, parameters and multiply-accumulates (MACs) of one example"
    return table(caption, columns, rows)


def _tied(found: Inspection) -> Markup:
    if not found.tied:
        return element("p", "No channel of this model can go.")
    rows = [[joined(map(dotted, tied.names()), ", "), f"{tied.groups:,}"] for tied in found.tied]
    columns = [Column("A channel each of", "text"), Column("Groups")]
    return table("Groups of channels that can only go together, and how many there are", columns, rows)


def _upper(title: str) -> str:
    return title[0].upper() + title[1:]
