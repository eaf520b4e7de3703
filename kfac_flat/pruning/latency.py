"""How long the model takes on its device."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.benchmark import Timer

from kfac_flat.nested import map_tensors
from kfac_flat.pruning.tracing import ExampleInputs


def latency(model: nn.Module, inputs: ExampleInputs, min_run_time: float = 0.1) -> float:
    """Median seconds of one call in eval mode without gradients, on zeros in the shape of the example inputs.

    Args:
        model: On the device to be measured; switched to eval mode.
        inputs: How it is called.
        min_run_time: Seconds to measure for, at least.
    """
    device = next((t.device for t in (*model.parameters(), *model.buffers())), torch.device("cpu"))
    args, kwargs = map_tensors(lambda t: torch.zeros_like(t, device=device), (inputs.args, inputs.kwargs))
    names = {"model": model.eval(), "args": args, "kwargs": kwargs}
    with torch.inference_mode():
        timer = Timer("model(*args, **kwargs)", globals=names, num_threads=torch.get_num_threads())
        return float(timer.blocked_autorange(min_run_time=min_run_time).median)
