"""torchvision's classifiers: half of the neurons go, and what is left computes what the masked network does."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from benchmarks.torchvision_models import models
from tests.pruning.masking import assert_unlike, layers_of, masked, outputs_of, prune_at_random, pruner_for, widths_of

# Name, size of the images, share of the neurons that can go at least.
CASES = [
    ("resnet18", 64, 1.0),
    ("resnext50_32x4d", 64, 1.0),
    ("mobilenet_v3_small", 64, 1.0),
    ("squeezenet1_0", 64, 1.0),
    ("shufflenet_v2_x1_0", 64, 1.0),
    ("densenet121", 64, 1.0),
    ("efficientnet_b0", 64, 1.0),
    ("googlenet", 96, 0.7),
    ("convnext_tiny", 64, 0.6),
]


def randomised(name: str, size: int) -> tuple[nn.Module, Tensor]:
    """Build a network in float64 with random affine parameters and calibrated BatchNorm, in which signals survive."""
    torch.manual_seed(0)
    options = {"init_weights": True} if name == "googlenet" else {}
    model = getattr(models, name)(num_classes=10, **options).double()
    for module in model.modules():
        if isinstance(module, nn.Dropout) or "StochasticDepth" in type(module).__name__:
            module.p = 0.0  # train mode is compared as well
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
            module.momentum = None
    for parameter_name, p in model.named_parameters():
        if parameter_name.endswith("layer_scale"):
            nn.init.ones_(p)  # initialised so small that no block would matter
    x = torch.randn(4, 3, size, size, dtype=torch.float64)
    with torch.no_grad():
        model.train()(x)
    return model, x


@pytest.mark.parametrize(("name", "size", "share"), CASES)
def test_pruned_equals_masked_and_trains_on(name: str, size: int, share: float) -> None:
    model, x = randomised(name, size)
    dense = copy.deepcopy(model)
    pruner = pruner_for(model, x[:1], target=0.5 if share == 1.0 else share / 2)
    removable = int(pruner._groups.neurons.sum())
    assert removable >= share * pruner.size.neurons
    prune_at_random(pruner, model)
    manifest = pruner.state_dict()["layers"]
    columns = {
        layer: set(range(widths_of(module)[0])) - set(manifest[layer]["in"].tolist())
        for layer, module in layers_of(dense).items()
        if layer in manifest and not (getattr(module, "groups", 1) == getattr(module, "in_channels", 0) > 1)
    }
    reference = masked(dense, columns)
    for training in (False, True):
        whole, expected, found = (outputs_of(m.train(training), x) for m in (dense, reference, model))
        assert_unlike(expected, whole, found)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    result = model.train()(x)
    sum(t.square().mean() for t in (result if isinstance(result, tuple) else [result])).backward()
    optimizer.step()
    assert all(p.isfinite().all() for p in model.parameters())
