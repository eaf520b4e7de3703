"""Attention that may lose heads computes what torch's own does, whatever it is called with."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kfac_flat.attention import FewerHeadsAttention, call_projections
from tests.pruning.masking import distance

WIDTH, HEADS, EXAMPLES, QUERIES, KEYS = 12, 3, 4, 5, 7

# Where True, nothing is attended to; no query and no example is left without a key.
PADDING = torch.arange(KEYS) >= torch.tensor([[7], [6], [3], [1]])
HIDDEN = torch.ones(QUERIES, KEYS, dtype=torch.bool).triu(1)


def as_numbers(mask: Tensor) -> Tensor:
    """A mask that is added: minus infinity where the other is True, not the same everywhere else."""
    added = torch.linspace(-1, 1, mask.numel(), dtype=torch.float64).view(mask.shape)
    return added.masked_fill(mask, -torch.inf)


MASKS: dict[str, dict[str, Tensor | bool]] = {
    "none": {},
    "padding": {"key_padding_mask": PADDING},
    "padding_added": {"key_padding_mask": as_numbers(PADDING)},
    "hidden": {"attn_mask": HIDDEN},
    "hidden_added": {"attn_mask": as_numbers(HIDDEN)},
    "causal": {"attn_mask": HIDDEN, "is_causal": True},
    "both": {"attn_mask": HIDDEN, "key_padding_mask": PADDING},
    "both_added": {"attn_mask": as_numbers(HIDDEN), "key_padding_mask": as_numbers(PADDING)},
    "both_causal": {"attn_mask": HIDDEN, "key_padding_mask": PADDING, "is_causal": True},
}


def attention(**options: Any) -> tuple[nn.MultiheadAttention, nn.MultiheadAttention]:
    """Return torch's attention with random weights and biases, and the same as it is once heads can go."""
    torch.manual_seed(0)
    ours = nn.MultiheadAttention(WIDTH, HEADS, dtype=torch.float64, **options)
    with torch.no_grad():
        for p in ours.parameters():
            p.normal_()
    theirs = copy.deepcopy(ours)
    ours.__class__ = FewerHeadsAttention
    return theirs, ours


def sequences(batch_first: bool = False, batched: bool = True) -> list[Tensor]:
    """Query, key and value."""
    shapes = [(EXAMPLES, length, WIDTH) for length in (QUERIES, KEYS, KEYS)]
    found = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    if not batched:
        return [t[-1] for t in found]
    return found if batch_first else [t.transpose(0, 1) for t in found]


def results(module: nn.MultiheadAttention, args: list[Tensor], **options: Any) -> list[Tensor]:
    return [t.detach() for t in module(*args, **options) if t is not None]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("layout", ["batch_first", "batch_second", "unbatched"])
def test_it_is_torchs_attention_whatever_the_arguments(layout: str, mask: str, training: bool) -> None:
    batched, options = layout != "unbatched", dict(MASKS[mask])
    if not batched and "key_padding_mask" in options:
        options["key_padding_mask"] = options["key_padding_mask"][-1]
    for bias, need_weights, average in itertools.product([True, False], repeat=3):
        theirs, ours = attention(bias=bias, batch_first=layout == "batch_first")
        args = sequences(theirs.batch_first, batched)
        options |= {"need_weights": need_weights, "average_attn_weights": average}
        expected, found = (results(m.train(training), args, **options) for m in (theirs, ours))
        assert len(found) == 1 + need_weights
        assert distance(found, expected) < 1e-12


@pytest.mark.parametrize("mask", [mask for mask in MASKS if mask != "none"])
def test_each_of_the_masks_matters(mask: str) -> None:
    _, ours = attention()
    args = sequences()
    assert distance(results(ours, args, **MASKS[mask]), results(ours, args)) > 1e-3


def test_gradients_are_torchs_too() -> None:
    gradients = []
    for module in attention():
        torch.manual_seed(1)
        module(*sequences(), key_padding_mask=PADDING, need_weights=False)[0].square().sum().backward()
        gradients.append([p.grad for p in module.parameters()])
    assert distance(gradients[1], gradients[0]) < 1e-12


def test_dropout_falls_on_the_weights_in_train_mode_only() -> None:
    theirs, ours = attention(dropout=0.5)
    args = sequences()
    whole = results(theirs.eval(), args, average_attn_weights=False)
    assert distance(results(ours.eval(), args, average_attn_weights=False), whole) < 1e-12
    _, dropped = results(ours.train(), args, average_attn_weights=False)
    kept = dropped != 0
    assert 0 < kept.sum() < kept.numel()
    assert torch.allclose(dropped[kept], 2 * whole[1][kept])


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("added", [True, False])
def test_a_mask_may_differ_from_head_to_head(need_weights: bool, added: bool) -> None:
    theirs, ours = attention()
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(EXAMPLES * HEADS, QUERIES, KEYS, generator=generator, dtype=torch.float64)
    options = {"attn_mask": mask if added else mask > 0.6, "key_padding_mask": None, "need_weights": need_weights}
    args = sequences()
    assert distance(results(ours, args, **options), results(theirs, args, **options)) < 1e-12
    assert distance(results(ours, args, need_weights=need_weights), results(theirs, args, **options)) > 1e-3


@pytest.mark.parametrize("need_weights", [True, False])
def test_a_mask_for_heads_that_are_gone_is_refused(need_weights: bool) -> None:
    _, ours = attention()
    mask = torch.zeros(EXAMPLES * (HEADS + 1), QUERIES, KEYS, dtype=torch.bool)
    with pytest.raises(ValueError, match="4 examples with 3 heads each are left"):
        ours(*sequences(), attn_mask=mask, need_weights=need_weights)


@pytest.mark.parametrize("mask", [mask for mask in MASKS if mask != "causal"])  # where torch masks what is appended
@pytest.mark.parametrize(
    "options",
    [
        {"add_bias_kv": True},
        {"add_zero_attn": True},
        {"add_bias_kv": True, "add_zero_attn": True},
        {"kdim": 5, "vdim": 7},
        {"kdim": 5, "bias": False, "add_bias_kv": True},
    ],
    ids=lambda options: " ".join(options),
)
def test_keys_and_values_of_its_own_or_other_widths_are_as_in_torch(options: dict[str, Any], mask: str) -> None:
    theirs, ours = attention(**options)
    q, k, v = sequences()
    args = [q, k[..., : options.get("kdim", WIDTH)], v[..., : options.get("vdim", WIDTH)]]
    for need_weights in (True, False):
        expected, found = (results(m, args, need_weights=need_weights, **MASKS[mask]) for m in (theirs, ours))
        assert distance(found, expected) < 1e-12


def test_the_hint_that_attention_is_causal_asks_for_the_mask_as_torchs_does() -> None:
    for module in attention():
        with pytest.raises(RuntimeError, match="is_causal"):
            module(*sequences(), is_causal=True)


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("layout", ["batch_first", "batch_second", "unbatched"])
def test_what_dropout_draws_behind_it_is_what_it_draws_behind_torchs(layout: str, need_weights: bool) -> None:
    """Dropout draws in the order of memory, not of axes."""
    theirs, ours = attention(batch_first=layout == "batch_first")
    args = sequences(theirs.batch_first, batched=layout != "unbatched")
    projecting = copy.deepcopy(theirs)
    call_projections(projecting)
    expected = theirs(*args, need_weights=need_weights)[0]
    for module in (ours, projecting):
        found = module(*args, need_weights=need_weights)[0]
        assert found.stride() == expected.stride()
        with torch.random.fork_rng():
            masks = []
            for t in (found, expected):
                torch.manual_seed(1)
                masks.append(nn.functional.dropout(t, 0.5).detach())
        assert distance(masks[:1], masks[1:]) < 1e-12
