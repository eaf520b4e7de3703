"""torchvision's models, data sets and transforms, also beside a torch for which its operators were not built."""

from __future__ import annotations

from torch import library

try:
    from torchvision import datasets, models, transforms
except RuntimeError as error:
    if "torchvision::nms" not in str(error):
        raise
    # These need none of the compiled operators, only that these have been declared.
    LIBRARY = library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        LIBRARY.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    from torchvision import datasets, models, transforms

__all__ = ["datasets", "models", "transforms"]
