"""Statistics of the layers' true Fisher over a data set: read in eval mode, at labels drawn from the model itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from kfac_flat.curvature.likelihood import Likelihood, resolve
from kfac_flat.curvature.radius import LayerData
from kfac_flat.curvature.twin import Twin, UnreadableError
from kfac_flat.nested import batch_size, map_tensors
from kfac_flat.structure import structural_copy

Statistic: TypeAlias = Callable[[LayerData], Sequence[Tensor]]

UNREAD = "the loss does not depend on it, or its input has no axis of examples"


def fisher_statistics(
    model: nn.Module,
    data: Iterable[Any],
    statistic: Statistic,
    names: Iterable[str],
    *,
    likelihood: str | Likelihood = "categorical",
    seed: int = 0,
) -> tuple[dict[str, list[Tensor]], dict[str, str]]:
    """Average a statistic of each layer over a data set.

    The model is read as in eval mode; itself, its mode and its buffers stay as they are, and so does torch's random
    generator. Labels are drawn in the order in which the examples come.

    Args:
        model: The model, free of wrappers.
        data: Batches, as a DataLoader yields them: the input, or a tuple or list that begins with it; labels are not
            looked at. Iterated anew at each call.
        statistic: From what one batch shows of a layer to tensors that are means over its examples.
        names: Names of Linear and Conv2d modules.
        likelihood: What the model's output means, as for :class:`kfac_flat.FlatKFAC`.
        seed: Of the drawn labels.

    Returns:
        The means over all examples, float64, by name; and why other layers have none.

    Raises:
        ValueError: if there are no data, or a mean is not finite.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 3))
        >>> mean_input = lambda seen: [seen.a.mean(0)]
        >>> means, unread = fisher_statistics(model, [torch.ones(8, 4), torch.zeros(2, 4)], mean_input, ["0"])
        >>> means["0"][0]
        tensor([0.8000, 0.8000, 0.8000, 0.8000], dtype=torch.float64)
    """
    draw, names = resolve(likelihood), list(names)
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    in_eval_mode = structural_copy(model, lambda t: t).eval()
    twin, examples = Twin(in_eval_mode, names), 0
    totals: dict[str, list[Tensor]] = {}
    unread: dict[str, str] = {}

    def loss(output: Any) -> Tensor:
        return draw(output, generator).sum()

    for batch in data:
        x = map_tensors(lambda t: t.to(device), batch[0] if isinstance(batch, (tuple, list)) else batch)
        seen = None
        while seen is None:
            try:
                with torch.random.fork_rng(devices=[]):
                    seen = twin.read((x,), {}, loss, create_graph=False)
            except UnreadableError as error:  # before any label has been drawn
                twice = [name for name, layer in twin.layers.items() if layer is error.layer]
                unread |= dict.fromkeys(twice, str(error))
                names = [name for name in names if name not in twice]
                twin = Twin(in_eval_mode, names)
        n = batch_size(x)
        examples += n
        for name, layer_data in seen.items():
            if layer_data.a.dim() >= (4 if isinstance(layer_data.layer, nn.Conv2d) else 2):
                means = [n * t.double() for t in statistic(layer_data.detach())]
                totals[name] = [a + b for a, b in zip(totals[name], means, strict=True)] if name in totals else means
    if not examples:
        raise ValueError("data yielded no examples: give a DataLoader or a list of batches, which can be read again")
    found = {name: [t / examples for t in totals[name]] for name in names if name in totals}
    for name, means in found.items():
        if not all(t.isfinite().all() for t in means):
            raise ValueError(f"the Fisher of {name} is not finite: look for inf and nan in the data and the weights")
    return found, unread | {name: UNREAD for name in names if name not in found}
