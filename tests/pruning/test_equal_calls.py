"""What saves time while models are traced changes nothing: results of equal calls, tensors without data, no garbage."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import Tensor

from kfac_flat.nested import tensors
from kfac_flat.pruning.collection import no_collection
from kfac_flat.pruning.faithful import Results
from kfac_flat.pruning.tracing import empty

aten = torch.ops.aten


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def layout(value: Any) -> list[tuple[Any, ...]]:
    return [(t.shape, t.stride(), t.dtype, t.device) for t in tensors(value)]


CALLS = [
    (aten.add.Tensor, (meta(3, 4), meta(4)), {}),
    (aten.add.Tensor, (meta(3, dtype=torch.int64), 1), {}),
    (aten.add.Tensor, (meta(3, dtype=torch.int64), 1.0), {}),
    (aten.add.Tensor, (meta(3, dtype=torch.bool), True), {}),
    (aten.add.Tensor, (meta(3, dtype=torch.bool), 1), {}),
    (aten.sum.dim_IntList, (meta(3, 4), [1], True), {}),
    (aten.sum.dim_IntList, (meta(3, 4), [1], False), {}),
    (aten.sum.dim_IntList, (meta(3, 4), [1]), {"dtype": torch.float64}),
    (aten.sum.dim_IntList, (meta(4, 3).t(), [1]), {}),
    (aten.clone.default, (meta(4, 3).t(),), {}),
    (aten.max.dim, (meta(3, 4), 0), {}),
    (aten.cat.default, ([meta(3, 4), meta(3, 2)], 1), {}),
    (aten.cat.default, ([meta(3, 4), meta(5, 4)], 0), {}),
    (aten.unbind.int, (meta(3, 4),), {}),
    (aten.view.default, (meta(3, 4), [12]), {}),
]


def test_equal_calls_return_what_torch_does_and_never_the_same_tensor() -> None:
    results = Results()
    for func, args, kwargs in CALLS:
        expected = layout(func(*args, **kwargs))
        first, second = results.of(func, args, kwargs), results.of(func, args, kwargs)
        assert layout(first) == layout(second) == expected, func
        assert not {id(t) for t in tensors(first)} & {id(t) for t in tensors(second)}


def test_a_change_in_place_is_made_each_time() -> None:
    results, x = Results(), meta(3, 4)
    assert results.of(aten.add_.Tensor, (x, 1), {}) is x
    before = x._version
    assert results.of(aten.add_.Tensor, (x, 1), {}) is x
    assert x._version == before + 1


def test_what_has_data_is_computed_each_time() -> None:
    results = Results()
    for value in (1.0, 2.0):
        assert results.of(aten.mul.Tensor, (torch.full((2,), value), 3.0), {}).tolist() == [3 * value] * 2


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_tensor_without_data_lies_in_memory_as_the_one_that_it_is_like(device: str) -> None:
    image = torch.empty(2, 3, 4, 5, dtype=torch.float16, device=device)
    for t in (
        image,
        image.to(memory_format=torch.channels_last),
        image.transpose(1, 3),
        image[:, :, 0],
        image[0, 0, 0, 0],
    ):
        assert layout(empty(t)) == layout(torch.empty_like(t, device="meta"))


@pytest.mark.parametrize("collects", [True, False])
def test_garbage_collection_is_afterwards_as_it_was(collects: bool) -> None:
    was = gc.isenabled()
    try:
        (gc.enable if collects else gc.disable)()
        with no_collection(), no_collection():
            assert not gc.isenabled()
        assert gc.isenabled() == collects
        with pytest.raises(ValueError, match="inside"), no_collection():
            raise ValueError("inside")
        assert gc.isenabled() == collects
    finally:
        (gc.enable if was else gc.disable)()
