"""timm's architectures: half of what can go goes, and what is left computes what the masked network does.

Depth, widths and images are as small as timm's constructors allow; the code that runs is theirs.
"""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import nn

from tests.pruning.lifecycle import assert_accounted_for, assert_masked, assert_reloads, pruned
from tests.pruning.masking import pruner_for

# Side of the images, the share of the neurons that can go, the architecture, and what makes it small.
CNNS: dict[str, tuple[int, float, str, dict[str, Any]]] = {
    "resnet": (32, 1.0, "resnet10t", {"channels": (16, 24, 32, 48), "stem_width": 16}),
    "efficientnet": (32, 1.0, "test_efficientnet", {}),
    "mobilenetv3": (32, 1.0, "mobilenetv3_small_050", {}),
    "densenet": (32, 1.0, "densenet121", {"block_config": (2, 2, 2), "growth_rate": 8}),
    "regnet": (32, 1.0, "regnetx_002", {}),
    "regnet, SE": (32, 1.0, "regnety_002", {}),
    "repvgg": (32, 1.0, "test_byobnet", {}),
    "ghostnet": (32, 1.0, "ghostnet_050", {}),
    "mnasnet": (32, 1.0, "mnasnet_small", {}),
}
SWIN = {"drop_path_rate": 0.0, "img_size": 32, "window_size": 4, "embed_dim": 24, "depths": (1, 1), "num_heads": (3, 6)}
PARTLY: dict[str, tuple[int, float, str, dict[str, Any]]] = {
    # What LayerNorms take their statistics over stays whole.
    "convnext": (32, 0.62, "test_convnext", {}),
    "vit": (32, 0.73, "test_vit", {"img_size": 32}),
    "swin": (32, 0.4, "swin_tiny_patch4_window7_224", SWIN),
    "coat": (64, 0.43, "coat_lite_tiny", {"img_size": 64, "embed_dims": (16,) * 4, "serial_depths": (1,) * 4}),
}
CASES = CNNS | PARTLY


def build(name: str) -> nn.Module:
    """Make a network in which every block matters, each time."""
    _, _, architecture, options = CASES[name]
    model = timm.create_model(architecture, num_classes=10, drop_rate=0.0, **options)
    for parameter, p in model.named_parameters():
        if parameter.endswith("gamma"):
            nn.init.ones_(p)  # initialised so small that no block would matter
    return model


@pytest.mark.filterwarnings("ignore:these submodules cannot be traced")
@pytest.mark.parametrize("name", CASES)
def test_half_of_what_can_go_goes_exactly_and_the_rest_is_named(name: str) -> None:
    size, share, _, _ = CASES[name]
    torch.manual_seed(0)
    x = torch.randn(4, 3, size, size, dtype=torch.float64)
    found = pruned(lambda: build(name), x, x[:1], share)
    assert_masked(found)
    assert_accounted_for(found)
    assert_reloads(found)


@pytest.mark.parametrize("name", CNNS)
def test_all_but_the_output_of_a_convolutional_network_can_go(name: str) -> None:
    size, _, architecture, _ = CASES[name]
    pruner = pruner_for(build(name), torch.zeros(1, 3, size, size), max_share=1.0)
    least = pruner._left.removal(pruner._left.fewest([0.0] * len(pruner._groups.ids), 0.0, pruner._options)).left.size
    print(f"{name} ({architecture}): {1 - least.parameters / pruner.size.parameters:.1%} of the parameters can go")
    assert set(pruner.frozen.values()) == {"forms the model's output"}
    assert least.parameters < 0.02 * pruner.size.parameters


def test_layers_with_weights_standardised_over_what_they_read_are_named() -> None:
    frozen = pruner_for(timm.create_model("test_nfnet"), torch.zeros(1, 3, 32, 32), target=0.05).frozen
    assert "ScaledStdConv2d has no rule" in frozen["stem.conv1"]
