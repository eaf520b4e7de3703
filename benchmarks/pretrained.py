"""Trained weights from a file, such as those that torchvision publishes for its networks."""

from __future__ import annotations

import hashlib
import pickle
from argparse import ArgumentTypeError
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.tasks import Task


@dataclass(frozen=True)
class Weights:
    """A state dict, and the start of the SHA-256 of the file that it was read from."""

    fingerprint: str
    tensors: dict[str, Tensor]

    @classmethod
    def read(cls, text: str) -> Weights:
        """Read a state dict from a file, for argparse."""
        try:
            tensors = torch.load(text, map_location="cpu", weights_only=True)
            fingerprint = hashlib.sha256(Path(text).read_bytes()).hexdigest()[:12]
        except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
            raise ArgumentTypeError(f"{text} cannot be read as a state dict: {error}") from error
        if not isinstance(tensors, Mapping) or not all(isinstance(value, Tensor) for value in tensors.values()):
            raise ArgumentTypeError(f"{text} holds no state dict: give what torch.save(model.state_dict(), ...) writes")
        return cls(fingerprint, dict(tensors))


def starting_from(task: Task, weights: Weights) -> Task:
    """Return the task with networks that start from these weights.

    Raises:
        ValueError: if they are those of another network.
    """

    def network() -> nn.Module:
        model = task.network()
        load_body(model, weights.tensors)
        return model

    network()
    return replace(task, network=network)


def load_body(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Give a classifier the weights of a trained one of the same architecture, but for the last Linear.

    That keeps its random weights, and may have any number of classes.

    Args:
        model: Changed in place.
        weights: The other one's state dict, of the last Linear or without it.

    Raises:
        ValueError: if names or shapes are others than the model's; nothing has changed.

    Example:
        >>> body, head = nn.Linear(4, 8), nn.Linear(8, 3)
        >>> trained = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 1000))
        >>> load_body(nn.Sequential(body, head), trained.state_dict())
        >>> bool((body.weight == trained[0].weight).all()), head
        (True, Linear(in_features=8, out_features=3, bias=True))
    """
    head = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)][-1]
    own = {name: value for name, value in model.state_dict().items() if not name.startswith(f"{head}.")}
    given = {name: value for name, value in weights.items() if not name.startswith(f"{head}.")}
    wrong = [f"{name} is missing" for name in own if name not in given]
    wrong += [f"{name} is not the model's" for name in given if name not in own]
    wrong += [
        f"{name} is {list(given[name].shape)} and should be {list(own[name].shape)}"
        for name in own
        if name in given and given[name].shape != own[name].shape
    ]
    if wrong:
        more = f", and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise ValueError(f"the weights are those of another network: {'; '.join(wrong[:5])}{more}")
    model.load_state_dict(given, strict=False)
