"""All that must hold of a network that lost neurons: what it computes, what is said of it, and what it is good for."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kfac_flat import NeuronPruner, shrink
from tests.pruning.masking import assert_exact, distance, layers_of, outputs_of, prune_at_random, pruner_for, widths_of
from tests.pruning.nets import LAYERS, NORMS, call


def randomise(model: nn.Module, inputs: Any) -> nn.Module:
    """Make the model float64 with random affine parameters and calibrated BatchNorm, so that signals survive in it."""
    model.double()
    for module in model.modules():
        if isinstance(module, nn.Dropout) or "StochasticDepth" in type(module).__name__:
            module.p = 0.0  # train mode is compared as well
        if isinstance(module, NORMS) and module.weight is not None:
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            module.momentum = None
        if isinstance(module, LAYERS) and not module.weight.any():
            nn.init.normal_(module.weight, std=0.1)  # heads that begin at zero
    for name, p in model.named_parameters():
        if name.endswith("layer_scale"):
            nn.init.ones_(p)  # initialised so small that no block would matter
    with torch.no_grad():
        call(model.train(), inputs)
    return model


class SpelledAttention(nn.Module):
    """The textbook's multi-head attention, of an ``nn.MultiheadAttention``'s weights, with layers that can be watched.

    Its arguments are those of a call without positional masks; needs no weights.
    """

    def __init__(self, original: nn.MultiheadAttention) -> None:
        super().__init__()
        width, dtype = original.embed_dim, original.in_proj_weight.dtype
        self.heads, self.batch_first = original.num_heads, original.batch_first
        self.inside = nn.Linear(width, 3 * width, dtype=dtype)
        self.inside.weight, self.inside.bias = original.in_proj_weight, original.in_proj_bias
        self.out_proj = nn.Linear(width, width, dtype=dtype)
        self.out_proj.weight, self.out_proj.bias = original.out_proj.weight, original.out_proj.bias

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
    ) -> tuple[Tensor, None]:
        assert query is key
        assert query is value
        x = query if self.batch_first else query.transpose(0, 1)
        n, t, width = x.shape
        q, k, v = self.inside(x).view(n, t, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        scores = torch.einsum("nhtd,nhsd->nhts", q, k) / (width // self.heads) ** 0.5
        if key_padding_mask is not None:
            scores = scores.masked_fill(key_padding_mask[:, None, None], -torch.inf)
        if attn_mask is not None:
            scores = scores.masked_fill(attn_mask, -torch.inf)
        out = self.out_proj(torch.einsum("nhts,nhsd->nthd", scores.softmax(-1), v).flatten(2))
        return (out if self.batch_first else out.transpose(0, 1)), None


def attentions_of(model: nn.Module) -> dict[str, nn.MultiheadAttention]:
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.MultiheadAttention)}


def spelled(model: nn.Module) -> nn.Module:
    """Copy a model, its multi-head attention written out."""
    model = copy.deepcopy(model)
    for name, module in attentions_of(model).items():
        model.set_submodule(name, SpelledAttention(module))
    return model


@dataclass(frozen=True)
class Pruned:
    """A network before and after it lost neurons, how it is made anew, and what it is called with."""

    make: Callable[[], nn.Module]
    dense: nn.Module
    model: nn.Module
    pruner: NeuronPruner
    inputs: Any


def share_that_can_go(pruner: NeuronPruner) -> float:
    """Return the share of the neurons that are in groups which can go and are not all that a layer has."""
    outputs = [pruner._channels[name].outputs for name in pruner._graph.hidden]
    last = {int(groups[0]) for groups in outputs if (groups == groups[0]).all()}
    return sum(int(g) not in last | {0} for g in torch.cat(outputs)) / pruner.size.neurons


def pruned(make: Callable[[], nn.Module], inputs: Any, example: Any, share: float = 1.0, **options: Any) -> Pruned:
    """Build a random network and take half of what can go, evenly from all layers, if nothing else is said.

    Args:
        make: Builds it.
        inputs: What it is called with.
        example: The pruner's example inputs.
        share: The share of the neurons that can go, to two digits.
        **options: The pruner's.
    """
    torch.manual_seed(0)
    model = randomise(make(), inputs)
    dense = copy.deepcopy(model)
    pruner = pruner_for(model, example, target=share / 2, **({"ranking": "layer"} | options))
    assert share == round(share_that_can_go(pruner), 2)
    prune_at_random(pruner, model)
    before, after = pruner.history[0].before.neurons, pruner.history[0].after.neurons
    assert before - after >= round(share / 2 * before)
    return Pruned(make, dense, model, pruner, inputs)


def assert_masked(found: Pruned) -> None:
    """Assert that the pruned network computes what the dense one does without what was removed."""
    manifest, attentions = found.pruner.state_dict(), attentions_of(found.dense)
    whole = spelled(found.dense) if attentions else found.dense
    assert distance(outputs_of(whole, found.inputs), outputs_of(found.dense, found.inputs)) < 1e-12
    layers: Mapping[str, Any] = {
        f"{name}.inside" if name in attentions else name: entry for name, entry in manifest["layers"].items()
    }
    assert_exact(whole, found.model, {"layers": layers}, found.inputs)


def assert_accounted_for(found: Pruned) -> None:
    """Assert that every layer lost neurons, or is named with the reason, or has but one neuron or head left."""
    widths = {name: widths_of(module)[1] for name, module in layers_of(found.dense).items()}
    widths |= {name: 3 * module.embed_dim for name, module in attentions_of(found.dense).items()}
    assert found.pruner.widths.keys() == widths.keys()
    for name, width in found.pruner.widths.items():
        assert width < widths[name] or width == 1 or found.pruner.frozen[name], f"{name} is silently untouched"


def numbers_of(model: nn.Module) -> dict[str, Any]:
    """Class and whole numbers of every module: widths, heads, groups."""
    return {
        name: (type(module), {key: value for key, value in vars(module).items() if type(value) is int})
        for name, module in model.named_modules()
    }


def assert_reloads(found: Pruned) -> None:
    """Assert that a fresh model takes the shape from the manifest, takes the weights, and computes the same."""
    file = io.BytesIO()
    torch.save({"pruner": found.pruner.state_dict(), "model": found.model.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    torch.manual_seed(1)
    fresh = shrink(found.make().double(), saved["pruner"])
    fresh.load_state_dict(saved["model"])
    assert numbers_of(fresh) == numbers_of(found.model)
    expected, computed = (outputs_of(m.eval(), found.inputs) for m in (found.model, fresh))
    assert all(map(torch.equal, expected, computed))


def assert_exports(found: Pruned) -> None:
    """Assert that ``torch.export`` takes the pruned model, and that its program computes the same."""
    args = found.inputs if isinstance(found.inputs, tuple) else (found.inputs,)
    program = torch.export.export(found.model.eval(), args)
    with torch.no_grad():
        computed = program.module()(*args)
    assert distance([computed], outputs_of(found.model, found.inputs)) < 1e-12


def assert_trains_on(found: Pruned) -> None:
    """Assert that a step of the same optimizer moves every parameter that had a gradient, to finite values."""
    optimizer = found.pruner._optimizer
    optimizer.param_groups[0]["lr"] = 1e-3
    result = call(found.model.train(), found.inputs)
    sum(t.square().mean() for t in (result if isinstance(result, tuple) else [result])).backward()
    moving = {name: p.detach().clone() for name, p in found.model.named_parameters() if p.grad.any()}
    optimizer.step()
    assert moving
    for name, p in found.model.named_parameters():
        assert p.isfinite().all()
        assert name not in moving or not torch.equal(p, moving[name])


def assert_all_is_well(found: Pruned) -> None:
    """Assert all of it; the last changes the model."""
    assert_masked(found)
    assert_accounted_for(found)
    assert_reloads(found)
    assert_exports(found)
    assert_trains_on(found)
