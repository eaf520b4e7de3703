"""What a cut saves is told before it is made, in parameters and multiply-accumulates."""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from kfac_flat.pruning import layers
from kfac_flat.pruning.costs import Costs
from kfac_flat.pruning.graph import Channels, NeuronGraph, kept_without
from kfac_flat.pruning.groups import Groups
from kfac_flat.pruning.surgery import Surgery
from tests.pruning.choosing import cheapest
from tests.pruning.masking import is_depthwise
from tests.pruning.nets import CASES, LAYERS, Case, Net, call, conv, images, sequences

N = 2  # examples in a batch


def depthwise_transposed() -> nn.Module:
    def forward(net: Any, x: Tensor) -> Tensor:
        x = torch.relu(net.norm(net.depthwise(torch.relu(net.stem(x)))))
        return net.fc(torch.relu(net.up(torch.relu(net.grouped(x)))).mean((2, 3)))

    return Net(
        forward, stem=conv(2, 6, bias=False), depthwise=conv(6, 12, groups=6, stride=2), norm=nn.BatchNorm2d(12),
        grouped=conv(12, 8, groups=2), up=nn.ConvTranspose2d(8, 5, 3, stride=2), fc=nn.Linear(5, 3),
    )  # fmt: skip


def called_at_two_sizes() -> nn.Module:
    """One module runs on images of two sizes; another is tied to it by its weight, not by its bias."""

    def forward(net: Any, x: Tensor) -> Tensor:
        x = torch.relu(net.stem(x))
        x = torch.relu(net.shared(nn.functional.max_pool2d(torch.relu(net.shared(x)), 2)))
        return net.fc(torch.relu(net.tied(x)).mean((2, 3)))

    net = Net(forward, stem=conv(2, 7), shared=conv(7, 7), tied=conv(7, 7), fc=nn.Linear(7, 3))
    net.tied.weight = net.shared.weight
    return net


def torch_attention() -> nn.Module:
    def forward(net: Any, x: Tensor) -> Tensor:
        x = net.embed(x.transpose(1, 2))
        x = x + net.attention(x, x, x, need_weights=False)[0]
        return net.head(torch.relu(net.hidden(x)).mean(1))

    attention = nn.MultiheadAttention(12, 4, batch_first=True)
    return Net(
        forward, embed=nn.Linear(2, 12), attention=attention, hidden=nn.Linear(12, 9), head=nn.Linear(9, 3)
    )  # fmt: skip


def attention_to_fewer() -> nn.Module:
    """Ten queries and four keys for each example."""

    def forward(net: Any, x: Tensor) -> Tensor:
        x = torch.relu(net.embed(x.transpose(1, 2)))
        x = net.attention(x, x[:, :4], x[:, :4], need_weights=False)[0]
        return net.head(torch.relu(net.hidden(x)).mean(1))

    attention = nn.MultiheadAttention(12, 4, batch_first=True)
    return Net(
        forward, embed=nn.Linear(2, 12), attention=attention, hidden=nn.Linear(12, 9), head=nn.Linear(9, 3)
    )  # fmt: skip


NETS = CASES | {
    "depthwise_transposed": Case(depthwise_transposed, images),
    "called_at_two_sizes": Case(called_at_two_sizes, images),
    "torch_attention": Case(torch_attention, sequences),
    "attention_to_fewer": Case(attention_to_fewer, sequences),
}
# What these multiply with each other is no layer's; losing it comes on top of what the layers save.
ATTENTION = {"chunked_heads", "packed_heads", "heads_by_attributes", "torch_attention", "attention_to_fewer"}


def real_size(model: nn.Module, inputs: Any, examples: int) -> tuple[int, int]:
    """Parameters, and multiply-accumulates of one example as torch counts them while the model runs on numbers."""
    with FlopCounterMode(display=False) as counter:  # with gradients: torch's fused attention counts as nothing
        call(model, inputs)
    return sum(p.numel() for p in model.parameters()), counter.get_total_flops() // (2 * examples)


class Cuts:
    """A net, what its neurons cost, and what it really becomes without some."""

    def __init__(self, name: str) -> None:
        self.model, self.inputs = NETS[name].build(n=N)
        self.model.eval()
        self.graph = NeuronGraph(self.model, self.inputs)
        self.groups = Groups.of({name: c.outputs for name, c in self.graph.channels.items()})
        self.costs = Costs(self.model, self.graph.channels, self.graph.positions)
        self.before = self.size(torch.tensor([], dtype=torch.long))

    def size(self, gone: Tensor) -> tuple[int, int]:
        """Size of the model that is really cut."""
        small = copy.deepcopy(self.model)
        Surgery(small, kept_without(self.graph.channels, gone)).apply()
        return real_size(small, self.inputs, N)

    def saved(self, gone: Tensor) -> tuple[int, int]:
        """What really disappears with these groups."""
        parameters, macs = self.size(gone)
        return self.before[0] - parameters, self.before[1] - macs

    def some(self, seed: int, share: float) -> Tensor:
        """Choose groups at random, none of the last ones of a layer."""
        scores = torch.rand(len(self.groups.ids), generator=torch.Generator().manual_seed(seed)).tolist()
        count = round(share * int(self.groups.neurons.sum()))
        return cheapest(self.groups, scores, count)


def reads_all(model: nn.Module, name: str) -> bool:
    """Whether this is a layer whose every output is made of all its inputs, or those of its part of them."""
    module = layers.part(model, name)
    return isinstance(module, (*LAYERS, nn.MultiheadAttention)) and not is_depthwise(module)


@pytest.mark.parametrize("name", NETS)
def test_what_is_said_to_be_saved_is_what_disappears_when_the_model_is_cut(name: str) -> None:
    cuts = Cuts(name)
    for seed, share in enumerate((0.0, 0.2, 0.5, 1.0)):
        gone = cuts.some(seed, share)
        assert bool(len(gone)) == (share > 0)
        parameters, macs = cuts.saved(gone)
        told = cuts.costs.saved(gone)
        assert told[0] == parameters
        assert (told[1] <= macs) if name in ATTENTION else (told[1] == macs)
        assert share == 0 or (parameters > 0 and macs > 0)


@pytest.mark.parametrize("name", sorted(ATTENTION))
def test_attention_saves_what_its_heads_multiply_with_each_other_on_top(name: str) -> None:
    cuts = Cuts(name)
    heads = [c.outputs for n, c in cuts.graph.channels.items() if n.endswith(("qkv", ".q", "attention"))]
    gone = torch.cat([torch.unique(ids[ids > 0])[:1] for ids in heads])
    assert len(gone) == 1
    told, found = cuts.costs.saved(gone), cuts.saved(gone)
    assert told[0] == found[0]
    assert 0 < told[1] <= found[1]
    others = torch.cat([ids for n, c in cuts.graph.channels.items() if "embed" in n for ids in [c.outputs]])
    if (others > 0).any():  # no head goes: nothing but layers changes
        first = torch.unique(others[others > 0])[:1]
        assert cuts.costs.saved(first) == cuts.saved(first)


@pytest.mark.parametrize("name", NETS)
def test_the_cost_of_a_group_is_what_it_saves_if_it_goes_alone(name: str) -> None:
    cuts = Cuts(name)
    told = cuts.costs.of_each(cuts.groups.ids)
    readers = {name: c for name, c in cuts.graph.channels.items() if reads_all(cuts.model, name)}
    for i, group in enumerate(cuts.groups.ids):
        twice, products = {}, 0.0  # where the group reads itself, what it makes of itself is counted for both sides
        for layer, c in readers.items():
            weight = layers.weight_of(cuts.model.get_submodule(layer))
            own = float((c.inputs == group).double().mean() * (c.outputs == group).double().mean()) * weight.numel()
            twice[weight] = own
            products += own * cuts.graph.positions.get(layer, 0)
        alone = cuts.costs.saved(group[None])
        assert float(told[0][i]) == pytest.approx(alone[0] + sum(twice.values()), rel=1e-12)
        assert float(told[1][i]) == pytest.approx(alone[1] + products, rel=1e-12)


def test_a_group_that_no_layer_knows_costs_nothing() -> None:
    cuts = Cuts("mlp")
    unknown = cuts.groups.ids[-1:] + 1000
    assert [of.tolist() for of in cuts.costs.of_each(unknown)] == [[0.0], [0.0]]
    assert cuts.costs.saved(unknown) == (0.0, 0.0)


def test_a_layer_that_runs_in_training_only_costs_parameters_and_no_products() -> None:
    def forward(net: Any, x: Tensor) -> Any:
        x = torch.relu(net.stem(x))
        y = net.fc(x.mean((2, 3)))
        return (y, net.aux(torch.relu(net.side(x)).mean((2, 3)))) if net.training else y

    torch.manual_seed(0)
    model = Net(forward, stem=conv(2, 5), side=conv(5, 6), aux=nn.Linear(6, 3), fc=nn.Linear(5, 3))
    graph = NeuronGraph(model, torch.randn(N, 2, 6, 6))
    side = graph.channels["side"].outputs
    costs = Costs(model, graph.channels, graph.positions)
    parameters, macs = costs.of_each(side)
    assert parameters.tolist() == [5 * 9 + 1 + 3] * 6
    assert macs.tolist() == [0.0] * 6
    assert costs.saved(side[:4]) == (4 * (5 * 9 + 1 + 3), 0.0)


@given(widths=st.lists(st.integers(2, 97), min_size=2, max_size=4), seed=st.integers(0, 2**31), share=st.floats(0, 1))
def test_numbers_saved_are_whole_however_the_shares_of_a_layer_round(
    widths: list[int], seed: int, share: float
) -> None:
    ids = torch.arange(1, sum(widths) + 1).split(widths)
    sides = [torch.zeros(3).long(), *ids, torch.zeros(2).long()]
    model = nn.Sequential(*(nn.Linear(len(a), len(b), device="meta") for a, b in pairwise(sides)))
    costs = Costs(
        model,
        {str(i): Channels(a, b) for i, (a, b) in enumerate(pairwise(sides))},
        {str(i): 7 for i in range(len(model))},
    )
    generator = torch.Generator().manual_seed(seed)
    gone = [own[torch.rand(len(own), generator=generator) < share] for own in ids]

    def size(widths: list[int]) -> tuple[int, int]:
        pairs = list(pairwise([3, *widths, 2]))
        return sum(a * b + b for a, b in pairs), sum(7 * a * b for a, b in pairs)

    (parameters, macs), (fewer, less) = size(widths), size([len(a) - len(b) for a, b in zip(ids, gone, strict=True)])
    assert costs.saved(torch.cat(gone)) == (parameters - fewer, macs - less)
