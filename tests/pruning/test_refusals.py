"""What cannot be followed through a model is left uncut and named; nothing is ever silently wrong."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from kfac_flat import NeuronPruner
from tests.pruning.masking import assert_exact, layers_of, prune_at_random, pruner_for, random_gradients, widths_of
from tests.pruning.nets import CASES, Case, Net, call, conv, images, vectors

OUTPUT = "forms the model's output"


def channel_shuffle(net: Any, x: Tensor) -> Tensor:
    x = F.relu(net.a(x))
    n, c, h, w = x.size()
    x = x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
    return net.head(F.relu(net.b(x)).mean((2, 3)))


def halves(net: Any, x: Tensor) -> Tensor:
    left, right = net.a(x).chunk(2, dim=1)
    return net.head(F.relu(net.b(torch.relu(left) * torch.sigmoid(right))).mean((2, 3)))


def split_and_joined(net: Any, x: Tensor) -> Tensor:
    left, right = torch.split(F.relu(net.a(x)), 4, dim=1)
    return net.head(F.relu(net.b(torch.cat([right, left], 1))).mean((2, 3)))


def sliced(net: Any, x: Tensor) -> Tensor:
    return net.head(F.relu(net.b(F.relu(net.a(x))[:, :4])).mean((2, 3)))


def literal_view(net: Any, x: Tensor) -> Tensor:
    x = F.relu(net.b(F.relu(net.a(x))))
    return net.head(x.view(x.size(0), 6, -1).mean(2))


def literal_flatten(net: Any, x: Tensor) -> Tensor:
    return net.head(F.relu(net.a(F.relu(net.b(x)))).view(-1, 8 * 36))


def stacked(net: Any, x: Tensor) -> Tensor:
    x = torch.stack([net.a(x), net.a(x) * 2], 1)[:, 1]
    return net.head(F.relu(net.b(F.relu(x))).mean((2, 3)))


def indexed(net: Any, x: Tensor) -> Tensor:
    return net.head(F.relu(net.b(F.relu(net.a(x))[:, torch.arange(7, -1, -1)])).mean((2, 3)))


def softmax(net: Any, x: Tensor) -> Tensor:
    return net.head(F.relu(net.b(torch.softmax(net.a(x), 1))).mean((2, 3)))


def channel_mean(net: Any, x: Tensor) -> Tensor:
    x = F.relu(net.a(x))
    return net.head(F.relu(net.b(x - x.mean(1, keepdim=True))).mean((2, 3)))


def weight_of_another_layer(net: Any, x: Tensor) -> Tensor:
    x = F.relu(F.linear(F.relu(net.a(x)), net.b.weight) + net.b(x))
    return net.head(F.relu(net.c(x)))


def product_with_parameter(net: Any, x: Tensor) -> Tensor:
    return net.head(F.relu(net.b(torch.einsum("nc,cd->nd", net.a(x), net.mix))))


def scaled_by_width(net: Any, x: Tensor) -> Tensor:
    x = net.a(x)
    return net.head(F.relu(net.b(x / x.size(1))))


def scaled_by_attribute(net: Any, x: Tensor) -> Tensor:
    return net.head(F.relu(net.b(net.a(x) * (1.0 / net.a.out_features))))


def scaled_by_what_is_made_of_the_width(net: Any, x: Tensor) -> Tensor:
    x = net.a(x)
    return net.head(F.relu(net.b(x * torch.full((1,), x.size(1), dtype=x.dtype))))


def scaled_by_how_many_there_are(net: Any, x: Tensor) -> Tensor:
    x = net.a(x)
    return net.head(F.relu(net.b(x * torch.arange(x.shape[1]).sum())))


def sized_by_another_layer(net: Any, x: Tensor) -> Tensor:
    a, b = net.a(x), net.b(x)
    b = b.view(x.size(0), a.size(1), -1)
    return net.head(F.relu(net.c(torch.cat([F.relu(a).mean((2, 3)), F.relu(b).mean(2)], 1))))


def narrowed_to_everything(net: Any, x: Tensor) -> Tensor:
    return net.head(F.relu(net.b(F.relu(net.a(x)).narrow(1, 0, 8))).mean((2, 3)))


def variance_pooled(net: Any, x: Tensor) -> Tensor:
    return net.head(F.relu(net.b(net.a(x))).var((2, 3), True))


def pooled_by_axis(net: Any, x: Tensor) -> Tensor:
    return net.head(F.relu(net.b(net.a(x))).mean(axis=(2, 3)))


def reshaped_in_place(net: Any, x: Tensor) -> Tensor:
    x = net.a(x)
    x.unsqueeze_(1)
    return net.head(F.relu(net.b(x)).squeeze(1))


class Double(torch.autograd.Function):
    """Something that torch.fx cannot look into."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * 2

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * 2


class CustomFunction(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Double.apply(x)


class Branching(nn.Module):
    """Control flow that depends on the data, around a layer of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = conv(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) if x.sum() > 0 else self.inner(-x)


class Rolled(nn.Linear):
    """A Linear whose forward is its own."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias).roll(1, -1)


def sized_by_each_other() -> nn.Module:
    convs = {"a": conv(2, 8), "b": conv(2, 8)}
    return Net(sized_by_another_layer, **convs, c=nn.Linear(16, 20), head=nn.Linear(20, 3))


def overridden_forward() -> nn.Module:
    rest = [nn.ReLU(), nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 3)]
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), Rolled(8, 7), *rest)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.lstm = nn.Linear(2, 6), nn.LSTM(6, 5, batch_first=True)
        self.fc, self.head = nn.Linear(5, 7), nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        out, _ = self.lstm(torch.relu(self.embed(x.transpose(1, 2))))
        return self.head(torch.relu(self.fc(out[:, -1])))


def convs(forward: Callable[..., Any], b_reads: int = 8) -> Callable[[], nn.Module]:
    return lambda: Net(forward, a=conv(2, 8), b=conv(b_reads, 6), head=nn.Linear(6, 3))


def linears(forward: Callable[..., Any]) -> Callable[[], nn.Module]:
    return lambda: Net(forward, a=nn.Linear(6, 8), b=nn.Linear(8, 7), head=nn.Linear(7, 3))


def with_between(module: Callable[[], nn.Module], b_reads: int = 8) -> Callable[[], nn.Module]:
    """Put a module between two convolutions."""

    def forward(net: Any, x: Tensor) -> Tensor:
        return net.head(F.relu(net.b(net.odd(net.a(x)))).mean((2, 3)))

    return lambda: Net(forward, a=conv(2, 8), odd=module(), b=conv(b_reads, 6), head=nn.Linear(6, 3))


def shared_weight() -> nn.Module:
    return Net(weight_of_another_layer, a=nn.Linear(6, 6), b=nn.Linear(6, 8), c=nn.Linear(8, 8), head=nn.Linear(8, 3))


def mixing_parameter() -> nn.Module:
    net = linears(product_with_parameter)()
    net.mix = nn.Parameter(torch.randn(8, 8))
    return net


def parametrized() -> nn.Module:
    layer = parametrizations.weight_norm(nn.Linear(8, 7))
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), layer, nn.ReLU(), nn.Linear(7, 9), nn.Tanh(), nn.Linear(9, 3))


def embedding_tie() -> nn.Module:
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 7), nn.ReLU(), nn.Linear(7, 3))
    lookup = nn.Embedding(8, 6)
    lookup.weight = net[0].weight
    return Net(lambda self, x: self.net(x), net=net, lookup=lookup)


def sequences(n: int) -> Tensor:
    return torch.randn(n, 2, 10, dtype=torch.float64)


def branching_on_width(net: Any, x: Tensor) -> Tensor:
    x = net.a(x)
    x = F.relu(x) if net.a.out_channels == 8 else torch.tanh(x)
    return net.head(F.relu(net.b(x)).mean((2, 3)))


def tied_to_its_transpose() -> nn.Module:
    """An autoencoder whose decoder is the encoder's transpose."""
    up = nn.ConvTranspose2d(8, 6, 3, padding=1)
    net = nn.Sequential(
        conv(2, 6), nn.ReLU(), conv(6, 8), nn.ReLU(), up, nn.ReLU(), conv(6, 24), nn.ReLU(), conv(24, 2)
    )
    net[4].weight = net[2].weight
    return net


def tokens(n: int) -> Tensor:
    return torch.randn(n, 5, 6, dtype=torch.float64)


def attended(weigh: bool = False, **options: Any) -> Case:
    """Attention between a layer and one that can lose neurons; its weights may be used as well."""

    def forward(net: Any, x: Tensor) -> Tensor:
        y = F.relu(net.a(x))
        memory = x if "kdim" in options else y
        x, weights = net.attention(y, memory, memory)
        x = net.head(F.relu(net.b(x)).mean(1))
        return x + weights.amax((1, 2)).unsqueeze(1) if weigh else x

    attention = functools.partial(nn.MultiheadAttention, 8, 2, batch_first=True)
    layers = {"a": nn.Linear(6, 8), "b": nn.Linear(8, 24), "head": nn.Linear(24, 3)}
    return Case(lambda: Net(forward, **copy.deepcopy(layers), attention=attention(**options)), tokens)


INSIDE = {"attention.out_proj": "is not called by itself"}
OTHER = "has queries, keys and values of different widths, or keys and values of its own"

# For each: the network, and for each layer that cannot be cut words of the reason. None: exact or frozen, both right.
REFUSED: dict[str, tuple[Case, dict[str, str] | None]] = {
    "channel_shuffle": (Case(convs(channel_shuffle), images), None),
    "chunk": (Case(convs(halves, 4), images), None),
    "split": (Case(convs(split_and_joined), images), {"a": "split() has a size that depends on the neurons, 4"}),
    "slice": (Case(convs(sliced, 4), images), {"a": "getitem() splits"}),
    "index": (Case(convs(indexed), images), {"a": "getitem() splits"}),
    "stack": (Case(convs(stacked), images), {"a": "stack() has no rule"}),
    "literal_view": (Case(convs(literal_view), images), {"b": "view() has a size that depends on the neurons, 6"}),
    "literal_flatten": (
        Case(lambda: Net(literal_flatten, a=conv(6, 8), b=conv(2, 6), head=nn.Linear(288, 3)), images),
        {"a": "view() has a size that depends on the neurons, 288"},
    ),
    "softmax_over_channels": (Case(convs(softmax), images), {"a": "softmax() normalises over different neurons"}),
    "mean_over_channels": (Case(convs(channel_mean), images), {"a": "mean() mixes different neurons"}),
    "weight_of_another_layer": (Case(shared_weight, vectors), {"a": "", "b": "b.weight is used outside"}),
    "einsum_with_parameter": (Case(mixing_parameter, vectors), {"a": "einsum() sums over, or multiplies, different"}),
    "layer_norm": (Case(with_between(lambda: nn.LayerNorm([8, 6, 6])), images), {"a": "odd (LayerNorm)"}),
    "group_norm": (Case(with_between(lambda: nn.GroupNorm(4, 8)), images), None),
    "group_norm_over_everything": (Case(with_between(lambda: nn.GroupNorm(1, 8)), images), None),
    "instance_norm": (
        Case(with_between(lambda: nn.InstanceNorm2d(8, affine=True, track_running_stats=True)), images),
        None,
    ),
    "prelu_per_channel": (Case(with_between(lambda: nn.PReLU(8)), images), None),
    "lstm": (Case(Recurrent, sequences), {"embed": "lstm (LSTM)"}),
    "weight_norm": (Case(parametrized, vectors), {"0": "2 (ParametrizedLinear)"}),
    "custom_function": (Case(with_between(CustomFunction), images), None),
    "overridden_forward": (Case(overridden_forward, vectors), {"0": "linear() has no rule"}),
    "narrowed_to_everything": (Case(convs(narrowed_to_everything), images), None),
    "scaled_by_width": (Case(linears(scaled_by_width), vectors), None),
    "scaled_by_attribute": (Case(linears(scaled_by_attribute), vectors), None),
    "scaled_by_what_is_made_of_the_width": (
        Case(linears(scaled_by_what_is_made_of_the_width), vectors),
        {"a": "full(): computes with a number that depends on the number of neurons"},
    ),
    "scaled_by_how_many_there_are": (
        Case(linears(scaled_by_how_many_there_are), vectors),
        {"a": "arange(): computes with a number that depends on the number of neurons"},
    ),
    "sized_by_another_layer": (
        Case(
            lambda: Net(sized_by_another_layer, a=conv(2, 8), b=conv(2, 8), c=nn.Linear(16, 20), head=nn.Linear(20, 3)),
            images,
        ),
        {"a": "view() fails", "b": "cannot follow a cut, -1 can"},
    ),
    "variance_pooled": (Case(convs(variance_pooled), images), None),
    "pooled_by_axis": (Case(convs(pooled_by_axis), images), None),
    "reshaped_in_place": (Case(linears(reshaped_in_place), vectors), None),
    "branching_on_width": (
        Case(convs(branching_on_width), images),
        {"a": "relu() is reached or not depending"},
    ),
    "tied_to_its_transpose": (
        Case(tied_to_its_transpose, images),
        {"2": "4 and 2 share a parameter", "4": "4 and 2 share a parameter"},
    ),
    "attention_weights": (attended(weigh=True), {"a": "returns attention weights that are used"} | INSIDE),
    "attention_to_a_bias": (attended(add_bias_kv=True), {"a": OTHER} | INSIDE),
    "attention_to_zero": (attended(add_zero_attn=True), {"a": OTHER} | INSIDE),
    "attention_to_another_width": (attended(kdim=6, vdim=6), {"a": OTHER} | INSIDE),
}


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_followed_is_frozen_and_what_is_cut_is_exact(name: str, seed: int) -> None:
    case, expected = REFUSED[name]
    model, inputs = case.build(seed)
    dense = copy.deepcopy(model)
    pruner = pruner_for(model, inputs, target=0.3, events=2)
    for layer, reason in (expected or {}).items():
        assert reason in pruner.frozen[layer]
    for event in range(2):
        prune_at_random(pruner, model, seed=10 * seed + event)
        assert_exact(dense, model, pruner.state_dict(), inputs)
    for layer in expected or {}:
        assert pruner.widths[layer] == widths_of(layers_of(dense)[layer])[1]
    train_on(model, inputs)


def train_on(model: nn.Module, inputs: Any) -> None:
    """Take two steps and see that every parameter that has a gradient moves."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    model.train()
    for _ in range(2):
        before = [p.detach().clone() for p in model.parameters()]
        optimizer.zero_grad()
        call(model, inputs).square().sum().backward()
        optimizer.step()
        for p, old in zip(model.parameters(), before, strict=True):
            assert p.grad is None or p.grad.abs().max() < 1e-9 or not torch.equal(p, old)


def test_a_view_whose_literal_equals_the_width_after_a_cut_is_no_error() -> None:
    def forward(net: Any, x: Tensor) -> Tensor:
        x = F.relu(net.a(x))
        return net.head(x.view(x.size(0), -1, 36).mean(2))

    model, inputs = Case(lambda: Net(forward, a=conv(2, 48), head=nn.Linear(48, 3)), images).build()
    dense = copy.deepcopy(model)
    pruner = pruner_for(model, inputs, target=0.25)  # 48 -> 36
    prune_at_random(pruner, model)
    assert pruner.widths["a"] == 36
    assert_exact(dense, model, pruner.state_dict(), inputs)


def test_a_buffer_cut_to_the_length_of_the_input_keeps_no_neuron() -> None:
    def forward(net: Any, x: Tensor) -> Tensor:
        return net.head(F.relu(net.a(x) + net.steps[:, : x.shape[1]]).mean(1))

    model = Net(forward, a=nn.Linear(4, 10), head=nn.Linear(10, 3)).double()
    model.register_buffer("steps", torch.linspace(-1, 1, 9, dtype=torch.float64).view(1, 9, 1))
    dense, inputs = copy.deepcopy(model), torch.randn(3, 5, 4, dtype=torch.float64)
    pruner = pruner_for(model, inputs, target=0.5)
    prune_at_random(pruner, model)
    assert pruner.widths["a"] == 5
    assert_exact(dense, model, pruner.state_dict(), inputs)


def test_an_untraceable_submodule_is_left_uncut_and_warned_about_by_name() -> None:
    model, inputs = Case(with_between(Branching), images).build()
    dense = copy.deepcopy(model)
    with pytest.warns(UserWarning, match=r"cannot be traced.*odd \(") as warned:
        pruner = pruner_for(model, inputs, target=0.2)
    assert len(warned) == 1
    assert "odd (Branching) has no rule" in pruner.frozen["a"]
    assert pruner.frozen["odd.inner"] == "is inside odd, which is not looked into"
    prune_at_random(pruner, model)
    assert_exact(dense, model, pruner.state_dict(), inputs)
    train_on(model, inputs)


def called_otherwise() -> nn.Module:
    def forward(net: Any, x: Tensor) -> Tensor:
        x = F.linear(F.relu(net.a(x)), net.b.weight, net.b.bias)
        return net.head(net.encoder(x.unsqueeze(1)).squeeze(1))

    encoder = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
    return Net(
        forward, a=nn.Linear(6, 10), b=nn.Linear(10, 8), unused=nn.Linear(2, 2), encoder=encoder,
        c=nn.Linear(8, 9), head=nn.Sequential(nn.Linear(8, 7), nn.ReLU(), nn.Linear(7, 3)),
    )  # fmt: skip


def test_layers_that_are_not_called_by_themselves_are_named_and_stay_whole() -> None:
    model, inputs = Case(called_otherwise, vectors).build()
    dense = copy.deepcopy(model)
    pruner = pruner_for(model, inputs, target=0.05)
    inside = ("unused", "c", "encoder.linear1", "encoder.linear2", "encoder.self_attn", "encoder.self_attn.out_proj")
    for name in inside:
        assert pruner.frozen[name].startswith("is not called by itself: it is unused, or inside a module")
    assert pruner.frozen["b"] == "b.weight is used outside its module"
    assert "linear() has no rule" in pruner.frozen["a"]
    assert pruner.size.neurons == 10 + 8 + 2 + 9 + 12 + 8 + 3 * 8 + 8 + 7
    prune_at_random(pruner, model)
    assert pruner.widths == {
        name: width - 4 * (name == "head.0") for name, width in pruner.history[0].widths_before.items()
    }
    assert {*inside, "a", "b"} <= pruner.widths.keys()
    assert_exact(dense, model, pruner.state_dict(), inputs)
    assert "not called by itself" in pruner.history[0].table()


def test_a_layer_whose_neurons_only_go_all_at_once_is_named() -> None:
    model = nn.Sequential(
        nn.Linear(6, 8), nn.GroupNorm(1, 8), nn.ReLU(), nn.Linear(8, 7), nn.ReLU(), nn.Linear(7, 3)
    )  # fmt: skip
    pruner = pruner_for(model, torch.randn(2, 6), target=0.2)
    assert pruner.frozen == {"0": "its neurons can only go all at once", "5": OUTPUT}
    random_gradients(model, pruner._optimizer)
    assert pruner.step().widths_after == {"0": 8, "3": 4, "5": 3}


def test_an_untraceable_model_is_refused_with_advice() -> None:
    model = Net(lambda net, x: net.fc(x) if x.sum() > 0 else -net.fc(x), fc=nn.Linear(6, 3))
    with pytest.raises(ValueError, match=r"Net\.forward cannot be traced.*move that part into a submodule"):
        pruner_for(model, torch.randn(2, 6))


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("compiled", [False, True])
def test_a_distributed_wrapper_is_refused_with_advice(compiled: bool) -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    wrapped: nn.Module = nn.parallel.DistributedDataParallel(model)
    if compiled:
        wrapped = torch.compile(wrapped, backend="eager")
    with pytest.raises(TypeError, match=r"model\.module, and.*kfac_flat\.rewrap\(model\)"):
        pruner_for(wrapped, torch.randn(2, 6))


def test_a_parameter_that_an_uncut_module_shares_stays_whole() -> None:
    model, inputs = Case(embedding_tie, vectors).build()
    pruner = pruner_for(model, inputs, target=0.2)
    assert pruner.frozen["net.0"] == "shares a parameter with lookup"
    prune_at_random(pruner, model)
    assert model.lookup.weight is model.net[0].weight
    assert model.net[0].weight.shape == (8, 6)


def test_the_outputs_of_the_model_are_never_cut() -> None:
    for name, case in CASES.items():
        model, inputs = case.build()
        pruner = pruner_for(model, inputs, target=0.1)
        heads = [layer for layer, reason in pruner.frozen.items() if reason == OUTPUT]
        assert heads, name
        assert all(pruner.widths[layer] == 3 for layer in heads), name


def test_layers_whose_sum_forms_the_output_are_not_counted_as_neurons() -> None:
    layers = {"h": nn.Linear(6, 8), "a": nn.Linear(8, 3), "b": nn.Linear(8, 3)}
    model = Net(lambda net, x: net.a(net.h(x)) + net.b(net.h(x)), **layers)
    pruner = pruner_for(model, torch.randn(2, 6), target=0.5)
    assert pruner.size.neurons == 8


def test_the_model_is_not_run_and_not_changed_by_building_a_pruner() -> None:
    model, inputs = CASES["residual"].build()
    calls: list[int] = []
    model.register_forward_hook(lambda *_: calls.append(1))
    before, training = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    keys = {name: set(vars(module)) for name, module in model.named_modules()}
    pruner: NeuronPruner = pruner_for(model, inputs)
    pruner.plan()
    assert calls == []
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert [m.training for m in model.modules()] == training
    assert {name: set(vars(module)) for name, module in model.named_modules()} == keys


def test_a_submodule_that_cannot_be_traced_is_run_on_a_copy_and_moves_nothing_of_the_users() -> None:
    class Noisy(Branching):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.drop = nn.BatchNorm2d(8), nn.Dropout(0.5)

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(self.drop(self.norm(x)))

    model, inputs = Case(with_between(Noisy), images).build()
    model.train()
    before, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    with pytest.warns(UserWarning, match="cannot be traced"):
        pruner = pruner_for(model, inputs, target=0.2)
    pruner.plan()
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert torch.equal(torch.get_rng_state(), random)


def test_an_auxiliary_head_of_train_mode_costs_nothing_when_the_model_is_used() -> None:
    model, inputs = CASES["auxiliary_head"].build()
    macs = pruner_for(model, inputs, target=0.1).size.macs
    used: list[int] = []
    for module in layers_of(model).values():
        module.register_forward_hook(lambda m, _, y: used.append(m.weight[0].numel() * y[0].numel()))
    model.eval()(inputs)
    assert macs == sum(used)
