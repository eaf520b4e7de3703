"""Numbers of heads and channels that the model's code also uses elsewhere, and what is left with a single one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kfac_flat import NeuronPruner
from tests.pruning.masking import assert_exact, prune_at_random, pruner_for
from tests.pruning.nets import Attention, Case, Net, conv, images, sequences, transformer

Attend = Callable[[Any, Tensor], Tensor]


def heads_of(net: Any, x: Tensor) -> tuple[Tensor, ...]:
    """Query, key and value, ``[N, heads, T, head_dim]``."""
    n, t, _ = x.shape
    q, k, v = net.qkv(x).reshape(n, t, 3, net.num_heads, net.head_dim).permute(2, 0, 3, 1, 4)
    return q, k, v


def attended(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def pruned(model: nn.Module, inputs: Any, **options: Any) -> NeuronPruner:
    """Prune and compare."""
    dense = copy.deepcopy(model)
    pruner = pruner_for(model, inputs, **options)
    prune_at_random(pruner, model)
    assert_exact(dense, model, pruner.state_dict(), inputs)
    return pruner


def scaled_by_a_tensor(net: Any, x: Tensor) -> Tensor:
    q, k, v = heads_of(net, x)
    return attended(q / torch.sqrt(torch.tensor(float(net.num_heads))), k, v)


def written_out(net: Any, x: Tensor) -> Tensor:
    n, t, _ = x.shape
    q, k, v = net.qkv(x).reshape(n, t, 3, 4, -1).permute(2, 0, 3, 1, 4)
    return attended(q, k, v)


class SplitInput(Attention):
    """The number of heads also divides what comes from outside."""

    def forward(self, x: Tensor, outside: Tensor) -> Tensor:
        gate = outside.reshape(outside.shape[0], outside.shape[1], self.num_heads, -1).amax(-1).mean(-1, keepdim=True)
        return super().forward(x) * gate


def split_input() -> nn.Module:
    def forward(net: Any, x: Tensor) -> Tensor:
        inside = net.embed(x)
        return net.head((inside + net.attention(inside, x)).mean(1))

    attention = SplitInput(lambda net, x: attended(*heads_of(net, x)))
    return Net(forward, embed=nn.Linear(8, 8), attention=attention, head=nn.Linear(8, 3))


def test_heads_whose_number_also_divides_what_is_no_neuron_stay() -> None:
    model, inputs = Case(split_input, lambda n: torch.randn(n, 10, 8, dtype=torch.float64)).build()
    pruner = pruned(model, inputs, target=0.1)
    assert pruner.widths["attention.qkv"] == 36
    assert "attention.qkv" in pruner.frozen


def test_heads_whose_number_is_made_into_a_tensor_stay() -> None:
    pruner = pruned(*Case(transformer(scaled_by_a_tensor), sequences).build(), target=0.1)
    assert "numbers that depend on the number of neurons" in pruner.frozen["attention.qkv"]


def test_a_tensor_made_of_the_number_of_heads_that_meets_no_head_is_refused() -> None:
    def attend(net: Any, x: Tensor) -> Tensor:
        return attended(*heads_of(net, x))

    model, inputs = Case(transformer(attend), sequences).build()
    forward = model._forward
    model._forward = lambda net, x: forward(net, x) * torch.ones(net.attention.num_heads).sum()
    with pytest.raises(ValueError, match="numbers that depend on the number of neurons, whichever"):
        pruner_for(model, inputs, target=0.1)


def test_a_number_of_heads_written_out_is_not_taken_for_an_attribute_that_happens_to_equal_it() -> None:
    model, inputs = Case(transformer(written_out), sequences).build()
    pruner = pruned(model, inputs, target=0.1)
    assert "attention.qkv" in pruner.frozen
    assert model.attention.num_heads == 4


def test_noise_made_by_the_models_code_is_no_number_that_depends_on_neurons() -> None:
    def forward(net: Any, x: Tensor) -> Tensor:
        return net.head(F.relu(net.a(x)).mean((2, 3)) + 0 * torch.rand(()))

    model, inputs = Case(lambda: Net(forward, a=conv(2, 8), head=nn.Linear(8, 3)), images).build()
    state = torch.get_rng_state()
    pruner = pruner_for(model, inputs, target=0.4)
    assert torch.equal(torch.get_rng_state(), state)
    assert set(pruner.frozen) == {"head"}


def normed(net: Any, x: Tensor) -> Tensor:
    q, k, v = heads_of(net, x)
    return attended(net.norm(q), net.norm(k), v)


def rotated(net: Any, x: Tensor) -> Tensor:
    q, k, v = heads_of(net, x)
    angle = torch.linspace(0, 1, net.head_dim, dtype=torch.float64) * torch.arange(10).unsqueeze(1)
    q, k = (t * angle.cos() + torch.cat([-t[..., 1:], t[..., :1]], -1) * angle.sin() for t in (q, k))
    return attended(q, k, v)


@pytest.mark.parametrize("attend", [normed, rotated])
def test_queries_and_keys_may_be_normalised_or_rotated_down_to_the_last_head(attend: Attend) -> None:
    def build() -> nn.Module:
        model = transformer(attend)()
        model.attention.norm = nn.LayerNorm(3)
        return model

    pruner = pruned(*Case(build, sequences).build(), target=0.36, ignore=("mlp",))
    assert pruner.widths["attention.qkv"] == 9


def test_channels_multiplied_by_a_map_from_outside_can_go_but_for_one() -> None:
    def forward(net: Any, x: Tensor) -> Tensor:
        return net.head(F.relu(net.b(F.relu(net.a(x)) * x.mean(1, keepdim=True))).mean((2, 3)))

    layers: dict[str, nn.Module] = {"a": conv(2, 6), "b": conv(6, 4), "head": nn.Linear(4, 3)}
    model, inputs = Case(lambda: Net(forward, **layers), images).build()
    assert pruned(model, inputs, target=0.5, ignore=("b",)).widths["a"] == 1
