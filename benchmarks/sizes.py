"""How large a network is."""

from __future__ import annotations

from torch import Tensor, nn

from kfac_flat import Size
from kfac_flat.pruning.graph import NeuronGraph


def measured(model: nn.Module, example: Tensor) -> tuple[Size, dict[str, int]]:
    """Count what there is of a network as it is, and the output channels of all its layers, by name.

    Those of the projections that EigenDamage puts in count as neurons like others; weights that are zero count.
    """
    graph = NeuronGraph(model, example)
    widths = {name: len(graph.channels[name].outputs) for name in graph.producers}
    parameters = sum(p.numel() for p in model.parameters())
    return Size(sum(widths[name] for name in graph.hidden), parameters, graph.macs), widths
