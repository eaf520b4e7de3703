"""The places where pruning tools are known to break: each is done right here, or refused with a reason."""

from __future__ import annotations

import contextlib
import copy
import gc
import inspect
import io
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from kfac_flat import FlatKFAC, NeuronPruner, shrink
from tests.pruning.masking import (
    assert_exact,
    assert_unlike,
    layers_of,
    masked,
    outputs_of,
    prune_at_random,
    pruner_for,
    random_gradients,
    widths_of,
)
from tests.pruning.nets import CASES, Block, Case, Net, call, conv, images, vectors
from tests.pruning.test_refusals import (
    OUTPUT,
    Recurrent,
    channel_shuffle,
    convs,
    embedding_tie,
    mixing_parameter,
    parametrized,
    sequences,
    shared_weight,
    train_on,
    with_between,
)
from tests.pruning.test_saliency import assert_close, theta
from tests.pruning.test_schedule import mlp, set_theta
from tests.pruning.test_surgery import train

PROBES: dict[str, Callable[[], None]] = {}


def probe(function: Callable[[], None]) -> Callable[[], None]:
    PROBES[function.__name__] = function
    return function


@pytest.mark.parametrize("name", PROBES)
def test_what_breaks_elsewhere_is_right_or_refused_with_a_reason(name: str) -> None:
    PROBES[name]()


def right(case: Case, *, target: float = 0.3, example: Callable[[Any], Any] = lambda inputs: inputs) -> NeuronPruner:
    """Cut twice, assert that pruned equals masked both times and that all that is left still trains."""
    model, inputs = case.build()
    dense = copy.deepcopy(model)
    pruner = pruner_for(model, example(inputs), target=target, events=2)
    for event in range(2):
        prune_at_random(pruner, model, seed=event)
        assert_exact(dense, model, pruner.state_dict(), inputs)
    train_on(model, inputs)
    return pruner


def whole_with_reason(pruner: NeuronPruner, **reasons: str) -> None:
    """Assert that these layers lost nothing, and that the pruner says why."""
    for layer, words in reasons.items():
        assert words in pruner.frozen[layer]
        assert torch.equal(pruner.state_dict()["layers"][layer]["out"], torch.arange(pruner.widths[layer]))


def whole_with_reason_or_cut(pruner: NeuronPruner, *layers: str) -> None:
    """Assert that these layers can lose neurons, of which the cuts made before were right, or are named and whole."""
    for layer in layers:
        if not any(layer in kind.members for kind in pruner._groups.kinds):
            assert pruner.frozen[layer]
            whole_with_reason(pruner, **{layer: ""})


# ---------------------------------------------------------------- the training loop goes on


def optimizer_stays_live(wrap: Callable[[optim.Optimizer, nn.Module], optim.Optimizer]) -> None:
    model, x = CASES["residual"].build()
    y = torch.arange(len(x)) % 3
    sgd = optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
    scheduler = optim.lr_scheduler.StepLR(sgd, 1, gamma=0.5)
    optimizer = wrap(sgd, model)
    pruner = NeuronPruner(model, optimizer, x, target=0.4, start=1, every=1, events=1)
    train(model, optimizer, x, y, 2)
    scheduler.step()
    assert pruner.step()
    held = [id(p) for group in sgd.param_groups for p in group["params"]]
    assert held == [id(p) for p in model.parameters()]
    before = [p.detach().clone() for p in model.parameters()]
    train(model, optimizer, x, y, 1)
    for p, old in zip(model.parameters(), before, strict=True):
        assert p.grad is not None
        assert p.shape == p.grad.shape == sgd.state[p]["momentum_buffer"].shape
        assert not torch.equal(p, old)
    assert sgd.param_groups[0]["lr"] == 0.05


@probe
def sgd_built_before_pruning_stays_live() -> None:
    optimizer_stays_live(lambda sgd, model: sgd)


@probe
def flat_kfac_built_before_pruning_stays_live() -> None:
    optimizer_stays_live(lambda sgd, model: FlatKFAC(sgd, model, every=2))


@probe
def the_loss_keeps_falling_after_a_cut() -> None:
    model, x = CASES["residual"].build()
    y = torch.arange(len(x)) % 3
    optimizer = optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    pruner = NeuronPruner(model, optimizer, x, target=0.4, start=1, every=1, events=1)
    train(model, optimizer, x, y, 3)
    assert pruner.step()
    losses = train(model, optimizer, x, y, 40)
    assert losses[-1] < 0.2 * losses[0]


@probe
def all_parameters_frozen() -> None:
    model, x = CASES["mlp"].build()
    model.requires_grad_(False)
    pruner = pruner_for(model, x)
    pruner._optimizer.step()
    report = pruner.step()
    assert not report
    assert "18 groups are read by layers whose weights had no gradient" in report.reason


@probe
def frozen_middle_layer_keeps_requires_grad_false() -> None:
    model, x = CASES["residual"].build()
    model[3].conv1.requires_grad_(False)
    model[3].bn2.requires_grad_(False)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    dense = copy.deepcopy(model)
    pruner = pruner_for(model, x)
    prune_at_random(pruner, model)
    assert pruner.history[-1].removed["3.conv1"].numel()  # its outputs go; what it reads had no gradient
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert_exact(dense, model, pruner.state_dict(), x)
    train_on(model, x)


def mode_is_kept(training: bool) -> None:
    model, x = CASES["residual"].build()
    model.train(training)
    model[4].bn1.train(not training)
    flags = {name: m.training for name, m in model.named_modules()}
    pruner = pruner_for(model, x)
    assert {name: m.training for name, m in model.named_modules()} == flags
    prune_at_random(pruner, model)
    assert {name: m.training for name, m in model.named_modules()} == flags


@probe
def train_mode_is_kept() -> None:
    mode_is_kept(True)


@probe
def eval_mode_is_kept() -> None:
    mode_is_kept(False)


@probe
def nothing_scored_yet() -> None:
    model, x = CASES["mlp"].build()
    pruner = pruner_for(model, x)
    for report in (pruner.plan(), pruner.step()):
        assert not report
        assert "no optimizer step with finite gradients" in report.reason
    prune_at_random(pruner, model)


@probe
def saved_and_loaded_without_a_pickle_of_the_model() -> None:
    model, x = CASES["unet"].build()
    pruner = pruner_for(model, x)
    prune_at_random(pruner, model)
    file = io.BytesIO()
    torch.save({"pruner": pruner.state_dict(), "model": model.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    fresh = shrink(CASES["unet"].build(seed=5)[0], saved["pruner"])
    fresh.load_state_dict(saved["model"])
    assert torch.equal(fresh.eval()(x), model.eval()(x))


# ---------------------------------------------------------------- example inputs and the life of objects


@probe
def a_single_example() -> None:
    for name in ("residual", "cnn_flatten"):
        right(CASES[name], example=lambda x: x[:1])


def unbatched_images(n: int) -> Tensor:
    return torch.randn(n, 3, 8, 8, dtype=torch.float64)


@probe
def an_example_without_batch_axis() -> None:
    def forward(net: Any, x: Tensor) -> Tensor:
        return net.head(F.relu(net.b(F.relu(net.a(x)))).mean((-2, -1)))

    case = Case(lambda: Net(forward, a=conv(3, 8), b=conv(8, 6), head=nn.Linear(6, 3)), unbatched_images)
    pruner = right(case, example=lambda x: x[0])
    assert pruner.widths["a"] + pruner.widths["b"] == 10


@probe
def an_example_without_batch_axis_for_a_model_that_needs_one() -> None:
    net = nn.Sequential(conv(3, 6), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3))
    with pytest.raises(ValueError, match=r"does not run on example_inputs: 4 \(Linear\).*Give what the model is"):
        pruner_for(net, torch.randn(3, 8, 8))


@probe
def defaults_are_not_shared_between_pruners() -> None:
    for parameter in inspect.signature(NeuronPruner).parameters.values():
        assert parameter.default is parameter.empty or isinstance(
            parameter.default, (int, float, str, tuple, type(None))
        )
    (first, x), (second, _) = CASES["mlp"].build(), CASES["mlp"].build()
    pruners = [pruner_for(m, x) for m in (first, second)]
    before = copy.deepcopy((pruners[1].state_dict(), pruners[1].frozen, pruners[1].widths))
    prune_at_random(pruners[0], first)
    pruners[0].frozen["0"] = "mine"
    assert pruners[1].history == []
    assert repr((pruners[1].state_dict(), pruners[1].frozen, pruners[1].widths)) == repr(before)
    assert "0" not in pruners[0].frozen


def nothing_lives_on(wrap: Callable[[optim.Optimizer, nn.Module], optim.Optimizer]) -> None:
    model, x = CASES["residual"].build()
    optimizer = wrap(optim.SGD(model.parameters(), lr=0.1), model)
    pruner = NeuronPruner(model, optimizer, x, target=0.4, start=1, every=1, events=1)
    train(model, optimizer, x, torch.arange(len(x)) % 3, 1)
    assert pruner.step()
    alive = {name: weakref.ref(module) for name, module in model.named_modules()}
    alive |= {name: weakref.ref(p) for name, p in model.named_parameters()}
    alive["pruner"] = weakref.ref(pruner)
    del model, pruner, optimizer
    gc.collect()
    assert [name for name, reference in alive.items() if reference() is not None] == []


@probe
def no_module_lives_on() -> None:
    nothing_lives_on(lambda sgd, model: sgd)


@probe
def no_module_lives_on_with_flat_kfac() -> None:
    nothing_lives_on(lambda sgd, model: FlatKFAC(sgd, model))


@contextlib.contextmanager
def one_process() -> Iterator[None]:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


@probe
def distributed_wrapper() -> None:
    with one_process():
        wrapped = nn.parallel.DistributedDataParallel(mlp(6, 8, 3))
        with pytest.raises(TypeError, match=r"inside the wrapper, model\.module, and let the wrapper follow"):
            pruner_for(wrapped, torch.randn(2, 6))


@probe
def compiled_model() -> None:
    model, x = CASES["residual"].build()
    compiled = torch.compile(model, backend="eager")
    compiled(x)
    dense = copy.deepcopy(model)
    pruner = pruner_for(compiled, x)
    prune_at_random(pruner, compiled)
    assert_exact(dense, model, pruner.state_dict(), x)
    with torch.no_grad():
        assert torch.allclose(compiled.eval()(x), model.eval()(x), rtol=1e-12)
    train_on(compiled, x)


# ---------------------------------------------------------------- weights used in unusual ways


@probe
def two_linears_with_one_tied_weight() -> None:
    pruner = right(CASES["tied_linears"])
    assert pruner._model[2].weight is pruner._model[4].weight
    assert pruner.widths["2"] < 8


@probe
def weight_of_another_layer_in_a_functional_call() -> None:
    whole_with_reason(right(Case(shared_weight, vectors)), b="b.weight is used outside its module")


@probe
def einsum_with_a_parameter() -> None:
    whole_with_reason(right(Case(mixing_parameter, vectors)), a="einsum()")


def with_parameter(forward: Callable[..., Any], *shape: int) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        net = convs(forward)()
        net.own = nn.Parameter(torch.rand(shape) + 0.5)
        return net

    return make


def scaled_by_parameter(net: Any, x: Tensor) -> Tensor:
    return net.head(F.relu(net.b(F.relu(net.a(x) * net.own))).mean((2, 3)))


@probe
def a_parameter_of_no_module_scales_channels() -> None:
    pruner = right(Case(with_parameter(scaled_by_parameter, 1, 8, 1, 1), images))
    whole_with_reason_or_cut(pruner, "a", "b")
    assert pruner.widths["b"] < 6


@probe
def a_parameter_of_no_module_scales_everything() -> None:
    whole_with_reason_or_cut(right(Case(with_parameter(scaled_by_parameter, 1), images)), "a", "b")


@probe
def a_parameter_shared_with_an_unknown_module() -> None:
    model, x = Case(embedding_tie, vectors).build()
    dense = copy.deepcopy(model)
    pruner = pruner_for(model, x)
    prune_at_random(pruner, model)
    assert model.lookup.weight is model.net[0].weight
    assert_exact(dense, model, pruner.state_dict(), x)
    whole_with_reason(pruner, **{"net.0": "shares a parameter with lookup"})


@probe
def weight_norm() -> None:
    pruner = right(Case(parametrized, vectors))
    whole_with_reason(pruner, **{"0": "2 (ParametrizedLinear)"})
    assert pruner.widths["4"] < 9


@probe
def spectral_norm_of_a_convolution() -> None:
    def make() -> nn.Module:
        net = convs(lambda net, x: net.head(F.relu(net.b(F.relu(net.a(x)))).mean((2, 3))))()
        net.a = parametrizations.spectral_norm(net.a)
        return net

    model, x = Case(make, images).build()
    pruner = pruner_for(model.eval(), x, target=0.3)
    prune_at_random(pruner, model)
    assert "a" not in pruner.widths
    assert pruner.widths["b"] == 4
    assert torch.equal(pruner.state_dict()["layers"]["b"]["in"], torch.arange(8))


# ---------------------------------------------------------------- data that move between channels


@probe
def channels_shuffled() -> None:
    whole_with_reason_or_cut(right(Case(convs(channel_shuffle), images)), "a", "b")
    assert right(CASES["channel_shuffle"]).widths["stem"] < 8


@probe
def flatten_after_permute() -> None:
    assert right(CASES["permuted_flatten"]).widths["conv"] == 4


@probe
def flatten_of_channels_first() -> None:
    assert right(CASES["cnn_flatten"]).widths["3"] < 8


@probe
def pixel_shuffle() -> None:
    whole_with_reason_or_cut(right(Case(with_between(lambda: nn.PixelShuffle(2), 2), images)), "a", "b")


def parts_listed_and_joined(net: Any, x: Tensor) -> Tensor:
    left, right = F.relu(net.a(x)).chunk(2, 1)
    parts = [left, right]
    for module in (net.m1, net.m2):
        parts.append(F.relu(module(parts[-1])))
    return net.head(F.relu(net.b(torch.cat(parts, 1))).mean((2, 3)))


def cross_stage() -> nn.Module:
    parts = {"a": conv(2, 8), "m1": conv(4, 4), "m2": conv(4, 4), "b": conv(16, 6)}
    return Net(parts_listed_and_joined, **parts, head=nn.Linear(6, 3))


@probe
def chunks_listed_extended_and_joined() -> None:
    pruner = right(Case(cross_stage, images))
    whole_with_reason_or_cut(pruner, "a", "m1", "m2", "b")
    assert pruner.widths["a"] < 8
    assert pruner.widths["m2"] < 4


@probe
def chunks_made_a_list() -> None:
    def forward(net: Any, x: Tensor) -> Tensor:
        parts = list(F.relu(net.a(x)).chunk(2, 1))
        parts.extend(F.relu(module(parts[-1])) for module in (net.m1, net.m2))
        return net.head(F.relu(net.b(torch.cat(parts, 1))).mean((2, 3)))

    def make() -> nn.Module:
        net = cross_stage()
        net._forward = forward
        return net

    pruner = right(Case(make, images))
    assert pruner.widths["a"] < 8


@probe
def split_into_unequal_sizes() -> None:
    def forward(net: Any, x: Tensor) -> Tensor:
        left, middle, right = torch.split(F.relu(net.a(x)), [4, 3, 1], dim=1)
        return net.head(F.relu(net.b(torch.cat([middle, left, right * left[:, :1]], 1))).mean((2, 3)))

    pruner = right(Case(convs(forward), images), target=0.2)
    whole_with_reason_or_cut(pruner, "a", "b")


# ---------------------------------------------------------------- modules


@probe
def group_norm() -> None:
    def make() -> nn.Module:
        return Net(
            lambda net, x: net.head(F.relu(net.b(F.relu(net.norm(net.a(x))))).mean((2, 3))),
            a=conv(2, 16), norm=nn.GroupNorm(4, 16), b=conv(16, 6), head=nn.Linear(6, 3),
        )  # fmt: skip

    pruner = right(Case(make, images), target=0.5)
    whole_with_reason_or_cut(pruner, "a", "b")
    assert pruner.widths["a"] in (4, 8, 12, 16)


@probe
def instance_norm_with_running_statistics() -> None:
    norm = with_between(lambda: nn.InstanceNorm2d(8, affine=True, track_running_stats=True))
    pruner = right(Case(norm, images))
    assert pruner.widths["a"] < 8
    assert len(pruner._model.odd.running_mean) == pruner._model.odd.num_features == pruner.widths["a"]


class FrozenBatchNorm(nn.Module):
    """Statistics and scales as buffers, used by its own code."""

    def __init__(self, width: int) -> None:
        super().__init__()
        for name in ("weight", "bias", "mean", "var"):
            self.register_buffer(name, torch.rand(width) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        scale = (self.weight * (self.var + 1e-5).rsqrt()).reshape(1, -1, 1, 1)
        return (x - self.mean.reshape(1, -1, 1, 1)) * scale + self.bias.reshape(1, -1, 1, 1)


@probe
def frozen_batch_norm() -> None:
    whole_with_reason_or_cut(right(Case(with_between(lambda: FrozenBatchNorm(8)), images)), "a", "b")


@probe
def lstm() -> None:
    whole_with_reason(right(Case(Recurrent, sequences), target=0.4), embed="lstm (LSTM)")


@probe
def gru() -> None:
    def make() -> nn.Module:
        net = Recurrent()
        net.lstm = nn.GRU(6, 5, batch_first=True)
        return net

    whole_with_reason(right(Case(make, sequences), target=0.4), embed="lstm (GRU)")


def tokens_of(x: Tensor) -> Tensor:
    return x.flatten(2).transpose(1, 2)  # [n, 36, 2]


def transformer(attend: Callable[[Any, Tensor], Tensor], **modules: nn.Module) -> Callable[[], nn.Module]:
    def forward(net: Any, x: Tensor) -> Tensor:
        x = net.embed(tokens_of(x))
        x = x + attend(net, net.norm(x))
        x = x + net.down(F.gelu(net.up(x)))
        return net.head(x.mean(1))

    mlp = {"up": nn.Linear(6, 10), "down": nn.Linear(10, 6), "head": nn.Linear(6, 3)}
    return lambda: copy.deepcopy(Net(forward, embed=nn.Linear(2, 6), norm=nn.LayerNorm(6), **modules, **mlp))


@probe
def multihead_attention() -> None:
    attention = nn.MultiheadAttention(6, 2, batch_first=True)
    model, x = Case(transformer(lambda net, x: net.mha(x, x, x)[0], mha=attention), images).build()
    dense = copy.deepcopy(model)
    pruner = pruner_for(model, x, target=0.3)
    prune_at_random(pruner, model)
    kept = {name: entry["in"].tolist() for name, entry in pruner.state_dict()["layers"].items()}
    # torch runs the output projection without calling it, so what its columns read is known and not found by probing
    columns = {n: set(range(widths_of(m)[0])) - set(kept[n]) for n, m in layers_of(dense).items() if n in kept}
    assert len(columns["mha.out_proj"]) == 3
    reference = masked(dense, columns)
    for training in (False, True):
        assert_unlike(*(outputs_of(m.train(training), x) for m in (reference, dense, model)))
    train_on(model, x)
    whole_with_reason(pruner, embed="statistics", down="statistics")


@probe
def attention_between_different_layers() -> None:
    def forward(net: Any, x: Tensor) -> Tensor:
        q, k, v = (F.relu(layer(tokens_of(x))) for layer in (net.q, net.k, net.v))
        return net.head(F.relu(net.up(net.mha(q, k, v, need_weights=False)[0])).mean(1))

    def make() -> nn.Module:
        parts: dict[str, nn.Module] = {name: nn.Linear(2, 12) for name in "qkv"}
        parts |= {"mha": nn.MultiheadAttention(12, 4, batch_first=True), "up": nn.Linear(12, 10)}
        return Net(forward, **parts, head=nn.Linear(10, 3))

    model, x = Case(make, images).build()
    dense = copy.deepcopy(model)
    pruner = pruner_for(model, x, ranking="layer")
    prune_at_random(pruner, model)
    kept = pruner.state_dict()["layers"]
    assert len(kept["mha"]["in"]) < 12
    assert all(torch.equal(kept[name]["out"], kept["mha"]["in"]) for name in "qkv")
    columns = {
        name: set(range(widths_of(m)[0])) - set(kept[name]["in"].tolist()) for name, m in layers_of(dense).items()
    }
    reference = masked(dense, columns)
    with torch.no_grad():
        gone = sorted(set(range(12)) - set(kept["mha"]["in"].tolist()))
        reference.mha.in_proj_weight[:, gone] = 0
    for training in (False, True):
        assert_unlike(*(outputs_of(m.train(training), x) for m in (reference, dense, model)))
    train_on(model, x)


def grouped_queries(net: Any, x: Tensor) -> Tensor:
    n, t, _ = x.shape
    q = net.q(x).view(n, t, 4, 2).transpose(1, 2)
    k, v = (m(x).view(n, t, 2, 2).transpose(1, 2).repeat_interleave(2, dim=1) for m in (net.k, net.v))
    return net.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, t, 8))


@probe
def grouped_query_attention() -> None:
    parts = {"q": nn.Linear(6, 8), "k": nn.Linear(6, 4), "v": nn.Linear(6, 4), "o": nn.Linear(8, 6)}
    pruner = right(Case(transformer(grouped_queries, **parts), images), target=0.1)
    whole_with_reason_or_cut(pruner, "q", "k", "v", "o", "embed")
    assert pruner.widths["up"] < 10


@probe
def one_channel_convolutions() -> None:
    def make() -> nn.Module:
        return nn.Sequential(
            conv(2, 1), nn.Tanh(), conv(1, 6), nn.BatchNorm2d(6), nn.ReLU(), conv(6, 1, groups=1), nn.Tanh(),
            conv(1, 5, groups=1), nn.ReLU(), nn.Flatten(), nn.Linear(180, 3),
        )  # fmt: skip

    pruner = right(Case(make, images), target=0.4)
    assert (pruner.widths["0"], pruner.widths["5"]) == (1, 1)
    assert (pruner.widths["2"] < 6) + (pruner.widths["7"] < 5)


@probe
def depthwise_with_multiplier() -> None:
    assert right(CASES["depthwise_multiplier"]).widths["2"] < 10


@probe
def depthwise_down_to_one_channel_and_cut_again() -> None:
    model, x = CASES["depthwise_multiplier"].build()
    dense = copy.deepcopy(model)
    pruner = pruner_for(model, x, target=(12 + 2) / 19, events=2)
    for event in range(2):
        optimizer = pruner._optimizer
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        model[2].weight.grad.zero_()
        if event == 0:
            model[5].weight.grad.zero_()  # what it reads goes first, down to one channel
        optimizer.step()
        assert pruner.step()
        assert_exact(dense, model, pruner.state_dict(), x)
    assert (model[2].groups, model[2].in_channels, model[2].out_channels) == (1, 1, 2)
    assert pruner.widths["5"] == 2
    train_on(model, x)


# ---------------------------------------------------------------- how much goes, and which


@probe
def a_quarter_is_a_quarter() -> None:
    pruner = right(Case(lambda: mlp(6, 16, 16, 3), vectors), target=0.25)
    assert pruner.size.neurons == 24
    assert pruner.sparsity == 0.25


@probe
def a_floor_holds_under_global_ranking() -> None:
    model = mlp(6, 64, 32, 3).double()
    pruner = pruner_for(model, vectors(2), target=0.5, min_neurons=24)
    set_theta(pruner, model, [[0.0] * 64, [1.0] * 32])
    assert pruner.step().widths_after == {"0": 24, "2": 24, "4": 3}


@probe
def a_high_target_empties_no_layer() -> None:
    pruner = right(CASES["residual"], target=0.8)
    assert min(pruner.widths.values()) >= 1
    assert pruner.size.parameters == sum(p.numel() for p in pruner._model.parameters())
    assert pruner.sparsity >= 0.8


@probe
def a_layer_of_two_channels() -> None:
    case = Case(lambda: mlp(6, 2, 3), vectors)
    for target, message in (
        (1.0, r"target=1\.0 must lie in \(0, 1\)"),
        (0.75, r"target=0\.75 cannot be reached: 1 of"),
    ):
        with pytest.raises(ValueError, match=message):
            pruner_for(*case.build(), target=target)
    model, x = case.build()
    dense, pruner = copy.deepcopy(model), pruner_for(model, x, target=0.5)
    prune_at_random(pruner, model)
    assert pruner.widths["0"] == 1
    assert_exact(dense, model, pruner.state_dict(), x)


@probe
def targets_out_of_range() -> None:
    for target in (-0.1, 0.0, 1.0, 1.5, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"must lie in \(0, 1\)"):
            pruner_for(mlp(6, 8, 3), vectors(2), target=target)


def scores_of(model: nn.Module, x: Tensor) -> Tensor:
    pruner = pruner_for(model, x, target=0.1)
    model.zero_grad()
    F.cross_entropy(model.train()(x), torch.arange(len(x)) % 3).backward()
    pruner._optimizer.step()
    return theta(pruner)


@probe
def batch_norm_does_not_distort_the_scores() -> None:
    """Scales that BatchNorm and the next layer undo change what each number is, but not what a channel does."""
    model, x = CASES["conv_without_bias"].build()
    model[1].eps = 1e-14
    before = scores_of(model, x)
    factors = torch.logspace(-3, 3, 6, dtype=torch.float64)
    for rescale in (lambda: model[0].weight.mul_(factors.view(-1, 1, 1, 1)), lambda: undone(model, factors)):
        with torch.no_grad():
            rescale()
        assert_close(scores_of(model, x), before)


def undone(model: nn.Module, factors: Tensor) -> None:
    model[1].weight.mul_(factors)
    model[1].bias.mul_(factors)
    model[3].weight.div_(factors.view(1, -1, 1, 1))


@probe
def scores_average_over_all_steps() -> None:
    model = mlp(4, 4, 3).double()
    pruner = pruner_for(model, torch.randn(2, 4), target=0.25)
    set_theta(pruner, model, [[9.0, 1.0, 9.0, 9.0]])
    set_theta(pruner, model, [[0.1, 2.0, 3.0, 3.0]])  # alone it would take the first
    assert pruner.step().removed["0"].tolist() == [1]


def run_of(seed: int) -> list[dict[str, list[int]]]:
    model, x = CASES["residual"].build(seed)
    optimizer = FlatKFAC(optim.SGD(model.parameters(), lr=0.05, momentum=0.9), model, every=2, seed=seed)
    pruner = NeuronPruner(model, optimizer, x, target=0.6, start=1, every=1, events=3, pace="linear")
    for _ in range(3):
        train(model, optimizer, x, torch.arange(len(x)) % 3, 3)
        assert pruner.step()
    return [{name: gone.tolist() for name, gone in r.removed.items()} for r in pruner.history]


@probe
def the_same_seed_cuts_the_same() -> None:
    assert run_of(0) == run_of(0)
    assert run_of(0) != run_of(1)


@probe
def equal_scores_are_broken_by_index() -> None:
    model = mlp(4, 4, 4, 3).double()
    pruner = pruner_for(model, torch.randn(2, 4), target=0.5, max_share=1.0)
    set_theta(pruner, model, [[1.0] * 4, [1.0] * 4])
    assert {name: t.tolist() for name, t in pruner.step().removed.items()} == {"0": [0, 1, 2], "2": [0]}


@probe
def removed_positions_are_those_of_the_original_layer() -> None:
    model, x = CASES["mlp"].build()
    names = {"0": torch.arange(10.0).double(), "2": torch.arange(8.0).double()}
    with torch.no_grad():
        for layer, tag in names.items():
            model.get_submodule(layer).bias.copy_(tag)
    pruner = pruner_for(model, x, target=0.6, events=3)
    for event in range(3):
        prune_at_random(pruner, model, seed=event)
    for layer, tag in names.items():
        gone = torch.cat([r.removed[layer] for r in pruner.history if layer in r.removed])
        assert sorted([*gone.tolist(), *model.get_submodule(layer).bias.long().tolist()]) == tag.long().tolist()


@probe
def widths_stay_aligned() -> None:
    case = Case(lambda: nn.Sequential(conv(2, 16), nn.ReLU(), Block(16, 24), nn.Flatten(), nn.Linear(864, 3)), images)
    model, x = case.build()
    pruner = pruner_for(model, x, target=0.5, events=2, round_to=8)
    for event in range(2):
        random_gradients(model, pruner._optimizer, seed=event)
        pruner.step()
    assert all(width % 8 == 0 for name, width in pruner.widths.items() if name != "4")
    assert pruner.sparsity >= 0.4


# ---------------------------------------------------------------- what the user wants left alone


def left_alone(name: str, ignore: Any) -> Mapping[str, int]:
    model, x = CASES[name].build()
    dense = copy.deepcopy(model)
    pruner = pruner_for(model, x, target=0.2, ignore=ignore)
    prune_at_random(pruner, model)
    assert_exact(dense, model, pruner.state_dict(), x)
    return {name: width for name, width in pruner.widths.items() if pruner.frozen.get(name) not in (None, OUTPUT)}


@probe
def layers_ignored_by_name() -> None:
    assert left_alone("residual", ["3.conv1"]) == {"3.conv1": 6}
    assert left_alone("residual", ["*.conv1"]) == {"3.conv1": 6, "4.conv1": 8}


@probe
def layers_ignored_by_type() -> None:
    assert left_alone("functional", [nn.Conv2d]) == {"conv1": 6, "conv2": 5}


@probe
def layers_ignored_by_instance() -> None:
    model, x = CASES["residual"].build()
    with pytest.raises(ValueError, match=r"ignore= takes names and classes, not a Conv2d itself; say '3\.conv1'"):
        pruner_for(model, x, ignore=[model[3].conv1])
    with pytest.raises(ValueError, match=r"ignore= takes names and classes"):
        pruner_for(model, x, ignore=[3])


@probe
def ignored_layers_that_do_not_exist() -> None:
    model, x = CASES["residual"].build()
    for choice, shown in (("conv9", "'conv9'"), (nn.LSTM, "LSTM")):
        with pytest.raises(ValueError, match=rf"ignore=.*{shown}.* matches no module"):
            pruner_for(model, x, ignore=[choice])


@probe
def a_parameter_of_the_model_itself_left_alone() -> None:
    """Parameters that no module's rule knows keep shape and values."""
    model, x = Case(with_parameter(scaled_by_parameter, 1, 8, 1, 1), images).build()
    own = model.own.detach().clone()
    pruner = pruner_for(model, x, target=0.3)
    prune_at_random(pruner, model)
    assert torch.equal(model.own, own)
    assert call(model, x).shape == (len(x), 3)
