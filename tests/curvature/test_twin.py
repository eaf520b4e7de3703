import copy
import gc
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

from kfac_flat import FlatKFAC
from kfac_flat.curvature.tracker import RadiusTracker
from kfac_flat.curvature.twin import Twin, UnreadableError, layer_names
from tests import reference
from tests.reference import Residual, batch, cross_entropy_sum, mlp, seeded


class Counting(nn.Module):
    """Writes a buffer and a plain attribute in forward, without and with a layer in between."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(4, 5), nn.Linear(5, 3)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.register_buffer("mean", torch.zeros(5, dtype=torch.float64))
        self.seen: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.inner(x))
        self.calls += 1
        self.mean = 0.9 * self.mean + 0.1 * hidden.detach().mean(0)
        self.seen.append(len(x))
        return self.head(hidden)


class InPlace(nn.Module):
    """Changes the outputs of layers in place, in the ways one meets."""

    def __init__(self, inplace: bool = True) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Conv2d(2, 2, 3, padding=1) for _ in range(3))
        self.relu = nn.ReLU(inplace)
        self.head = nn.Linear(2, 3)
        self.changes_outputs = inplace

    def forward(self, x: Tensor) -> Tensor:
        inplace = self.changes_outputs
        x = self.relu(self.first(x))
        x = F.relu(self.second(x), inplace=inplace)
        y = self.third(x)
        if inplace:
            y += x
            y *= 0.5
        else:
            y = 0.5 * (y + x)
        y = self.head(y.mean((2, 3)))
        return y.mul_(2) if inplace else y * 2


def normalised(norm: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(2, 4, 3), norm, nn.ReLU(), nn.Conv2d(4, 3, 3), nn.Flatten(), nn.Linear(3, 3))


BUFFERED: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "batchnorm": (Residual, (6, 2, 5, 5)),
    "batchnorm without momentum": (lambda: normalised(nn.BatchNorm2d(4, momentum=None)), (6, 2, 5, 5)),
    "instancenorm": (lambda: normalised(nn.InstanceNorm2d(4, track_running_stats=True)), (6, 2, 5, 5)),
    "own buffers": (Counting, (6, 4)),
    "spectral norm": (
        lambda: nn.Sequential(parametrizations.spectral_norm(nn.Linear(4, 5)), nn.Tanh(), nn.Linear(5, 3)),
        (6, 4),
    ),
}


def tracker(model: nn.Module, only: list[str] | None = None, reduction: str = "sum") -> RadiusTracker:
    return RadiusTracker(model, layer_names(model, only), reduction=reduction, exact=True, seed=0)


def differentiate(model: nn.Module, x: Tensor, y: Tensor) -> None:
    tracker(model).gradient((x,), {}, cross_entropy_sum(y), list(model.parameters()))


def wrapped(model: nn.Module, **options: Any) -> FlatKFAC:
    options = {"mu": 0.1, "every": 1, "batch_fraction": 1.0, **options}
    return FlatKFAC(torch.optim.SGD(model.parameters(), lr=0.05), model, **options)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, steps: int = 1) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()


def twin_output(model: nn.Module, x: Tensor) -> Tensor:
    """What the twin computes on x."""
    outputs: list[Tensor] = []

    def loss(output: Tensor) -> Tensor:
        outputs.append(output.detach().clone())
        return output.square().sum()

    Twin(model, layer_names(model)).read((x,), {}, loss, create_graph=False)
    return outputs[0]


# -------------------------------------------------------------------------------------------------- untouched


@pytest.mark.parametrize("kind", BUFFERED)
def test_buffers_stay_as_the_users_forward_left_them(kind: str) -> None:
    make, shape = BUFFERED[kind]
    model = seeded(make).train()
    x, y = batch(*shape)
    F.cross_entropy(model(x), y).backward()
    before = {name: (b, b.clone()) for name, b in model.named_buffers()}
    assert before
    differentiate(model, x, y)
    after = dict(model.named_buffers())
    assert after.keys() == before.keys()
    for name, (buffer, value) in before.items():
        assert after[name] is buffer
        assert torch.equal(buffer, value)


@pytest.mark.parametrize("kind", BUFFERED)
def test_training_with_a_penalty_moves_the_buffers_once_per_forward(kind: str) -> None:
    """Same parameters, same inputs: with lr = 0 the buffers must end up where those of an unwrapped model do."""
    make, shape = BUFFERED[kind]
    model = seeded(make).train()
    plain = copy.deepcopy(model)
    x, y = batch(*shape)
    optimizer = FlatKFAC(torch.optim.SGD(model.parameters(), lr=0.0), model, mu=0.1, every=1)
    train(model, optimizer, x, y, steps=3)
    for _ in range(3):
        plain(x)
    assert optimizer.rho > 0
    for name, buffer in plain.named_buffers():
        assert torch.equal(buffer, model.get_buffer(name)), name


def test_attributes_written_in_forward_are_the_users_own() -> None:
    model = seeded(Counting)
    train(model, wrapped(model), *batch(6, 4), steps=3)
    assert model.seen == [6, 6, 6]
    assert model.calls == 3


def test_modules_and_parameters_are_left_with_no_new_attributes() -> None:
    model = seeded(Residual).train()
    optimizer = wrapped(model)
    x, y = batch(6, 2, 5, 5)

    def attributes() -> tuple[list[set[str]], list[set[str]], list[type]]:
        modules = [set(vars(m)) for m in model.modules()]
        return modules, [set(vars(p)) for p in model.parameters()], [type(m) for m in model.modules()]

    before = attributes()
    train(model, optimizer, x, y, steps=2)
    assert attributes() == before
    train(model, optimizer, x, y)
    assert attributes() == before


def test_state_dict_has_the_same_keys_with_and_without_a_penalty() -> None:
    model = seeded(Residual).train()
    before = list(model.state_dict())
    train(model, wrapped(model), *batch(6, 2, 5, 5))
    assert list(model.state_dict()) == before


def test_the_users_hooks_fire_for_the_users_calls_only_and_stay() -> None:
    model = seeded(Residual).train()
    fired: list[str] = []
    model.register_forward_hook(lambda *_: fired.append("forward of the model"))
    model.conv.register_forward_pre_hook(lambda *_: fired.append("pre"))
    model.conv.register_forward_hook(lambda *_, **__: fired.append("forward"), with_kwargs=True)
    model.conv.register_full_backward_pre_hook(lambda *_: fired.append("backward pre"))
    model.conv.register_full_backward_hook(lambda *_: fired.append("backward"))
    optimizer = wrapped(model)
    x, y = batch(6, 2, 5, 5)
    for step in range(2):
        train(model, optimizer, x, y)
        once = ["pre", "forward", "forward of the model", "backward pre", "backward"]
        assert fired == once * (step + 1)
    assert optimizer.rho > 0


def test_hooks_registered_after_the_first_step_do_not_fire_in_the_twin_either() -> None:
    model = mlp()
    optimizer = wrapped(model)
    x, y = batch(6, 4)
    train(model, optimizer, x, y)
    fired: list[nn.Module] = []
    model[2].register_forward_hook(lambda module, *_: fired.append(module))
    train(model, optimizer, x, y)
    assert fired == [model[2]]


def test_parameters_gradients_are_not_written() -> None:
    model = mlp()
    x, y = batch(6, 4)
    F.cross_entropy(model(x), y).backward()
    before = [(p.grad, p.grad.clone()) for p in model.parameters()]
    differentiate(model, x, y)
    for p, (grad, value) in zip(model.parameters(), before, strict=True):
        assert p.grad is grad
        assert torch.equal(p.grad, value)


def test_the_users_graph_survives_for_a_backward_after_the_curvature() -> None:
    model = seeded(lambda: InPlace()).train()
    x, y = batch(5, 2, 4, 4)
    loss = F.cross_entropy(model(x), y)
    differentiate(model, x, y)
    loss.backward()
    expected = copy.deepcopy(model)
    expected.zero_grad()
    F.cross_entropy(expected(x), y).backward()
    for p, q in zip(model.parameters(), expected.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


def test_input_is_neither_changed_nor_given_a_gradient() -> None:
    model = nn.Sequential(nn.ReLU(inplace=True), seeded(lambda: nn.Linear(4, 3)))
    x, y = batch(6, 4)
    value = x.clone()
    differentiate(model, x, y)
    assert torch.equal(x, value)
    assert x.grad is None
    assert not x.requires_grad


def test_torchs_random_state_is_as_after_a_plain_step() -> None:
    def final_state(mu: float) -> Tensor:
        model = seeded(lambda: nn.Sequential(nn.Linear(4, 5), nn.Dropout(0.5), nn.Linear(5, 3)))
        torch.manual_seed(5)
        train(model, wrapped(model, mu=mu), *batch(6, 4), steps=3)
        return torch.get_rng_state()

    with torch.random.fork_rng():
        assert torch.equal(final_state(0.1), final_state(0.0))


# -------------------------------------------------------------------------------------------------- same computation


@pytest.mark.parametrize("kind", ["batchnorm", "batchnorm without momentum", "instancenorm", "own buffers"])
@pytest.mark.parametrize("training", [True, False])
def test_the_twin_computes_what_the_model_computes(kind: str, training: bool) -> None:
    make, shape = BUFFERED[kind]
    model = seeded(make).train()
    x, _ = batch(*shape)
    for scale in (1, 2, 3):
        model(scale * x)  # running statistics of their own
    model.train(training)
    seen = twin_output(model, x)
    assert torch.equal(seen, model(x).detach())


def test_in_place_operations_give_the_same_curvature_as_others() -> None:
    model = seeded(lambda: InPlace()).train()
    x, y = batch(5, 2, 4, 4)
    plain = copy.deepcopy(model)
    plain.relu.inplace = plain.changes_outputs = False
    seen = tracker(model).gradient((x,), {}, cross_entropy_sum(y), list(model.parameters()))
    rho, expected = reference.rho_and_gradient(plain, cross_entropy_sum(y), x, reduction="sum")
    assert torch.isclose(seen.rho, rho, rtol=1e-9, atol=0)
    reference.assert_gradients_close(reference.in_order(seen.parameters, model.parameters()), expected)
    assert model.relu.inplace


@pytest.mark.parametrize("steps", [1, 2])
def test_dropout_in_the_twin_draws_the_mask_of_the_models_own_pass(steps: int) -> None:
    """rho by the optimizer is that of the very pass the user made, masks included, at the first step and later."""
    model = seeded(lambda: nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 3)))
    x, y = batch(6, 4)
    seen: list[Tensor] = []
    model[2].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach()))
    optimizer, criterion = exact(model)
    with torch.random.fork_rng():
        torch.manual_seed(11)
        for _ in range(steps):
            criterion(model(x), y).backward()
            torch.randn(7)  # the generator moves on before step()
            optimizer.step()
    hidden = seen[steps - 1]
    assert (hidden == 0).any()
    g = F.linear(hidden, model[2].weight, model[2].bias).detach().softmax(1) - F.one_hot(y, 3)
    ((A, G),) = reference.factors(model[2], hidden, g)
    expected = float(torch.linalg.eigvalsh(A)[-1] * torch.linalg.eigvalsh(G)[-1])
    assert optimizer.radii()["2"] == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("position", [0, 2, 4])
@pytest.mark.parametrize(
    "constrain",
    [
        pytest.param(parametrizations.weight_norm, id="weight_norm"),
        pytest.param(parametrizations.orthogonal, id="orthogonal"),
        pytest.param(lambda layer: prune.random_unstructured(layer, "weight", amount=0.3), id="prune"),
    ],
)
def test_layers_with_a_computed_weight_are_read_or_reported(
    constrain: Callable[[nn.Module], nn.Module], position: int
) -> None:
    model = mlp()
    with torch.random.fork_rng():
        constrain(model[position])
    x, y = batch(6, 4)
    follower = tracker(model)
    seen = follower.gradient((x,), {}, cross_entropy_sum(y), list(model.parameters()))
    expected = reference.radii(model, cross_entropy_sum(y), x)
    assert follower.radii.keys() | follower.skipped.keys() == {"0", "2", "4"}  # not lost in silence
    for name, value in follower.radii.items():
        assert torch.isclose(value, expected[name].detach(), rtol=1e-9, atol=0)
    rho = sum(expected[name] for name in follower.radii)
    gradient = torch.autograd.grad(rho, list(model.parameters()), allow_unused=True, materialize_grads=True)
    reference.assert_gradients_close(reference.in_order(seen.parameters, model.parameters()), list(gradient))


# torch warns of its older weight_norm, which many models still have.
@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")
@pytest.mark.parametrize(
    "constrain", [weight_norm, spectral_norm, lambda layer: prune.random_unstructured(layer, "weight", amount=0.3)]
)
def test_layers_that_are_not_read_compute_their_weight_as_they_do_when_read(
    constrain: Callable[[nn.Module], nn.Module],
) -> None:
    """By hooks, without which the parameters behind the weight would have no gradient."""
    x, y = batch(8, 4)
    found = []
    for survey in (True, False):
        model = mlp()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            constrain(model[0])
        model[4].weight.data.mul_(0.3)
        model(x)
        follower = RadiusTracker(model, ["0", "2", "4"], reduction="max", exact=True, seed=0)
        parameters = list(model.parameters())
        follower.gradient((x,), {}, cross_entropy_sum(y), parameters)
        seen = follower.gradient((x,), {}, cross_entropy_sum(y), parameters, survey=survey)
        assert not seen.input_masks.keys() & {"0"}, "rho is to be that of another layer"
        found.append([seen.parameters[p] for p in parameters])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert all(gradient.any() for gradient in found[0])


class Doubling(nn.Linear):
    """Linear by its forward, and more than that by how it is called."""

    def __call__(self, input: Tensor) -> Tensor:
        doubled: Tensor = 2 * super().__call__(input)
        return doubled


def test_layers_that_are_not_read_are_called_as_their_class_says() -> None:
    model = seeded(lambda: nn.Sequential(Doubling(4, 5), nn.Tanh(), nn.Linear(5, 3)))
    x, _ = batch(6, 4)
    assert torch.equal(Twin(model, ["0", "2"]).output((x,), {}), model(x))


class AttentionAside(nn.Module):
    """Holds attention that this batch does not pass."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(4, 2), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x)


def test_attention_that_takes_no_part_is_no_part_of_rho() -> None:
    model = seeded(AttentionAside)
    optimizer, criterion = exact(model)
    x, y = batch(6, 4)
    assert measured(optimizer, criterion, model, x, y).keys() == {"head"}


@pytest.mark.parametrize("only", [None, ["0"], ["4"]])
def test_a_pass_that_fails_leaves_nothing_on_the_twin(only: list[str] | None) -> None:
    model = mlp()
    twin = Twin(model, ["0", "2", "4"])
    x, y = batch(6, 4)
    twin.read((x,), {}, cross_entropy_sum(y), create_graph=False)
    before = {name: (vars(layer).keys(), len(layer._forward_hooks)) for name, layer in twin.layers.items()}

    def fails(output: Tensor) -> Tensor:
        raise KeyError("no such loss")

    with pytest.raises(KeyError, match="no such loss"):
        twin.read((x,), {}, fails, create_graph=True, only=only)
    assert before == {name: (vars(layer).keys(), len(layer._forward_hooks)) for name, layer in twin.layers.items()}
    assert twin.read((x,), {}, cross_entropy_sum(y), create_graph=False, only=only).keys() == set(only or twin.layers)


@pytest.mark.parametrize("frozen", ["0", "2", "4"])
def test_a_layer_with_a_frozen_weight_has_no_block_and_the_others_are_right(frozen: str) -> None:
    model = mlp()
    model.get_submodule(frozen).requires_grad_(False)
    x, y = batch(6, 4)
    follower = tracker(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    seen = follower.gradient((x,), {}, cross_entropy_sum(y), trained)
    names = [name for name in ("0", "2", "4") if name != frozen]
    rho, expected = reference.rho_and_gradient(mlp(), cross_entropy_sum(y), x, reduction="sum", names=names)
    assert set(follower.radii) == set(names)
    assert torch.isclose(seen.rho, rho, rtol=1e-9, atol=0)
    kept = [e for e, p in zip(expected, model.parameters(), strict=True) if p.requires_grad]
    reference.assert_gradients_close(reference.in_order(seen.parameters, trained), kept)


# -------------------------------------------------------------------------------------------------- following changes


def radii_of(optimizer: FlatKFAC) -> dict[str, float]:
    return {name: pytest.approx(value, rel=1e-9) for name, value in optimizer.radii().items()}


def exact(model: nn.Module) -> tuple[FlatKFAC, nn.Module]:
    """An optimizer that does not move the model, but measures it exactly at the batch's labels."""
    criterion = nn.CrossEntropyLoss()
    base = torch.optim.SGD(model.parameters(), lr=0.0)
    options: dict[str, Any] = {"fisher": "empirical", "criterion": criterion, "eigenpairs": "exact"}
    return FlatKFAC(base, model, mu=0.1, every=1, survey_every=1, batch_fraction=1.0, **options), criterion


def measured(optimizer: FlatKFAC, criterion: nn.Module, model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Any]:
    optimizer.zero_grad()
    criterion(model(x), y).backward()
    optimizer.step()
    return radii_of(optimizer)


def expected_radii(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, float]:
    return {n: r.item() for n, r in reference.radii(copy.deepcopy(model), cross_entropy_sum(y), x).items()}


def test_the_twin_follows_flags_of_submodules() -> None:
    """A BatchNorm put in eval mode between steps reads its running statistics, in the twin too."""
    model = seeded(Residual).train()
    optimizer, criterion = exact(model)
    x, y = batch(6, 2, 5, 5)
    in_training = measured(optimizer, criterion, model, x, y)
    assert expected_radii(model, x, y) == in_training
    model.bn1.eval()
    frozen = measured(optimizer, criterion, model, x, y)
    assert expected_radii(model, x, y) == frozen
    assert expected_radii(model, x, y) != in_training
    model.bn1.train()
    assert expected_radii(model, x, y) == measured(optimizer, criterion, model, x, y)


def test_the_twin_follows_the_running_statistics_of_a_frozen_batchnorm() -> None:
    model = seeded(Residual).train()
    model.bn1.eval()
    optimizer, criterion = exact(model)
    x, y = batch(6, 2, 5, 5)
    before = measured(optimizer, criterion, model, x, y)
    model.bn1.running_var.mul_(0.25)
    after = measured(optimizer, criterion, model, x, y)
    assert expected_radii(model, x, y) == after
    assert expected_radii(model, x, y) != before


def test_the_twin_follows_settings_changed_between_steps() -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(4, 5), nn.LeakyReLU(0.1), nn.Dropout(0.9), nn.Linear(5, 3)))
    optimizer, criterion = exact(model)
    x, y = batch(6, 4)
    measured(optimizer, criterion, model, x, y)
    model[2].p = 0.0
    assert expected_radii(model, x, y) == measured(optimizer, criterion, model, x, y)
    before = expected_radii(model, x, y)
    model[1].negative_slope = 0.7
    assert expected_radii(model, x, y) == measured(optimizer, criterion, model, x, y)
    assert expected_radii(model, x, y) != before


class Scaled(nn.Module):
    """A tensor that is neither parameter nor buffer, renewed by the user between steps."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(4, 5), nn.Linear(5, 3)
        self.scale = torch.ones(5, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.scale * torch.tanh(self.first(x)))


@pytest.mark.parametrize("how", ["assigned", "in place"])
def test_the_twin_follows_plain_tensor_attributes(how: str) -> None:
    model = seeded(Scaled)
    optimizer, criterion = exact(model)
    x, y = batch(6, 4)
    measured(optimizer, criterion, model, x, y)
    if how == "assigned":
        model.scale = torch.linspace(0, 2, 5, dtype=torch.float64)
    else:
        model.scale.mul_(torch.linspace(0, 2, 5, dtype=torch.float64))
    assert expected_radii(model, x, y) == measured(optimizer, criterion, model, x, y)


def test_the_twin_follows_a_replaced_layer() -> None:
    model = mlp()
    optimizer, criterion = exact(model)
    x, y = batch(6, 4)
    before = measured(optimizer, criterion, model, x, y)
    model[2] = seeded(lambda: nn.Linear(6, 5), seed=9)
    optimizer.add_param_group({"params": list(model[2].parameters())})
    after = measured(optimizer, criterion, model, x, y)
    assert expected_radii(model, x, y) == after
    assert expected_radii(model, x, y) != before


class Switched(nn.Module):
    """One of its heads, under a second name, and a factor that may be none."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleList([nn.Linear(4, 3), nn.Linear(4, 3)])
        self.head = self.heads[0]
        self.factor: float | None = 2.0

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x) if self.factor is None else self.factor * self.head(x)


def test_the_twin_follows_a_second_name_given_to_another_module() -> None:
    model = seeded(Switched)
    optimizer, criterion = exact(model)
    x, y = batch(6, 4)
    assert measured(optimizer, criterion, model, x, y).keys() == {"heads.0"}
    model.head = model.heads[1]
    assert expected_radii(model, x, y) == measured(optimizer, criterion, model, x, y)
    assert optimizer.radii().keys() == {"heads.1"}


def test_the_twin_follows_a_setting_that_becomes_none() -> None:
    model = seeded(Switched)
    optimizer, criterion = exact(model)
    x, y = batch(6, 4)
    before = measured(optimizer, criterion, model, x, y)
    for factor in (None, 3.0, None):
        model.factor = factor
        assert expected_radii(model, x, y) == measured(optimizer, criterion, model, x, y)
        assert optimizer.radii() != before


def test_the_twin_follows_replaced_parameters_and_dtype() -> None:
    model = mlp(dtype=torch.float32)
    optimizer, criterion = exact(model)
    x, y = batch(6, 4, dtype=torch.float32)
    measured(optimizer, criterion, model, x, y)
    model.double()
    assert expected_radii(model, x.double(), y) == measured(optimizer, criterion, model, x.double(), y)


def test_the_twin_is_built_once_while_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[nn.Module] = []
    original = Twin.__init__

    def counted(self: Twin, model: nn.Module, names: Any) -> None:
        built.append(model)
        original(self, model, names)

    monkeypatch.setattr(Twin, "__init__", counted)
    model = seeded(Residual)
    train(model, wrapped(model), *batch(6, 2, 5, 5), steps=4)
    assert built == [model]


# -------------------------------------------------------------------------------------------------- several calls


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.once, self.twice, self.head = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.once(x))
        return self.head(torch.tanh(self.twice(torch.tanh(self.twice(x)))))


def test_a_layer_called_twice_is_reported_and_the_others_are_right() -> None:
    model = seeded(Shared)
    optimizer, criterion = exact(model)
    x, y = batch(6, 4)
    seen = measured(optimizer, criterion, model, x, y)
    assert optimizer.skipped_layers.keys() == {"twice"}
    assert "more than once" in optimizer.skipped_layers["twice"]
    expected = reference.radii(copy.deepcopy(model), cross_entropy_sum(y), x, names=["once", "head"])
    assert {n: r.item() for n, r in expected.items()} == seen


def test_twin_says_which_layer_is_called_twice() -> None:
    model = seeded(Shared)
    twin = Twin(model, layer_names(model))
    with pytest.raises(UnreadableError) as error:
        twin.read((batch(6, 4)[0],), {}, torch.sum, create_graph=False)
    assert error.value.layer is twin.layers["twice"]


def test_one_module_under_two_names_is_one_layer() -> None:
    model = seeded(Shared)
    model.alias = model.once
    assert layer_names(model) == ["once", "twice", "head"]


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.idle, self.head = nn.Linear(4, 5), nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.used(x)))


def test_a_layer_that_takes_no_part_has_no_radius() -> None:
    model = seeded(Unused)
    optimizer, criterion = exact(model)
    x, y = batch(6, 4)
    seen = measured(optimizer, criterion, model, x, y)
    assert expected_radii(model, x, y) == seen
    assert set(seen) == {"used", "head"}


def test_layers_can_be_chosen_by_name_pattern_and_class() -> None:
    model = seeded(Residual)
    assert layer_names(model) == ["stem", "conv", "head"]
    assert layer_names(model, ["*e*"]) == ["stem", "head"]
    assert layer_names(model, [nn.Conv2d]) == ["stem", "conv"]
    assert layer_names(model, [nn.Linear, "stem"]) == ["stem", "head"]


# -------------------------------------------------------------------------------------------------- copies, memory


def test_a_copy_of_a_trained_model_does_not_feed_the_originals_optimizer() -> None:
    model = seeded(Residual).train()
    optimizer = wrapped(model)
    x, y = batch(6, 2, 5, 5)
    train(model, optimizer, x, y)
    copied = copy.deepcopy(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (copied, pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False)):
        F.cross_entropy(other(x), y).backward()
        with pytest.raises(RuntimeError, match="no forward pass of the model"):
            optimizer.step()
        optimizer.zero_grad()
        assert all(p.grad is not None for p in other.parameters())
        assert all(p.grad is None for p in model.parameters())


def test_a_copied_model_is_free_of_the_optimizer() -> None:
    model = mlp()
    optimizer = wrapped(model)
    train(model, optimizer, *batch(6, 4))
    copied = copy.deepcopy(model)
    train(copied, wrapped(copied), *batch(6, 4), steps=2)
    assert all(p is not q for p, q in zip(model.parameters(), copied.parameters(), strict=True))


def test_the_model_outlives_the_optimizer_without_its_hook() -> None:
    model = mlp()
    hooks = len(model._forward_pre_hooks)
    optimizer = wrapped(model)
    train(model, optimizer, *batch(6, 4))
    assert len(model._forward_pre_hooks) == hooks + 1
    del optimizer
    gc.collect()
    assert len(model._forward_pre_hooks) == hooks


def alive() -> int:
    gc.collect()
    return sum(issubclass(type(item), Tensor) for item in gc.get_objects())


@pytest.mark.parametrize("every", [1, 2])
def test_no_tensors_pile_up_over_steps(every: int) -> None:
    model = seeded(Residual).train()
    optimizer = wrapped(model, every=every)
    x, y = batch(6, 2, 5, 5)
    train(model, optimizer, x, y, steps=4)
    before = alive()
    train(model, optimizer, x, y, steps=6)
    assert alive() <= before


def test_the_batch_is_released_after_the_step() -> None:
    model = mlp()
    optimizer = wrapped(model)

    def alive_batches() -> int:
        gc.collect()
        return sum(issubclass(type(item), Tensor) and item.shape == (61, 4) for item in gc.get_objects())

    x, y = batch(61, 4)
    assert alive_batches() == 1
    train(model, optimizer, x, y)
    del x
    assert alive_batches() == 0


def test_a_model_that_cannot_be_copied_is_named() -> None:
    class Stubborn(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(4, 3)
            self.source = (i for i in range(3))  # a generator

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x)

    model = Stubborn().double()
    x, y = batch(6, 4)
    optimizer = wrapped(model)
    with pytest.raises(TypeError, match=r"structure of Stubborn cannot be copied .*generator.*__deepcopy__"):
        train(model, optimizer, x, y)


class Closures(nn.Module):
    """Calls its layers through functions that hold them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.head = nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)
        norm = self.norm
        self.normalise = lambda x: norm(x)
        self.apply_head = lambda x, layer=self.head: layer(x)
        self.start = lambda x: self.first(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.apply_head(torch.tanh(self.normalise(self.start(x))))


def test_modules_held_in_closures_are_the_twins_own() -> None:
    model = seeded(Closures)
    optimizer, criterion = exact(model)
    x, y = batch(6, 4)
    seen = measured(optimizer, criterion, model, x, y)
    assert set(seen) == {"first", "head"}
    plain = nn.Sequential(model.first, model.norm, nn.Tanh(), model.head)
    assert {"first": "0", "head": "3"}.keys() == seen.keys()
    expected = reference.radii(copy.deepcopy(plain), cross_entropy_sum(y), x)
    assert {"first": expected["0"].item(), "head": expected["3"].item()} == seen
    assert model.norm.num_batches_tracked == 1
