"""torchvision's classifiers: half of what can go goes, and what is left computes what the masked network does.

Depth, widths and images are smaller than torchvision's own where its classes allow; the code that runs is theirs. With
``--slow`` they are torchvision's own, on small images where these can be small.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from examples.torchvision_models import models
from tests.pruning.lifecycle import assert_all_is_well, pruned

Make = Callable[[], nn.Module]


def resnet(**options: int) -> nn.Module:
    return models.ResNet(models.resnet.Bottleneck, [2, 1, 1, 1], num_classes=10, **options)


def with_narrow_classifier(model: nn.Module, width: int) -> nn.Module:
    """Replace the classifier, most of the parameters, by one of the same kind."""
    model.classifier = nn.Sequential(
        *(nn.Linear(width, 32), nn.ReLU(inplace=True), nn.Dropout(), nn.Linear(32, 32), nn.ReLU(inplace=True)),
        *(nn.Dropout(), nn.Linear(32, 10)),
    )
    return model


def vgg16_bn() -> nn.Module:
    widths = [width if width == "M" else width // 4 for width in models.vgg.cfgs["D"]]
    model = models.VGG(models.vgg.make_layers(widths, batch_norm=True), init_weights=False)
    return with_narrow_classifier(model, 128 * 7 * 7)


def mobilenet_v2() -> nn.Module:
    settings = [[1, 16, 1, 1], [6, 24, 2, 2], [6, 32, 1, 2], [6, 64, 2, 2], [6, 96, 1, 1], [6, 160, 1, 2]]
    return models.MobileNetV2(num_classes=10, inverted_residual_setting=settings)


def efficientnet() -> nn.Module:
    blocks = [(1, 3, 1, 32, 16, 1), (6, 3, 2, 16, 24, 2), (6, 5, 2, 24, 40, 1), (6, 3, 2, 40, 80, 2)]
    return models.EfficientNet([models.efficientnet.MBConvConfig(*block) for block in blocks], 0.2, num_classes=10)


def regnet() -> nn.Module:
    params = models.regnet.BlockParams.from_init_params(
        depth=6, w_0=48, w_a=27.89, w_m=2.09, group_width=8, se_ratio=0.25
    )
    return models.RegNet(params, num_classes=10)


def convnext() -> nn.Module:
    settings = [(32, 64, 1), (64, 96, 1), (96, 128, 2), (128, None, 1)]
    return models.ConvNeXt([models.convnext.CNBlockConfig(*widths) for widths in settings], num_classes=10)


# Side of the images, the share of the neurons that can go, and how the network is made.
CNNS: dict[str, tuple[int, float, Make]] = {
    "resnet18": (32, 1.0, lambda: models.resnet18(num_classes=10)),
    "resnet50": (32, 1.0, resnet),
    "resnext50_32x4d": (32, 1.0, lambda: resnet(groups=32, width_per_group=4)),
    "vgg16_bn": (32, 1.0, vgg16_bn),
    "alexnet": (64, 1.0, lambda: with_narrow_classifier(models.alexnet(), 256 * 6 * 6)),
    "mobilenet_v2": (32, 1.0, mobilenet_v2),
    "mobilenet_v3_small": (32, 1.0, lambda: models.mobilenet_v3_small(num_classes=10)),
    "densenet121": (32, 1.0, lambda: models.DenseNet(block_config=(3, 2, 2, 2), num_classes=10)),
    "efficientnet_b0": (32, 1.0, efficientnet),
    "googlenet": (64, 1.0, lambda: models.googlenet(num_classes=10, init_weights=False)),
    "inception_v3": (75, 1.0, lambda: models.inception_v3(num_classes=10, init_weights=False, aux_logits=False)),
    "regnet_y_400mf": (32, 1.0, regnet),
    # Its shuffles tie all that stages 2 and 3 hand on into one group each.
    "shufflenet_v2_x1_0": (32, 0.79, lambda: models.shufflenet_v2_x1_0(num_classes=10)),
    "squeezenet1_0": (64, 1.0, lambda: models.squeezenet1_0(num_classes=10)),
    "mnasnet1_0": (64, 1.0, lambda: models.mnasnet1_0(num_classes=10)),
}

# These add up what LayerNorms take their statistics over: only hidden units of MLPs, and torch's own heads, can go.
NORMALISED: dict[str, tuple[int, float, Make]] = {
    "convnext_tiny": (32, 0.59, convnext),
    "vit_b_16": (32, 0.67, lambda: models.VisionTransformer(32, 8, 2, 6, 48, 96, num_classes=10)),
    "swin_t": (32, 0.42, lambda: models.SwinTransformer([4, 4], 24, [2, 2], [3, 6], [4, 4], num_classes=10)),
    "maxvit_t": (48, 0.64, lambda: models.MaxVit((48, 48), 16, 3, [16, 32], [1, 1], 8, 0.0, num_classes=10)),
}


CASES = CNNS | NORMALISED


@pytest.mark.parametrize("name", CASES)
def test_half_of_what_can_go_goes_exactly_and_what_is_left_is_good_for_everything(name: str) -> None:
    size, share, make = CASES[name]
    torch.manual_seed(0)
    x = torch.randn(4, 3, size, size, dtype=torch.float64)
    found = pruned(make, x, x[:1], share)
    before, after = (sum(p.numel() for p in model.parameters()) for model in (found.dense, found.model))
    print(f"{name}: {before / after:.2f} times fewer parameters")
    if share == 1.0:
        assert before > 3.5 * after  # a matrix with half of its rows and columns, but for the first, the last and norms
    assert_all_is_well(found)


# Side of the images, and the share of the neurons that can go, where they are not 64 and all.
OWN_SIZE = {"inception_v3": 299, "vit_b_16": 224, "maxvit_t": 224}
OWN_SHARE = {
    "shufflenet_v2_x1_0": 0.79, "convnext_tiny": 0.64, "vit_b_16": 0.77, "swin_t": 0.43, "maxvit_t": 0.64
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_networks_of_torchvisions_own_size_are_cut_exactly(name: str) -> None:
    options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    torch.manual_seed(0)
    x = torch.randn(2, 3, OWN_SIZE.get(name, 64), OWN_SIZE.get(name, 64), dtype=torch.float64)
    assert_all_is_well(pruned(lambda: getattr(models, name)(**options), x, x[:1], OWN_SHARE.get(name, 1.0)))
