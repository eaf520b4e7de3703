"""Code that tracing does not see, hooks and replaced forwards, freezes what it may mix."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.nn.utils import prune, spectral_norm, weight_norm
from torch.optim import SGD

from kfac_flat import CutError, FlatKFAC, NeuronPruner
from kfac_flat.pruning.hooks import unseen_code


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)
    )


def stepped(model: nn.Module, **options: Any) -> NeuronPruner:
    """A pruner that has scored a step."""
    x = torch.randn(16, 4)
    optimizer = SGD(model.parameters(), lr=0.1)
    pruner = NeuronPruner(model, optimizer, x, **{"target": 0.2, "start": 1, "events": 1, **options})
    F.cross_entropy(model(x), torch.arange(16) % 3).backward()
    optimizer.step()
    return pruner


def flips_output(model: nn.Sequential) -> None:
    model[1].register_forward_hook(lambda m, args, out: out.flip(1))


def flips_input(model: nn.Sequential) -> None:
    model[1].register_forward_pre_hook(lambda m, args: (args[0].flip(1),))


def replaces_forward(model: nn.Sequential) -> None:
    model[1].forward = lambda x: torch.tanh(x).flip(1)


def wraps_forward(model: nn.Sequential) -> None:
    own = model[1].forward
    model[1].forward = functools.partial(lambda m, x: own(x).flip(1), model[1])


CHANGES = [flips_output, flips_input, replaces_forward, wraps_forward]


@pytest.mark.parametrize("change", CHANGES)
def test_neurons_around_code_that_tracing_does_not_see_stay(change: Callable[[nn.Sequential], None]) -> None:
    model = network()
    change(model)
    with pytest.warns(UserWarning, match=r"are not cut: 1 \((a forward|its forward)") as warned:
        pruner = stepped(model)
    assert [w.filename for w in warned] == [__file__]
    assert pruner.step()
    assert pruner.frozen["0"] == "1 (Tanh) has no rule"
    assert model[0].out_features == model[2].in_features == 8
    assert model[2].out_features + model[4].out_features < 11


@pytest.mark.parametrize("change", CHANGES)
def test_a_masked_model_tells_that_they_would_be_mixed(change: Callable[[nn.Sequential], None]) -> None:
    """What is avoided: the mask of the first neuron in front of that code is not that of the first one behind it."""
    model, x = network(), torch.randn(16, 4)
    change(model)
    before, behind = network(), network()
    for other in (before, behind):
        change(other)
    with torch.no_grad():
        before[0].weight[0], before[0].bias[0] = 0, 0
        behind[2].weight[:, 0] = 0
        assert not torch.allclose(before(x), model(x))
        assert not torch.allclose(before(x), behind(x))


def test_a_layer_whose_forward_has_been_replaced_is_neither_cut_nor_are_those_around_it() -> None:
    model = network()
    layer = model[2]
    layer.forward = lambda x: F.linear(x.flip(1), layer.weight, layer.bias)
    with pytest.warns(UserWarning, match=r"2 \(its forward has been replaced\)"):
        pruner = stepped(model, target=0.1)
    assert pruner.step()
    assert [model[i].out_features for i in (0, 2)] == [8, 6]
    assert model[4].out_features < 5


def test_a_block_with_a_hook_stays_as_a_whole() -> None:
    model = nn.Sequential(network()[:3], nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3))
    model[0].register_forward_hook(lambda m, args, out: out.flip(1))
    with pytest.warns(UserWarning, match=r"not cut: 0 \(a forward hook may return another output\)"):
        pruner = stepped(model)
    assert pruner.step()
    assert [model[0][0].out_features, model[0][2].out_features] == [8, 6]
    assert model[2].out_features < 6


@pytest.mark.filterwarnings("ignore:`?torch.nn.utils.weight_norm")
def test_hooks_that_return_nothing_and_those_of_torch_and_of_the_library_freeze_nothing() -> None:
    seen: dict[str, Tensor] = {}

    def watch(module: nn.Module, args: tuple[Tensor], out: Tensor) -> None:
        if out.dim():
            seen["out"] = out
            return
        for x in args:
            seen["in"] = x

    @torch.no_grad()
    def without_gradient(module: nn.Module, args: tuple[Tensor], out: Tensor) -> None:
        seen["mean"] = out.mean()

    class Watcher:
        def __call__(self, module: nn.Module, args: tuple[Tensor], out: Tensor) -> None:
            seen["called"] = out

        @torch.no_grad()
        def decorated(self, module: nn.Module, args: tuple[Tensor], out: Tensor) -> None:
            seen["decorated"] = out

        def method(self, module: nn.Module, args: tuple[Tensor], out: Tensor) -> None:
            with torch.no_grad():
                seen["method"] = out * 2

    class Decorated:
        __call__ = Watcher.decorated

    model = network()
    hooks = (watch, without_gradient, Watcher(), Decorated(), Watcher().method, functools.partial(watch))
    for hook in hooks:
        model[1].register_forward_hook(hook)
    model.register_forward_hook(lambda m, args, out: out * 2)  # the model's own output is no neuron
    FlatKFAC(SGD(model.parameters(), lr=0.1), model)
    assert stepped(model).step()
    assert model[0].out_features + model[2].out_features < 14

    computing = nn.Sequential(*(f(nn.Linear(4, 4)) for f in (weight_norm, spectral_norm)), nn.Linear(4, 4))
    prune.l1_unstructured(computing[2], "weight", 0.5)
    assert unseen_code(computing, lambda module, name: True) == {}


def returns_one_of_two(module: nn.Module, args: tuple[Tensor], out: Tensor) -> Tensor | None:
    return None if out.dim() == 1 else out


def returns_either(module: nn.Module, args: tuple[Tensor], out: Tensor) -> Tensor | None:
    return getattr(module, "replacement", out) or None


@torch.no_grad()
def returns_without_gradient(module: nn.Module, args: tuple[Tensor], out: Tensor) -> Tensor:
    return out


def yields(module: nn.Module, args: tuple[Tensor], out: Tensor) -> Iterator[Tensor]:
    yield out


@pytest.mark.parametrize("hook", [returns_one_of_two, returns_either, returns_without_gradient, print, yields])
def test_hooks_that_may_return_something_are_named(hook: Any) -> None:
    model = network()
    model[3].register_forward_hook(hook)
    model[5].register_forward_pre_hook(hook)
    assert unseen_code(model, lambda module, name: True) == {
        "3": "a forward hook may return another output",
        "5": "a forward pre-hook may return other arguments",
    }


def test_a_replaced_forward_that_is_traced_is_followed() -> None:
    model = nn.Sequential(network()[:3], nn.Linear(6, 3))
    inner = model[0]
    inner.forward = lambda x: inner[2](torch.tanh(inner[0](x)))
    assert stepped(model).step()
    assert inner[0].out_features + inner[2].out_features < 14


@pytest.mark.parametrize("change", CHANGES)
def test_such_code_that_comes_later_stops_the_cut_and_nothing_changes(change: Callable[[nn.Sequential], None]) -> None:
    model = network()
    pruner = stepped(model)
    change(model)
    with pytest.raises(CutError, match=r"has changed since this pruner was made, at 1: (a|its) forward"):
        pruner.step()
    assert [model[i].out_features for i in (0, 2, 4, 6)] == [8, 6, 5, 3]
    assert not pruner.history


HOOKED = [
    (register_module_forward_hook, lambda m, args, out: out.flip(1)),
    (register_module_forward_pre_hook, lambda m, args: (args[0].flip(1),)),
]


@pytest.mark.parametrize(("register", "hook"), HOOKED)
def test_hooks_for_every_module_there_is_are_taken_as_those_of_each(register: Any, hook: Any) -> None:
    model = network()
    pruner = stepped(model)
    handle = register(hook)
    try:
        assert list(unseen_code(model, lambda module, name: True)) == [str(i) for i in range(7)]
        with pytest.raises(CutError, match=r"has changed since this pruner was made, at 0: a forward"):
            pruner.step()
    finally:
        handle.remove()
    assert pruner.step()


def test_a_hook_for_every_module_that_returns_nothing_freezes_nothing() -> None:
    seen: list[nn.Module] = []

    def watch(module: nn.Module, args: Any, out: Any) -> None:
        seen.append(module)

    handle = register_module_forward_hook(watch)
    try:
        assert unseen_code(network(), lambda module, name: True) == {}
    finally:
        handle.remove()


def test_a_class_of_torchs_whose_forward_has_been_replaced_is_not_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Own(nn.Tanh):
        def forward(self, x: Tensor) -> Tensor:
            return x

    model = network()
    model[5] = Own()
    pruner = stepped(model)
    monkeypatch.setattr(nn.Tanh, "forward", lambda self, x: torch.tanh(x).flip(1))
    reason = "the forward of its class has been replaced"
    assert unseen_code(model, lambda module, name: True) == {"1": reason, "3": reason}
    with pytest.raises(CutError, match=f"at 1: {reason}"):
        pruner.step()


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.attention = nn.Linear(4, 16), nn.MultiheadAttention(16, 4, batch_first=True)
        self.hidden, self.head = nn.Linear(16, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)[:, None]
        x = self.attention(x, x, x, need_weights=False)[0][:, 0]
        logits: Tensor = self.head(torch.tanh(self.hidden(x)))
        return logits


def test_a_hook_inside_attention_that_only_runs_once_heads_are_gone_keeps_all_heads() -> None:
    """torch's attention multiplies by the weight of ``out_proj``; with fewer heads, ``out_proj`` is called."""
    model = Attending()
    called: list[Tensor] = []
    model.attention.out_proj.register_forward_hook(lambda m, args, out: (called.append(out), out.flip(-1))[1])
    with pytest.warns(UserWarning, match=r"not cut: attention \(a forward hook may return another output\)\. "):
        pruner = stepped(model, target=0.05)
    assert pruner.step()
    assert type(model.attention) is nn.MultiheadAttention
    assert model.hidden.out_features < 12
    model(torch.randn(16, 4))
    assert not called


class CalledInsideAndOutside(nn.Module):
    """A layer of a block with a hook is also called by itself."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.block, self.after = nn.Linear(4, 8), nn.Sequential(nn.Linear(8, 8), nn.Tanh()), nn.Linear(8, 6)
        self.between, self.head = nn.Linear(8, 8), nn.Linear(6, 3)
        self.block.register_forward_hook(lambda m, args, out: out.flip(1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.between(self.block(torch.tanh(self.first(x))))
        logits: Tensor = self.head(torch.tanh(self.after(self.block[0](x))))
        return logits


def test_a_layer_inside_a_block_with_a_hook_stays_though_it_is_also_called_outside() -> None:
    model = CalledInsideAndOutside()
    with pytest.warns(UserWarning, match="not cut: block "):
        pruner = stepped(model, target=0.1)
    assert pruner.step()
    assert pruner.frozen["block.0"] == "is inside block, which is not looked into"
    assert model.between.out_features == 8
    assert model.after.out_features < 6
    assert model(torch.randn(16, 4)).shape == (16, 3)


def test_a_block_whose_forward_wraps_its_own_is_followed_as_it_runs() -> None:
    """A copy for tracing must call its own parts, however deep in closures the block's own method is."""

    def wrap(model: nn.Sequential) -> None:
        own = model[0].forward

        @functools.wraps(own)
        def logged(x: Tensor) -> Tensor:
            return own(x)

        model[0].forward = lambda x: logged(x).flip(1)

    def made() -> nn.Sequential:
        model = nn.Sequential(network()[:4], nn.Linear(6, 3))
        wrap(model)
        return model

    model, dense = made(), made()
    pruner = stepped(model, target=0.1)
    dense.load_state_dict(model.state_dict())
    assert pruner.step()
    (kept,) = (entry["out"] for name, entry in pruner.state_dict()["layers"].items() if name == "0.0")
    assert len(kept) < 8
    assert pruner.frozen["0.2"] == "flip() splits, selects or reorders neurons"
    gone = torch.ones(8, dtype=torch.bool).index_fill(0, kept, False)
    x = torch.randn(16, 4)
    whole = dense(x)
    with torch.no_grad():
        dense[0][2].weight[:, gone] = 0
    assert torch.allclose(model(x), dense(x), atol=1e-6)
    assert not torch.allclose(model(x), whole, atol=1e-3)


def test_functions_that_hold_each_other_are_copied_with_what_they_hold() -> None:
    model = nn.Sequential(network()[:3], nn.Linear(6, 3))

    def wrap(inner: nn.Module) -> None:
        def even(x: Tensor, times: int) -> Tensor:
            return x if times == 0 else odd(x, times - 1)

        def odd(x: Tensor, times: int) -> Tensor:
            return even(inner[2](torch.tanh(inner[0](x))), times - 1)

        inner.forward = lambda x: odd(x, 1)

    wrap(model[0])
    assert stepped(model).step()
    assert model[0][0].out_features + model[0][2].out_features < 14


@pytest.mark.parametrize("change", CHANGES[:3])
def test_a_state_fits_a_model_with_the_same_hooks_and_no_other(change: Callable[[nn.Sequential], None]) -> None:
    def made(hooked: bool) -> tuple[nn.Sequential, NeuronPruner]:
        model = network()
        if not hooked:
            return model, stepped(model)
        change(model)
        with pytest.warns(UserWarning, match="are not cut: 1 "):
            return model, stepped(model)

    model, pruner = made(hooked=True)
    assert pruner.step()
    state, x = pruner.state_dict(), torch.randn(16, 4)
    again, resumed = made(hooked=True)
    resumed.load_state_dict(state)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(x), model(x))
    plain, other = made(hooked=False)
    with pytest.raises(ValueError, match="for a model with the same forward hooks"):
        other.load_state_dict(state)
    assert [plain[i].out_features for i in (0, 2, 4, 6)] == [8, 6, 5, 3]


def test_a_hook_that_says_that_it_keeps_channels_in_place_freezes_nothing() -> None:
    """As one that adds noise does; what is left of it still runs after the cut."""

    def double(module: nn.Module, args: tuple[Tensor], out: Tensor) -> Tensor:
        return 2 * out

    double.keeps_channels = True
    model = network()
    model[1].register_forward_hook(double)
    pruner = stepped(model)
    x, before = torch.randn(4, 4), copy.deepcopy(model)
    assert pruner.step()
    assert model[0].out_features < 8
    kept = {name: pruner.state_dict()["layers"][name]["out"] for name in ("0", "2", "4")}
    with torch.no_grad():
        for name, out in kept.items():
            gone = torch.ones(before[int(name)].out_features, dtype=torch.bool).index_fill(0, out, False)
            before[int(name) + 2].weight[:, gone] = 0
        torch.testing.assert_close(model(x), before(x))
