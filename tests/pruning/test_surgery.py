"""A cut keeps everything but the channels that go: objects, flags, gradients, optimizer state; or nothing changes."""

from __future__ import annotations

import copy
import dataclasses
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_map_only

from kfac_flat import ChainedOptimizer, CutError, FlatKFAC, NeuronPruner
from kfac_flat.pruning import surgery
from tests.pruning.nets import CASES, conv

Setup = tuple[nn.Module, optim.Optimizer, NeuronPruner, Any, Tensor]


def loss_of(model: nn.Module, x: Any, y: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(x), y)


def train(model: nn.Module, optimizer: optim.Optimizer, x: Any, y: Tensor, steps: int) -> list[float]:
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_of(model, x, y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def setup(
    name: str = "residual",
    make: Callable[..., optim.Optimizer] = lambda p: optim.SGD(p, lr=0.05, momentum=0.9),
    **options: Any,
) -> Setup:
    model, x = CASES[name].build()
    y = torch.arange(len(x)) % 3
    optimizer = make(model.parameters())
    pruner = NeuronPruner(model, optimizer, x, **{"target": 0.4, "start": 1, "every": 1, "events": 1, **options})
    train(model, optimizer, x, y, 3)
    return model, optimizer, pruner, x, y


def kept(pruner: NeuronPruner, model: nn.Module) -> dict[str, tuple[Tensor, ...]]:
    """Kept indices along each axis of each parameter and buffer, by name, read off the manifest."""
    found = {}
    for name, entry in pruner.state_dict()["layers"].items():
        module = model.get_submodule(name)
        depthwise = getattr(module, "groups", 1) > 1
        weight = (entry["out"],) if isinstance(module, nn.BatchNorm2d) or depthwise else (entry["out"], entry["in"])
        found[f"{name}.weight"] = weight
        found |= {f"{name}.{other}": (entry["out"],) for other in ("bias", "running_mean", "running_var")}
    return found


def cut_by_hand(t: Tensor, indices: tuple[Tensor, ...]) -> Tensor:
    for dim, index in enumerate(indices):
        if t.shape[dim] > 1:  # a summary over that axis (Adafactor) has no channels there
            t = t.index_select(dim, index)
    return t


def everything(model: nn.Module, optimizer: optim.Optimizer, pruner: NeuronPruner) -> dict[str, Any]:
    """Copy all there is to know, for a comparison bit by bit."""
    parameters, modules = dict(model.named_parameters()), dict(model.named_modules())
    found = {
        "modules": {n: {k: v for k, v in vars(m).items() if isinstance(v, (int, bool))} for n, m in modules.items()},
        "model": model.state_dict(),
        "gradients": {n: p.grad for n, p in parameters.items()},
        "requires_grad": {n: p.requires_grad for n, p in parameters.items()},
        "attributes": {n: {k: v for k, v in vars(p).items() if isinstance(v, str)} for n, p in parameters.items()},
        "optimizer": optimizer.state_dict(),
        "pruner": pruner.state_dict(),
        "widths": pruner.widths,
        "size": vars(pruner.size),
        "history": len(pruner.history),
    }
    return copy.deepcopy(found)


def assert_same(a: Any, b: Any) -> None:
    assert type(a) is type(b)
    if isinstance(a, Tensor):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for left, right in zip(a, b, strict=True):
            assert_same(left, right)
    else:
        assert a == b


# ---------------------------------------------------------------- what stays


def test_parameters_and_buffers_stay_the_same_objects_and_keep_the_kept_values() -> None:
    model, optimizer, pruner, _, _ = setup()
    before = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    values = {name: t.detach().clone() for name, t in before.items()}
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    assert pruner.step()
    after = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert {name: id(t) for name, t in after.items()} == {name: id(t) for name, t in before.items()}
    assert [id(p) for g in optimizer.param_groups for p in g["params"]] == [id(p) for p in model.parameters()]
    indices = kept(pruner, model)
    for name, t in after.items():
        assert torch.equal(t, cut_by_hand(values[name], indices.get(name, ())))
    for name, p in model.named_parameters():
        assert torch.equal(p.grad, cut_by_hand(gradients[name], indices[name]))
        assert isinstance(p, nn.Parameter)
        assert p.is_leaf
    assert sum(t.numel() for t in after.values()) < sum(t.numel() for t in values.values())


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_tensor_so_large_that_both_axes_are_cut_at_once_keeps_the_same_entries(
    memory_format: torch.memory_format,
) -> None:
    t = torch.randn(1100, 1000, 2, 2).to(memory_format=memory_format)
    rows, columns = torch.arange(0, 1100, 3), torch.tensor([0, 1, 998])
    selected = surgery.select(t, {0: rows, 1: columns})
    assert torch.equal(selected, torch.stack([torch.stack([t[i, j] for j in columns]) for i in rows]))
    assert selected.is_contiguous(memory_format=memory_format)


def test_module_attributes_say_the_new_widths() -> None:
    for name in ("residual", "depthwise_multiplier", "grouped", "conv1d", "batchnorm1d"):
        model, _, pruner, _, _ = setup(name)
        pruner.step()
        for module in model.modules():
            if isinstance(module, nn.Linear):
                assert (module.out_features, module.in_features) == module.weight.shape
            elif isinstance(module, (nn.Conv1d, nn.Conv2d)):
                assert module.out_channels == module.weight.shape[0]
                assert module.in_channels == module.weight.shape[1] * module.groups
            elif isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
                assert module.num_features == len(module.running_mean)
        assert f"{next(iter(pruner.widths.values()))}" in repr(model)


def test_a_frozen_middle_layer_stays_frozen_and_is_cut_at_its_outputs() -> None:
    model, x = CASES["mlp"].build()
    model[2].requires_grad_(False)
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    pruner = NeuronPruner(model, optimizer, x, target=0.2, start=1, every=1, events=1)
    train(model, optimizer, x, torch.arange(len(x)) % 3, 1)
    report = pruner.step()
    assert report.removed.keys() == {"2"}  # what the frozen layer reads had no gradient, so it was not scored
    assert [p.requires_grad for p in model.parameters()] == [True, True, False, False, True, True]
    assert model[2].weight.grad is None


def test_training_flags_and_batch_counts_stay() -> None:
    model, _, pruner, _, _ = setup()
    model[3].bn1.eval()
    flags = [m.training for m in model.modules()]
    counts = [int(b) for n, b in model.named_buffers() if n.endswith("num_batches_tracked")]
    pruner.step()
    assert [m.training for m in model.modules()] == flags
    assert False in flags
    assert [int(b) for n, b in model.named_buffers() if n.endswith("num_batches_tracked")] == counts
    assert counts[0] > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtype_and_device_stay(dtype: torch.dtype) -> None:
    model, x = CASES["cnn_flatten"].build()
    model, x = model.to(dtype), x.to(dtype)
    optimizer = optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    pruner = NeuronPruner(model, optimizer, x, target=0.4, start=1, every=1, events=1)
    train(model, optimizer, x, torch.arange(len(x)) % 3, 2)
    assert pruner.step()
    for p in model.parameters():
        assert p.dtype == p.grad.dtype == optimizer.state[p]["momentum_buffer"].dtype == dtype
        assert p.device == torch.device("cpu")
    train(model, optimizer, x, torch.arange(len(x)) % 3, 1)


def test_memory_format_stays() -> None:
    model, x = CASES["residual"].build()
    model, x = model.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    optimizer = optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    pruner = NeuronPruner(model, optimizer, x, target=0.4, start=1, every=1, events=1)
    train(model, optimizer, x, torch.arange(len(x)) % 3, 2)
    assert pruner.step()
    seen = 0
    for p in model.parameters():
        if p.dim() == 4 and p.shape[2] > 1:
            seen += 1
            for t in (p, p.grad, optimizer.state[p]["momentum_buffer"]):
                assert t.is_contiguous(memory_format=torch.channels_last)
                assert t.shape[1] == 1 or not t.is_contiguous()
    assert seen == 5


def test_three_dimensional_memory_format_stays() -> None:
    model = nn.Sequential(nn.Conv3d(2, 6, 3), nn.ReLU(), nn.Conv3d(6, 3, 3), nn.Flatten())
    model = model.to(memory_format=torch.channels_last_3d)
    x = torch.randn(2, 2, 5, 5, 5)
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    pruner = NeuronPruner(model, optimizer, x, target=0.4, start=1, every=1, events=1)
    train(model, optimizer, x, torch.tensor([0, 1]), 1)
    assert pruner.step().widths_after["0"] == 4
    for module in (model[0], model[2]):
        assert module.weight.is_contiguous(memory_format=torch.channels_last_3d)
        assert not module.weight.is_contiguous()


def test_hooks_on_parameters_still_fire_once_and_can_be_removed() -> None:
    model, optimizer, pruner, x, y = setup()
    calls: list[str] = []
    p = model[3].conv1.weight
    handles = [
        p.register_hook(lambda g: calls.append(f"gradient {len(g)}")),
        p.register_post_accumulate_grad_hook(lambda q: calls.append(f"accumulated {len(q)}")),
    ]
    assert pruner.step()
    width = len(p)
    assert width < 6
    train(model, optimizer, x, y, 1)
    assert calls == [f"gradient {width}", f"accumulated {width}"]
    for handle in handles:
        handle.remove()
    train(model, optimizer, x, y, 1)
    assert len(calls) == 2


def test_module_hooks_and_user_attributes_stay() -> None:
    model, optimizer, pruner, x, y = setup()
    calls: list[int] = []

    def hook(*_: object) -> None:
        calls.append(1)

    model[3].conv1.register_forward_hook(hook)
    model[3].conv1.weight.no_decay = "yes"
    model[3].conv1.note = {"mine": 1}
    assert pruner.step()
    train(model, optimizer, x, y, 1)
    assert calls == [1]
    assert model[3].conv1.weight.no_decay == "yes"
    assert model[3].conv1.note == {"mine": 1}


class Holding(Tensor):
    """Keeps its numbers in an attribute, as classes of quantised tensors do, and has another that users may set."""

    held: Tensor
    tag: str | None

    @staticmethod
    def __new__(cls, held: Tensor) -> Holding:
        return Tensor._make_wrapper_subclass(cls, held.size(), dtype=held.dtype)  # type: ignore[attr-defined]

    def __init__(self, held: Tensor) -> None:
        self.held, self.tag = held, None

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inner = tree_map_only(Holding, lambda t: t.held, (args, kwargs or {}))
        return return_and_correct_aliasing(
            operation, args, kwargs or {}, tree_map_only(Tensor, Holding, operation(*inner[0], **inner[1]))
        )


def test_a_tensor_class_that_keeps_its_numbers_in_an_attribute_is_cut_and_put_back() -> None:
    numbers = torch.arange(12.0).view(4, 3)
    weight = nn.Parameter(Holding(numbers))
    weight.tag = "the user's"
    smaller = surgery.replacement(weight, surgery.select(weight, {0: torch.tensor([0, 2])}), None)
    change = surgery.exchange(weight, smaller, "weight")
    change.make()
    assert torch.equal(weight.held, numbers[[0, 2]])
    change.take_back()
    assert torch.equal(weight.held, numbers)
    assert weight.tag == "the user's"


def test_tied_weights_stay_tied() -> None:
    model, optimizer, pruner, x, y = setup("tied_linears")
    tied = model[2].weight
    assert pruner.step()
    assert model[2].weight is model[4].weight is tied
    assert len(tied) < 8
    train(model, optimizer, x, y, 2)
    assert model[2].weight is model[4].weight


def test_a_loss_that_is_still_alive_does_not_disturb_a_cut_or_what_follows() -> None:
    model, optimizer, pruner, x, y = setup()
    mine = list(model.parameters())
    loss = loss_of(model, x, y)
    optimizer.zero_grad()
    loss.backward()
    assert pruner.step()
    assert all(p is q for p, q in zip(mine, model.parameters(), strict=True))
    before = [p.detach().clone() for p in mine]
    train(model, optimizer, x, y, 2)
    assert all(not torch.equal(p, old) for p, old in zip(mine, before, strict=True))
    assert loss.isfinite()


def test_a_graph_that_is_still_to_be_run_backward_refuses_the_cut_by_name_and_nothing_changes() -> None:
    model, optimizer, pruner, x, y = setup()
    pending = loss_of(model, x, y)
    before = everything(model, optimizer, pruner)
    with pytest.raises(CutError, match=r"0\.weight.*(backward|graph)"):
        pruner.step()
    assert_same(everything(model, optimizer, pruner), before)
    pending.backward()
    del pending
    assert_nothing_happened_and_training_goes_on(model, optimizer, pruner, x, y, everything(model, optimizer, pruner))


def test_the_pruner_lives_no_longer_than_its_user_wants() -> None:
    model, optimizer, pruner, x, y = setup()
    assert len(optimizer._optimizer_step_pre_hooks) == 1
    alive = weakref.ref(pruner)
    del pruner
    assert alive() is None
    assert len(optimizer._optimizer_step_pre_hooks) == 0
    train(model, optimizer, x, y, 1)


# ---------------------------------------------------------------- optimizer state


def halves(parameters: Iterable[nn.Parameter]) -> optim.Optimizer:
    """Train the first parameters by SGD and the others by Adam."""
    all_of_them = list(parameters)
    first, others = all_of_them[: len(all_of_them) // 2], all_of_them[len(all_of_them) // 2 :]
    return ChainedOptimizer([optim.SGD(first, lr=0.05, momentum=0.9), optim.Adam(others, lr=0.01)])


OPTIMIZERS: dict[str, Callable[..., optim.Optimizer]] = {
    "SGD": lambda p: optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-3),
    "SGD without momentum": lambda p: optim.SGD(p, lr=0.05),
    "Adam": lambda p: optim.Adam(p, lr=0.01, amsgrad=True),
    "AdamW": lambda p: optim.AdamW(p, lr=0.01),
    "Adagrad": lambda p: optim.Adagrad(p, lr=0.01),
    "RMSprop": lambda p: optim.RMSprop(p, lr=0.001, momentum=0.9, centered=True),
    "Adadelta": lambda p: optim.Adadelta(p),
    "NAdam": lambda p: optim.NAdam(p, lr=0.01),
    "RAdam": lambda p: optim.RAdam(p, lr=0.01),
    "Adamax": lambda p: optim.Adamax(p, lr=0.01),
    "ASGD": lambda p: optim.ASGD(p, lr=0.01, t0=1),
    "Rprop": lambda p: optim.Rprop(p, lr=0.001),
    "fused Adam": lambda p: optim.Adam(p, lr=0.01, fused=True),
    "Adafactor": lambda p: optim.Adafactor(p, lr=0.01),
    "chained": halves,
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizer_state_of_kept_entries_stays_bit_for_bit(name: str) -> None:
    model, optimizer, pruner, _, _ = setup(make=OPTIMIZERS[name])
    before = {n: copy.deepcopy(optimizer.state.get(p, {})) for n, p in model.named_parameters()}
    assert pruner.step()
    indices = kept(pruner, model)
    compared = 0
    for n, p in model.named_parameters():
        after = optimizer.state.get(p, {})
        assert after.keys() == before[n].keys()
        for key, old in before[n].items():
            new = after[key]
            if isinstance(old, Tensor) and old.dim():
                expected = cut_by_hand(old, indices[n])
                assert torch.equal(new, expected), f"{n} {key}"
                compared += new.numel() < old.numel()
            else:
                assert_same(new, old)
    assert compared > 10 or name == "SGD without momentum"


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_goes_on_as_if_the_model_had_been_small_from_the_start(name: str) -> None:
    model, optimizer, pruner, x, y = setup(make=OPTIMIZERS[name])
    dense, dense_state = copy.deepcopy(model), copy.deepcopy(optimizer.state_dict())
    assert pruner.step()
    # The small model is built from class definitions and the dense numbers, not from what the pruner left.
    indices = kept(pruner, model)
    small = build_residual({name: len(entry["out"]) for name, entry in pruner.state_dict()["layers"].items()})
    small.load_state_dict({n: cut_by_hand(t, indices.get(n, ())) for n, t in dense.state_dict().items()})
    names = [n for n, _ in small.named_parameters()]
    parameters = list(small.parameters())
    other = OPTIMIZERS[name](parameters)
    for number, state in dense_state["state"].items():
        for key, t in state.items():
            sized = isinstance(t, Tensor) and t.dim()
            other.state[parameters[number]][key] = cut_by_hand(t, indices[names[number]]) if sized else t
    found, expected = (train(m, o, x, y, 6) for m, o in ((model, optimizer), (small, other)))
    assert found == pytest.approx(expected, rel=1e-12)
    assert len(set(found)) == 6
    for p, q in zip(model.parameters(), small.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=1e-9, atol=1e-12)


def build_residual(widths: dict[str, int]) -> nn.Module:
    """Build the residual net of ``nets.py`` with other widths, layer by layer."""
    model, _ = CASES["residual"].build()

    reads = {
        "0": "", "3.conv1": "0", "3.conv2": "3.conv1", "4.conv1": "3.conv2", "4.conv2": "4.conv1",
        "4.shortcut.0": "3.conv2",
    }  # fmt: skip
    norms = {
        "1": "0", "3.bn1": "3.conv1", "3.bn2": "3.conv2", "4.bn1": "4.conv1", "4.bn2": "4.conv2",
        "4.shortcut.1": "4.conv2",
    }  # fmt: skip
    fresh: dict[str, nn.Module] = {"7": nn.Linear(widths["4.conv2"], 3)}
    for name, before in reads.items():
        kernel = 1 if "shortcut" in name else 3
        fresh[name] = conv(widths.get(before, 2), widths[name], kernel, bias=False)
    for name, before in norms.items():
        fresh[name] = nn.BatchNorm2d(widths[before])
    for name, module in fresh.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, module)
    return model.double()


@pytest.mark.parametrize("ignore", [(), ("0",)])
def test_state_that_belongs_to_no_single_parameter_is_refused_before_anything_changes(ignore: tuple[str, ...]) -> None:
    model, x = CASES["mlp"].build()
    y = torch.arange(len(x)) % 3
    optimizer = optim.LBFGS(model.parameters(), lr=0.1, max_iter=3)
    pruner = NeuronPruner(model, optimizer, x, target=0.3, start=1, every=1, events=1, ignore=ignore)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(model, x, y)
        loss.backward()
        return loss

    optimizer.step(closure)
    before = everything(model, optimizer, pruner)
    with pytest.raises(CutError, match="choose an optimizer whose state has the parameters' shapes"):
        pruner.step()
    assert_same(everything(model, optimizer, pruner), before)
    optimizer.step(closure)


# ---------------------------------------------------------------- all or nothing


class Failure:
    """Lets the k-th exchange of real tensors fail; those of the trial on tensors without data go on."""

    def __init__(self, at: int, error: type[BaseException]) -> None:
        self._swap, self._at, self._error, self.calls = torch.utils.swap_tensors, at, error, 0
        self.refused: Tensor | None = None

    def __call__(self, a: Tensor, b: Tensor) -> None:
        self.calls += not a.is_meta
        if not a.is_meta and self.calls == self._at:
            self.refused = a
            raise self._error("injected")
        self._swap(a, b)


def assert_nothing_happened_and_training_goes_on(
    model: nn.Module, optimizer: optim.Optimizer, pruner: NeuronPruner, x: Any, y: Tensor, before: dict[str, Any]
) -> None:
    assert_same(everything(model, optimizer, pruner), before)
    twin_model, twin_optimizer = copy.deepcopy((model, optimizer))
    assert train(model, optimizer, x, y, 2) == train(twin_model, twin_optimizer, x, y, 2)
    assert pruner.step()
    train(model, optimizer, x, y, 2)


@pytest.mark.parametrize("kfac", [False, True])
@pytest.mark.parametrize("at", [1, 2, 9, 31])
def test_a_failure_in_the_middle_of_a_cut_leaves_everything_as_it_was(
    at: int, kfac: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, optimizer, pruner, x, y = setup()
    if kfac:
        wrapped = FlatKFAC(optimizer, model, every=1)
        pruner = NeuronPruner(model, wrapped, x, target=0.4, start=1, every=1, events=1)
        optimizer = wrapped
        train(model, optimizer, x, y, 1)
    model[0].weight.mine = "here"
    identities = [id(p) for p in model.parameters()]
    before = everything(model, optimizer, pruner)
    failure = Failure(at, RuntimeError)
    with monkeypatch.context() as patch:
        patch.setattr(torch.utils, "swap_tensors", failure)
        with pytest.raises(CutError, match="injected") as raised:
            pruner.step()
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert [name for name, t in tensors.items() if t is failure.refused and name in str(raised.value)]
    assert failure.calls == 2 * at - 1  # as many back as forth
    assert [id(p) for p in model.parameters()] == identities
    assert_nothing_happened_and_training_goes_on(model, optimizer, pruner, x, y, before)


def test_an_interrupt_in_the_middle_of_a_cut_leaves_everything_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer, pruner, x, y = setup()
    before = everything(model, optimizer, pruner)
    with monkeypatch.context() as patch:
        patch.setattr(torch.utils, "swap_tensors", Failure(5, KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            pruner.step()
    assert_nothing_happened_and_training_goes_on(model, optimizer, pruner, x, y, before)


def test_a_failed_cut_does_not_disturb_training_while_the_last_loss_is_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer, pruner, x, y = setup()
    optimizer.zero_grad()
    loss = loss_of(model, x, y)
    loss.backward()
    optimizer.step()
    before = everything(model, optimizer, pruner)
    with monkeypatch.context() as patch:
        patch.setattr(torch.utils, "swap_tensors", Failure(9, RuntimeError))
        with pytest.raises(CutError, match="injected"):
            pruner.step()
    assert_same(everything(model, optimizer, pruner), before)
    train(model, optimizer, x, y, 2)
    assert loss.isfinite()


def test_a_view_that_shares_a_parameter_is_named_and_nothing_changes() -> None:
    model, optimizer, pruner, x, y = setup()
    view = model[4].conv2.weight[0]
    before = everything(model, optimizer, pruner)
    with pytest.raises(CutError, match=r"4\.conv2\.weight"):
        pruner.step()
    del view
    assert_nothing_happened_and_training_goes_on(model, optimizer, pruner, x, y, before)


def test_a_weak_reference_to_a_parameter_is_named_and_nothing_changes() -> None:
    model, optimizer, pruner, x, y = setup()
    reference = weakref.ref(model[4].conv1.weight)
    before = everything(model, optimizer, pruner)
    with pytest.raises(CutError, match=r"4\.conv1\.weight cannot be cut while something holds a weak reference"):
        pruner.step()
    del reference
    assert_nothing_happened_and_training_goes_on(model, optimizer, pruner, x, y, before)


@pytest.mark.parametrize("odd", [torch.zeros(5), torch.zeros(3, 3), [torch.zeros(2)], {"a": 1}])
def test_optimizer_state_of_another_shape_is_named_and_nothing_changes(odd: Any) -> None:
    model, optimizer, pruner, x, y = setup()
    p = model[7].weight
    optimizer.state[p]["odd"] = odd
    before = everything(model, optimizer, pruner)
    with pytest.raises(
        CutError, match=r"keeps 'odd' for 7\.weight in a form that cannot be cut.* load the pruner's state before"
    ):
        pruner.step()
    assert_same(everything(model, optimizer, pruner), before)
    del optimizer.state[p]["odd"]
    del before["optimizer"]["state"][18]["odd"]
    assert_nothing_happened_and_training_goes_on(model, optimizer, pruner, x, y, before)


def test_a_cut_that_would_read_wrong_neurons_is_refused_by_the_check_before_anything_changes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, optimizer, pruner, x, y = setup()
    before = everything(model, optimizer, pruner)
    right = surgery.module_cut

    def wrong(module: nn.Module, kept: Any) -> Any:
        cut = right(module, kept)
        if isinstance(module, nn.Linear):
            cut.tensors["weight"].pop(1)  # forgets what the last layer reads
        return cut

    with monkeypatch.context() as patch:
        patch.setattr(surgery, "module_cut", wrong)
        with pytest.raises(CutError, match=r"7 \(Linear\)"):
            pruner.step()
    assert_nothing_happened_and_training_goes_on(model, optimizer, pruner, x, y, before)


def test_choosing_neurons_that_are_tied_to_others_is_refused_by_the_check(monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer, pruner, x, y = setup("in_place_sums")
    before = everything(model, optimizer, pruner)
    channels = dict(pruner._channels)
    untied = torch.arange(1000, 1006)
    channels["b"] = type(channels["b"])(channels["b"].inputs, untied)
    with monkeypatch.context() as patch:
        patch.setattr(pruner, "_left", dataclasses.replace(pruner._left, channels=channels))
        with pytest.raises(CutError):
            pruner.step()
    assert_nothing_happened_and_training_goes_on(model, optimizer, pruner, x, y, before)


@pytest.mark.parametrize("penalised", [False, True])
def test_layers_that_are_given_their_input_by_name_are_cut_like_any_others(penalised: bool) -> None:
    class ByName(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            x = self[2](self[1](input=self[0](input=x)))
            return self[5](input=self[4](self[3](input=x).mean((2, 3))))

    torch.manual_seed(0)
    plain = nn.Sequential(
        *(conv(2, 6), nn.BatchNorm2d(6), nn.ReLU(), conv(6, 8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))
    )
    layers = [plain[0], plain[1], plain[2], plain[3], nn.Identity(), plain[6]]
    named = ByName(*copy.deepcopy(layers))
    x, y, found = torch.randn(9, 2, 6, 6), torch.arange(9) % 3, []
    for model in (plain, named):
        optimizer: optim.Optimizer = optim.SGD(model.parameters(), lr=0.05)
        if penalised:
            optimizer = FlatKFAC(optimizer, model)
        pruner = NeuronPruner(model, optimizer, x, target=0.5, start=1, every=1, events=1)
        train(model, optimizer, x, y, 2)
        assert pruner.step().after.neurons == 7
        found.append(model(x))
    torch.testing.assert_close(found[0], found[1])


def test_an_input_given_by_a_wrong_name_is_refused_as_running_would() -> None:
    class Misnamed(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return self[1](inputs=self[0](x))

    model = Misnamed(nn.Linear(4, 6), nn.Linear(6, 3))
    with pytest.raises(ValueError, match="inputs"):
        NeuronPruner(model, optim.SGD(model.parameters(), lr=0.1), torch.randn(1, 4), target=0.5)
