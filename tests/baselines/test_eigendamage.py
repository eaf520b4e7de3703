"""EigenDamage puts bottlenecks in the place of layers: the right directions go, and what trains or saves follows."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn, optim
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from baselines import EigenDamagePruner, rotated
from kfac_flat import ChainedOptimizer, FlatKFAC
from kfac_flat.pruning.errors import CutError
from tests.baselines.test_fisher import Twice, most_likely
from tests.baselines.test_kron_pruning import Refusing, permuted, random
from tests.reference import Residual, factors, read, seeded


def wide() -> nn.Sequential:
    """A network whose layers have directions to spare."""
    model: nn.Sequential = seeded(
        lambda: nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 3))
    )
    return model


def convolutional() -> nn.Sequential:
    model: nn.Sequential = seeded(
        lambda: nn.Sequential(
            nn.Conv2d(2, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(inplace=True),
            nn.Conv2d(12, 16, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
            nn.Conv2d(16, 16, 1, stride=2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 3),
        )
    )  # fmt: skip
    return model


VECTORS, IMAGES = random(60, 8, seed=3), random(20, 2, 8, 8, seed=4)
CASES: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "wide": (wide, VECTORS),
    "convolutional": (convolutional, IMAGES),
    "residual": (lambda: seeded(Residual), IMAGES),
}


def pruner_of(model: nn.Module, x: Tensor, optimizer: Any = None, **options: Any) -> EigenDamagePruner:
    optimizer = optimizer or optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    usual: dict[str, Any] = {"target": 0.4, "likelihood": most_likely, "data": [x]}
    return EigenDamagePruner(model, optimizer, x[:1], **(usual | options))


def train(model: nn.Module, optimizer: optim.Optimizer, x: Tensor, steps: int = 3) -> list[float]:
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), torch.arange(len(x)) % 3)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def parts(module: nn.Module) -> list[str]:
    return [name for name, _ in module.named_children()]


# ---------------------------------------------------------------- which directions go


def by_hand(model: nn.Sequential, x: Tensor) -> dict[str, Tensor]:
    """Importance of every direction from dense Fisher blocks, by layer and side."""
    seen = read(model, lambda out: F.cross_entropy(out, out.argmax(1), reduction="sum"), x)
    found = {}
    for name in ("0", "2"):
        layer = model.get_submodule(name)
        ((A, G),) = factors(layer, *(t.detach() for t in seen[name]))
        W, dense = layer.weight.detach(), torch.kron(A, G)
        Q_A, Q_G = torch.linalg.eigh(A)[1], torch.linalg.eigh(G)[1]
        for side, removed in (
            ("in", [W @ torch.outer(q, q) for q in Q_A.T]),
            ("out", [torch.outer(q, q) @ W for q in Q_G.T]),
        ):
            found[f"{name}.{side}"] = torch.stack([dW.T.flatten() @ dense @ dW.T.flatten() for dW in removed])
    return found


def test_the_directions_below_one_threshold_go_as_far_as_they_pay() -> None:
    model = wide()
    expected, before = by_hand(model, VECTORS), copy.deepcopy(model)
    report = pruner_of(model, VECTORS, target=0.5).step()
    assert set(report.removed) <= set(expected)
    gone = torch.cat([expected[side][positions] for side, positions in report.removed.items()])
    # What is left on a side that lost some, and what its layer's other forms would have kept for not paying.
    stays = [
        expected[side][[i for i in range(len(expected[side])) if i not in positions]]
        for side, positions in report.removed.items()
    ]
    assert gone.max() <= torch.cat(stays).min() * (1 + 1e-6)
    assert gone.max() < 0.2 * max(scores.max() for scores in expected.values())
    assert report.after.parameters <= 0.5 * sum(p.numel() for p in before.parameters())


def test_the_layers_left_are_the_dense_ones_without_those_directions() -> None:
    model = wide()
    before = copy.deepcopy(model)
    seen = read(before, lambda out: F.cross_entropy(out, out.argmax(1), reduction="sum"), VECTORS)
    report = pruner_of(model, VECTORS, target=0.5).step()
    for name in ("0", "2"):
        layer = before.get_submodule(name)
        ((A, G),) = factors(layer, *(t.detach() for t in seen[name]))
        W = layer.weight.detach()
        for side, M in (("in", A), ("out", G)):
            Q = torch.linalg.eigh(M)[1][:, report.removed.get(f"{name}.{side}", torch.tensor([]).long())]
            W = W - W @ Q @ Q.T if side == "in" else W - Q @ (Q.T @ W)
        x = random(5, layer.in_features, seed=1)
        assert torch.allclose(model.get_submodule(name)(x), x @ W.T + layer.bias, atol=1e-9)
    assert torch.equal(model[4].weight, before[4].weight)


@settings(max_examples=5, deadline=None)
@given(order=st.permutations(range(16)), batches=st.permutations(range(4)))
def test_neither_the_order_of_neurons_nor_that_of_batches_matters(order: list[int], batches: list[int]) -> None:
    model, chunks = wide(), VECTORS.chunk(4)
    other = permuted(model, torch.tensor(order))
    report = pruner_of(model, VECTORS, data=chunks, target=0.5).step()
    same = pruner_of(other, VECTORS, data=[chunks[i] for i in batches], target=0.5).step()
    assert report.widths_after == same.widths_after
    assert torch.allclose(model(VECTORS), other(VECTORS), atol=1e-7)


@pytest.mark.parametrize("basis", ["channels", "patches"])
@pytest.mark.parametrize("budget", ["parameters", "macs", "neurons"])
@pytest.mark.parametrize("name", CASES)
def test_reports_tell_the_sizes_that_the_models_really_have(name: str, budget: str, basis: str) -> None:
    build, x = CASES[name]
    model = build()
    pruner = pruner_of(model, x, budget=budget, basis=basis, target=0.3, events=2, max_step=0.9)
    for _ in range(2):
        before, (report, planned) = pruner.size, (pruner.plan(), pruner.step())[::-1]
        assert str(planned.after) == str(report.after)
        assert report.before == before
        with FlopCounterMode(display=False) as counter:
            model.eval()(x)
        assert report.after.macs == pruner.size.macs == counter.get_total_flops() // (2 * len(x))
        assert report.after.parameters == sum(p.numel() for p in model.parameters())
        assert report.after.neurons == sum(report.widths_after.values())
        assert f"{report.after.parameters:,}" in report.table()
        train(model.train(), pruner._optimizer, x)
    assert pruner.finished
    rounding = 0.5 / report.before.neurons if budget == "neurons" else 0
    assert pruner.progress >= 0.3 - rounding or (budget == "neurons" and "pay" in report.reason)
    assert pruner.widths == pruner.history[-1].widths_after


@pytest.mark.parametrize("budget", ["parameters", "macs"])
@pytest.mark.parametrize("name", CASES)
def test_as_few_directions_go_as_reach_the_goal(name: str, budget: str) -> None:
    build, x = CASES[name]
    pruner = pruner_of(build(), x, budget=budget)
    seen, _ = pruner._read()
    order, sides = pruner._order(seen)
    amounts = [pruner._amount(seen, sides, order.first(count)) for count in range(len(order.ends) + 1)]
    assert amounts == sorted(amounts, reverse=True)
    assert amounts[0] == getattr(pruner.size, budget)
    expected = next(amount for amount in amounts if amount <= 0.6 * amounts[0])
    assert getattr(pruner.step().after, budget) == expected


@pytest.mark.parametrize(("events", "least"), [(1, 0.05), (2, 0.5)])
def test_no_side_loses_more_than_the_papers_share_in_one_removal(events: int, least: float) -> None:
    model = wide()
    report = pruner_of(model, VECTORS, target=0.95, events=events, pace="cubic").step()
    assert "at its floor" in report.reason
    for side, width in report.widths_after.items():
        assert width >= least * report.widths_before[side]
    assert any(width < (least + 0.1) * report.widths_before[side] for side, width in report.widths_after.items())


def test_nothing_happens_where_nothing_pays_or_is_due() -> None:
    model = wide()
    pruner = pruner_of(model, VECTORS, target=0.01, start=2, max_step=0.05)
    assert "no removal at the end of epoch 1" in pruner.step().reason
    before = copy.deepcopy(model.state_dict())
    assert "pay" in pruner.step().reason
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert "finished" in pruner.step().reason
    assert [r.epoch for r in pruner.history] == [1, 2, 3]


# ---------------------------------------------------------------- training goes on


@pytest.mark.parametrize("name", CASES)
def test_iterated_there_are_never_more_than_three_layers_for_one_and_training_goes_on(name: str) -> None:
    build, x = CASES[name]
    model = build()
    kinds = {n: type(m) for n, m in model.named_modules() if not isinstance(m, (nn.Linear, nn.Conv2d))}
    optimizer = optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    pruner = pruner_of(model, x, optimizer, target=0.5, events=3)
    for _ in range(3):
        assert pruner.step()
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        assert held == {id(p) for p in model.parameters()}
        losses = train(model, optimizer, x, steps=15)
        assert losses[-1] < losses[0]
        assert all(p.grad is not None for p in model.parameters())
    for layer in pruner.widths:
        module = model.get_submodule(layer.rpartition(".")[0])
        if isinstance(module, nn.Sequential):
            assert set(parts(module)) <= {"project", "core", "restore"}
            assert all(type(part) in (nn.Linear, nn.Conv2d) for part in module)
    assert {n: type(m) for n, m in model.named_modules() if n in kinds} == kinds


def test_new_weights_join_the_old_ones_group_without_state_and_the_rest_keeps_it() -> None:
    model = wide()
    groups = [
        {"params": list(model[:2].named_parameters()), "lr": 0.01, "weight_decay": 0.3},
        {"params": [(f"tail.{n}", p) for n, p in model[2:].named_parameters()]},
    ]
    optimizer = optim.Adam(groups, lr=0.02)
    train(model, optimizer, VECTORS)
    old, bias, head = model[0].weight, model[0].bias, model[4].weight
    moments = {p: copy.deepcopy(optimizer.state[p]) for p in (bias, head)}
    assert pruner_of(model, VECTORS, optimizer, target=0.5).step()
    first, second = optimizer.param_groups
    assert all(p is not old for p in first["params"])
    assert [id(p) for p in first["params"]] == [
        *(id(part.weight) for part in model[0]), id(bias)
    ]  # fmt: skip
    assert first["param_names"] == [*(f"0.{name}.weight" for name in parts(model[0])), "0.bias"]
    assert first["weight_decay"] == 0.3
    assert any(p is head for p in second["params"])
    assert old not in optimizer.state
    for part in model[0]:
        assert part.weight not in optimizer.state
    for p, state in moments.items():
        assert all(torch.equal(torch.as_tensor(v), torch.as_tensor(optimizer.state[p][k])) for k, v in state.items())
    assert model[0][-1].bias is bias
    assert train(model, optimizer, VECTORS, 20)[-1] < 1.1


def one(model: nn.Module) -> optim.Optimizer:
    return optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def several(model: nn.Module) -> optim.Optimizer:
    first, *others = model.parameters()
    return ChainedOptimizer([optim.SGD(part, lr=0.05, momentum=0.9) for part in ([first], others)])


@pytest.mark.parametrize("make", [one, several])
def test_a_step_that_fails_at_the_end_leaves_everything_as_it_was(
    make: Callable[[nn.Module], optim.Optimizer],
) -> None:
    model = wide()
    optimizer = make(model)
    train(model, optimizer, VECTORS)
    pruner = pruner_of(model, VECTORS, optimizer)
    modules, parameters = dict(model.named_modules()), list(model.parameters())
    before, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    pruner.history = Refusing()
    with pytest.raises(RuntimeError, match="full"):
        pruner.step()
    assert {n: id(m) for n, m in model.named_modules()} == {n: id(m) for n, m in modules.items()}
    assert all(p is q for p, q in zip(parameters, model.parameters(), strict=True))
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    now = optimizer.state_dict()
    assert now["param_groups"] == state["param_groups"]
    assert all(torch.equal(now["state"][i]["momentum_buffer"], s["momentum_buffer"]) for i, s in state["state"].items())
    pruner.history = []
    assert pruner.step()


# ---------------------------------------------------------------- saved, copied, exported


def pruned(name: str) -> tuple[nn.Module, EigenDamagePruner, Tensor]:
    build, x = CASES[name]
    model = build()
    pruner = pruner_of(model, x, target=0.5, events=2)
    for _ in range(2):
        assert pruner.step()
        train(model, pruner._optimizer, x)
    return model, pruner, x


@pytest.mark.parametrize("name", CASES)
def test_weights_load_into_a_fresh_model_of_the_recorded_shape(name: str) -> None:
    model, pruner, x = pruned(name)
    file = io.BytesIO()
    torch.save({"pruner": pruner.state_dict(), "model": model.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    fresh = rotated(CASES[name][0](), saved["pruner"])
    fresh.load_state_dict(saved["model"])
    assert torch.equal(fresh.eval()(x), model.eval()(x))
    assert repr(fresh) == repr(model)


@pytest.mark.parametrize("name", CASES)
def test_a_run_is_resumed_bit_for_bit(name: str) -> None:
    build, x = CASES[name]
    outcomes = []
    for interrupted in (False, True):
        model = build()
        optimizer = optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        pruner = pruner_of(model, x, optimizer, target=0.5, events=2)
        assert pruner.step()
        train(model, optimizer, x)
        if interrupted:
            states = copy.deepcopy([s.state_dict() for s in (pruner, model, optimizer)])
            model = build()
            optimizer = optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
            pruner = pruner_of(model, x, optimizer, target=0.5, events=2)
            for holder, state in zip((pruner, model, optimizer), states, strict=True):
                holder.load_state_dict(state)
        report = pruner.step()
        assert report
        outcomes.append((train(model, optimizer, x), str(report), str(model)))
    assert outcomes[0] == outcomes[1]


# torch's own exporter still does what torch's own pytree deprecates.
@pytest.mark.filterwarnings(r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated:FutureWarning")
@pytest.mark.parametrize("name", CASES)
def test_a_pruned_model_is_copied_and_exported_and_computes_the_same(name: str, tmp_path: Path) -> None:
    model, _, x = pruned(name)
    model, x = copy.deepcopy(model).eval().float(), x.float()
    expected = model(x).detach()
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("n")},))
    assert torch.equal(program.module()(x[:3]), model(x[:3]))
    path = tmp_path / "small.onnx"
    torch.onnx.export(model, (x,), path, dynamo=True, external_data=False, verbose=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert torch.allclose(torch.from_numpy(found), expected, atol=1e-4)


# ---------------------------------------------------------------- what stays whole, and what is refused


class Stubborn(nn.Module):
    """Layers that cannot be replaced, each for a reason of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.grouped, self.shared, self.twin = nn.Conv2d(2, 4, 1, groups=2), nn.Linear(4, 4), nn.Linear(4, 4)
        self.twin.weight = self.shared.weight
        self.hooked, self.unused, self.plain = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 20)
        self.hooked.register_forward_hook(lambda *_: None)
        self.kept, self.twice, self.head = nn.Linear(20, 3), Twice(), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.hooked(self.twin(self.shared(self.grouped(x).mean((2, 3)))))
        return self.head(self.twice(self.kept(self.plain(x).relu())))


def test_layers_that_stay_whole_are_named_with_the_reason() -> None:
    model, x = seeded(Stubborn), random(10, 2, 3, 3, seed=0)
    pruner = pruner_of(model, x, ignore=["kept"], target=0.2)
    reasons = {name: pruner.frozen[name] for name in ("grouped", "shared", "twin", "hooked", "unused", "kept", "head")}
    for name, words in {
        "grouped": "grouped", "shared": "shared", "twin": "shared", "hooked": "hooks", "unused": "not called",
        "kept": "on request", "head": "output",
    }.items():  # fmt: skip
        assert words in reasons[name]
    report = pruner.step()
    assert {side.rpartition(".")[0] for side in report.removed} <= {"plain", "twice.b"}
    assert "twice.a is not decomposed: called more than once" in report.reason


class Prying(nn.Module):
    """Its code looks into a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(8, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).tanh() * self.body.weight.sum())


def test_a_model_whose_code_looks_into_a_layer_is_left_as_it_is() -> None:
    model = seeded(Prying)
    pruner = pruner_of(model, VECTORS, target=0.2)
    layer = model.body
    with pytest.raises(CutError, match="ignore="):
        pruner.step()
    assert model.body is layer
    assert not pruner.history


def test_data_of_another_size_than_the_example_are_refused() -> None:
    with pytest.raises(ValueError, match="same size"):
        pruner_of(convolutional(), IMAGES, data=[IMAGES[..., :6, :6]]).step()


def test_a_layer_changed_by_something_else_is_noticed() -> None:
    model = wide()
    pruner = pruner_of(model, VECTORS)
    model[0] = nn.Linear(8, 16).double()
    with pytest.raises(CutError, match="changed by something else"):
        pruner.step()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"target": 0.0}, ValueError, "must lie in"),
        ({"budget": "latency"}, ValueError, "latency"),
        ({"basis": "wavelets"}, ValueError, "channels"),
        ({"max_step": 2.0}, ValueError, "max_step"),
        ({"pace": "quartic"}, ValueError, "pace"),
        ({"likelihood": "poisson"}, ValueError, "poisson"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        pruner_of(wide(), VECTORS, **options)


def test_flat_kfac_is_refused_since_it_follows_fixed_layers() -> None:
    model = wide()
    optimizer = FlatKFAC(optim.SGD(model.parameters(), lr=0.1), model)
    with pytest.raises(TypeError, match="plain optimizer"):
        pruner_of(model, VECTORS, optimizer)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"nowhere": {"in": 1, "out": 1, "by_patch": False}}, "no Linear or Conv2d"),
        ({"0": {"in": 9, "out": 1, "by_patch": False}}, "fewer than the manifest keeps"),
    ],
)
def test_a_manifest_of_another_model_is_refused(entry: dict[str, Any], message: str) -> None:
    with pytest.raises(CutError, match=message):
        rotated(wide(), {"layers": entry})
