"""Where the shape of a result is taken as known, it is the one that torch computes."""

from __future__ import annotations

import operator
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from kfac_flat.pruning import rules

SIZES = st.lists(st.integers(1, 3), max_size=4)


@given(st.sampled_from([operator.add, operator.mul, torch.sub, torch.maximum]), SIZES, SIZES)
def test_a_result_is_like_the_operand_that_the_other_is_repeated_to(
    target: Any, one: list[int], other: list[int]
) -> None:
    a, b = torch.ones(one), torch.ones(other)
    try:
        result = target(a, b)
    except RuntimeError:
        result = None
    like = rules.same_as_result(target, (a, b), {})
    repeated_both = result is not None and result.shape not in (a.shape, b.shape)
    if result is None or repeated_both:
        assert like is None
    elif rules.find(target) is not None:
        assert like is not None
        assert (like.shape, like.dtype) == (result.shape, result.dtype)


@pytest.mark.parametrize("other", [torch.ones(2, dtype=torch.float64), torch.ones(2, dtype=torch.long)])
def test_nothing_is_known_of_a_result_of_mixed_types(other: torch.Tensor) -> None:
    assert rules.same_as_result(operator.add, (torch.ones(3, 2), other), {}) is None
