"""Networks of other kinds than torchvision's: what can go goes exactly, and what cannot is named with the reason."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kfac_flat.attention import FewerHeadsAttention
from tests.pruning.lifecycle import Pruned, assert_all_is_well, attentions_of, pruned
from tests.pruning.zoo import HEADS, ZOO


def half(name: str) -> Pruned:
    torch.manual_seed(0)
    specimen = ZOO[name]
    return pruned(specimen.make, specimen.inputs(5), specimen.inputs(1), specimen.share)


# torch.export says so of every LSTM.
@pytest.mark.filterwarnings(r"ignore:The tensor attributes self\.lstm\._flat_weights:UserWarning")
@pytest.mark.parametrize("name", ZOO)
def test_half_of_what_can_go_goes_exactly_and_what_is_left_is_good_for_everything(name: str) -> None:
    assert_all_is_well(half(name))


@pytest.mark.parametrize("name", ZOO)
def test_what_stays_whole_is_named_with_the_reason(name: str) -> None:
    frozen = half(name).pruner.frozen
    others = frozen.keys() - ZOO[name].reasons.keys()
    assert all("has no rule" in frozen[layer] for layer in others)  # embeddings, recurrent layers
    for layer, reason in ZOO[name].reasons.items():
        assert reason in frozen[layer]


def heads_of(positions: Tensor, head_dim: int) -> list[int]:
    """Return which heads these output channels of query, key and value are; they must be whole, and the same thrice."""
    rows = positions.view(3, -1, head_dim)
    assert torch.equal(rows % head_dim, torch.arange(head_dim).expand_as(rows))
    heads = rows[..., 0] // head_dim
    assert torch.equal(heads - HEADS * torch.arange(3)[:, None], heads[:1].expand_as(heads))
    return heads[0].tolist()


def channels_of(heads: list[int], head_dim: int) -> Tensor:
    return torch.arange(HEADS * head_dim).view(HEADS, head_dim)[heads].flatten()


@pytest.mark.parametrize("name", ["gpt", "gpt_tied"])
def test_heads_of_a_language_model_go_whole_and_its_numbers_follow(name: str) -> None:
    found = half(name)
    for i, block in enumerate(found.model.blocks):
        layers = {part: found.pruner.state_dict()["layers"][f"blocks.{i}.{part}"] for part in ("qkv", "proj")}
        kept = heads_of(layers["qkv"]["out"], block.head_dim)
        assert 0 < len(kept) < HEADS
        assert torch.equal(layers["proj"]["in"], channels_of(kept, block.head_dim))
        assert (block.n_head, block.head_dim) == (len(kept), found.dense.blocks[i].head_dim)
        assert block.mlp[0].out_features < found.dense.blocks[i].mlp[0].out_features
    assert (found.model.head.weight is found.model.tokens.weight) == (name == "gpt_tied")


@pytest.mark.parametrize("name", ["transformer", "transformer_batch_second"])
def test_heads_of_torchs_attention_go_whole_and_it_becomes_one_of_fewer_heads(name: str) -> None:
    found = half(name)
    for path, module in attentions_of(found.model).items():
        layers = found.pruner.state_dict()["layers"]
        kept = heads_of(layers[path]["out"], module.head_dim)
        assert 0 < len(kept) < HEADS
        assert torch.equal(layers[f"{path}.out_proj"]["in"], channels_of(kept, module.head_dim))
        assert type(module) is FewerHeadsAttention
        assert (module.num_heads, module.head_dim) == (len(kept), found.dense.get_submodule(path).head_dim)
