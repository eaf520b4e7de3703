"""What could be pruned of a model, as a page to look at in a browser."""

from __future__ import annotations

import os
from pathlib import Path

from kfac_flat.page.markup import Column, Markup, Section, dotted, element, joined, table
from kfac_flat.pruning.inspection import Inspection
from kfac_flat.pruning.page import frozen_section, layers_section, write


def write_inspection(found: Inspection, path: str | os.PathLike[str], title: str) -> Path:
    """Write the page, and return its path."""
    widths = {name: layer.outputs for name, layer in found.layers.items()}
    after = found.even.widths if found.even else {name: x.outputs - x.removable for name, x in found.layers.items()}
    becomes = f"after a cut of {found.even.target:.0%}" if found.even else "at the least"
    lead = [
        f"{found.reached:.1%} of the parameters are in tensors that can shrink.",
        f"An even cut of {found.even.target:.0%} of the neurons is shown; training chooses by what they are worth."
        if found.even
        else "Shown is how far it could go: down to one neuron of each layer or group.",
    ]
    sections = [
        Section("size", "Size of the model", _sizes(found)),
        layers_section(widths, after, found.frozen, f"Output channels of each layer, now and {becomes}"),
        Section("costs", "What the layers cost", _costs(found)),
        Section("groups", "What goes together", _tied(found)),
        *frozen_section(found.frozen),
    ]
    return write(path, title, lead, sections)


def _sizes(found: Inspection) -> Markup:
    columns = [Column("Size", "text"), *(Column(state.capitalize()) for state in found.states)]
    rows = [[title[0].upper() + title[1:], *sizes] for title, *sizes in found.sizes()]
    return table("Neurons, parameters, and multiply-accumulates of one example", columns, rows)


def _costs(found: Inspection) -> Markup:
    titles = [title[0].upper() + title[1:] for title in found.columns]
    columns = [Column(titles[0], "text"), *map(Column, titles[1:])]
    rows = [[dotted(name), *cells] for name, *cells in found.rows()]
    return table("Channels, how many of them can go, parameters and multiply-accumulates", columns, rows)


def _tied(found: Inspection) -> Markup:
    if not found.tied:
        return element("p", "No channel of this model can go.")
    rows = [[f"{tied.groups:,}", joined(map(dotted, tied.names()), ", ")] for tied in found.tied]
    return table(
        "Groups of channels that can only go together", [Column("Groups"), Column("One channel each of", "wide")], rows
    )
