"""Theta, read from weights and gradients, is the derivative of the objective at masks on what layers read."""

from __future__ import annotations

import copy
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim
from torch.nn import functional as F

from kfac_flat import FlatKFAC, NeuronPruner
from kfac_flat.pruning import saliency
from tests.pruning.masking import Probe, channel_axis, is_depthwise, layers_of, widths_of
from tests.pruning.nets import CASES, LAYERS

NETS = (
    *("mlp", "cnn_flatten", "residual", "densenet", "depthwise_separable", "depthwise_multiplier", "grouped"),
    *("squeeze_excite", "permuted_flatten", "called_twice", "tied_linears", "tokens", "batchnorm1d", "conv1d"),
    *("channel_shuffle", "unet"),
)
MU = 0.05


def targets(x: Tensor) -> Tensor:
    return torch.arange(len(x)) % 3


class Masked:
    """A copy of the model with a mask on the input of every layer that reads neurons."""

    def __init__(self, model: nn.Module) -> None:
        self.model = copy.deepcopy(model)
        self.masks: dict[str, Tensor] = {}
        self.read: dict[str, Tensor] = {}
        self.written: dict[str, Tensor] = {}
        for name, module in layers_of(self.model).items():
            if not is_depthwise(module):
                width = widths_of(module)[0]
                self.masks[name] = torch.ones(width, dtype=torch.float64, requires_grad=True)
                module.register_forward_pre_hook(self._mask(name))
            module.register_forward_hook(self._watch(name))

    def _mask(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
            shape = [1] * args[0].dim()
            shape[channel_axis(module, args[0])] = -1
            return (args[0] * self.masks[name].reshape(shape),)

        return hook

    def _watch(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
            self.read[name], self.written[name] = args[0], output
            return output.clone()  # an in-place activation must not change what was written

        return hook

    def rho(self, x: Tensor, losses: Tensor, reduction: str) -> Tensor:
        """[HGNP eq. 1-3] by forming A and G and decomposing them, differentiable in the masks."""
        radii = []
        for name, module in layers_of(self.model).items():
            if not isinstance(module, (nn.Linear, nn.Conv2d)):
                continue
            (g,) = torch.autograd.grad(losses.sum(), self.written[name], create_graph=True)
            a = self.read[name]
            if isinstance(module, nn.Conv2d):
                a = F.unfold(a, module.kernel_size, module.dilation, module.padding, module.stride)
                groups = module.groups
                a = a.reshape(len(x), groups, -1, a.shape[-1])
                g = g.reshape(len(x), groups, -1, a.shape[-1])
            else:
                a, g = a[:, None, :, None], g[:, None, :, None]
            A = torch.einsum("ngit,ngjt->gij", a, a) / len(x)
            G = torch.einsum("ngit,ngjt->gij", g, g) / (len(x) * g.shape[-1])
            radii.append((torch.linalg.eigvalsh(A)[:, -1] * torch.linalg.eigvalsh(G)[:, -1]).max())
        return torch.stack(radii).max() if reduction == "max" else torch.stack(radii).sum()


def per_group(pruner: NeuronPruner, model: nn.Module, x: Tensor, gradients: dict[str, Tensor]) -> Tensor:
    """Sum gradients at masks over all columns that each group of neurons feeds, as the probe finds them."""
    probe = Probe(model, x)
    sums = []
    for group in pruner._groups.ids.tolist():
        columns: set[tuple[str, int]] = set()
        for name in layers_of(model):
            for channel in (pruner._channels[name].outputs == group).nonzero().flatten().tolist():
                columns |= {(reader, c) for reader, found in probe.readers({name: [channel]}).items() for c in found}
        sums.append(sum(gradients[reader][c] for reader, c in columns))
    return torch.stack(sums).abs()


def theta(pruner: NeuronPruner) -> Tensor:
    scores = pruner._saliency.scores()
    assert scores is not None
    return torch.tensor(scores, dtype=torch.float64)


def assert_close(found: Tensor, expected: Tensor) -> None:
    assert expected.max() > 0
    assert float((found - expected).abs().max() / expected.max()) < 1e-6


def build(name: str, **options: Any) -> tuple[nn.Module, Tensor, optim.Optimizer, NeuronPruner]:
    model, x = CASES[name].build()
    optimizer: optim.Optimizer = optim.SGD(model.parameters(), lr=0.1)
    if options:
        plain = {"every": 1, "clip": None, "batch_fraction": 1.0, "eigenpairs": "exact", "fisher": "empirical"}
        optimizer = FlatKFAC(optimizer, model, mu=MU, penalty="linear", **plain, **options)
    return model, x, optimizer, NeuronPruner(model, optimizer, x, target=0.1, start=1, every=1, events=1)


@pytest.mark.parametrize("name", NETS)
def test_theta_is_the_gradient_of_the_loss_at_masks_averaged_over_steps(name: str) -> None:
    model, x, optimizer, pruner = build(name)
    expected = []
    for step in range(2):
        inputs = x + step
        masked = Masked(model)
        loss = F.cross_entropy(masked.model(inputs), targets(x))
        gradients = dict(zip(masked.masks, torch.autograd.grad(loss, list(masked.masks.values())), strict=True))
        expected.append(per_group(pruner, model, x, gradients))
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), targets(x)).backward()
        optimizer.step()
    assert_close(theta(pruner), torch.stack(expected).mean(0))
    assert not torch.allclose(expected[0], expected[1], rtol=1e-2)


PENALISED = ("mlp", "cnn_flatten", "residual", "grouped", "depthwise_separable", "batchnorm1d")


# The layer that attains rho in batchnorm1d is the first one, which reads no neurons.
@pytest.mark.parametrize(
    ("name", "reduction"), [(n, r) for n in PENALISED for r in ("max", "sum") if (n, r) != ("batchnorm1d", "max")]
)
def test_theta_with_the_penalty_is_the_gradient_of_the_whole_objective(name: str, reduction: str) -> None:
    criterion = nn.CrossEntropyLoss()
    model, x, optimizer, pruner = build(name, criterion=criterion, reduction=reduction)
    weights_alone = NeuronPruner(model, optimizer, x, target=0.1)
    weights_alone._optimizer = optimizer.base  # and so it knows of no direct dependence of rho on masks
    masked = Masked(model)
    losses = F.cross_entropy(masked.model(x), targets(x), reduction="none")
    masks = list(masked.masks.values())

    def at_masks(rho: Tensor) -> Tensor:
        gradients = torch.autograd.grad(losses.mean() + MU * rho, masks, retain_graph=True)
        return per_group(pruner, model, x, dict(zip(masked.masks, gradients, strict=True)))

    expected = at_masks(masked.rho(x, losses, reduction))
    optimizer.zero_grad()
    criterion(model(x), targets(x)).backward()
    optimizer.step()
    found = theta(pruner)
    assert_close(found, expected)
    for too_little in (theta(weights_alone), at_masks(0 * masked.rho(x, losses, reduction))):
        with pytest.raises(AssertionError):
            assert_close(too_little, expected)


def test_a_step_with_gradients_that_are_not_finite_is_left_out() -> None:
    model, x, optimizer, pruner = build("mlp")
    F.cross_entropy(model(x), targets(x)).backward()
    optimizer.step()
    before = theta(pruner)
    optimizer.param_groups[0]["lr"] = 0.0
    weights = model[2].weight.detach().clone()
    for poison in (torch.nan, torch.inf):
        model[2].weight.grad[0, 0] = poison
        optimizer.step()
        assert torch.equal(theta(pruner), before)
        with torch.no_grad():
            model[2].weight.copy_(weights)
    assert float(pruner._saliency.steps) == 1


def test_a_closure_is_scored_on_the_gradients_that_it_makes() -> None:
    results = []
    for use_closure in (False, True):
        model, x, optimizer, pruner = build("mlp")
        order: list[str] = []

        def closure(model: nn.Module = model, x: Tensor = x, order: list[str] = order) -> Tensor:
            order.append("closure")
            model.zero_grad()
            loss = F.cross_entropy(model(x), targets(x))
            loss.backward()
            return loss

        if use_closure:
            for p in model.parameters():
                p.grad = torch.full_like(p, 1e6)  # what was there before must not count
            assert optimizer.step(closure).isfinite()
            assert order == ["closure"]
        else:
            closure()
            optimizer.step()
        results.append(theta(pruner))
    assert torch.equal(*results)


@pytest.mark.parametrize("reduction", ["max", "sum"])
@pytest.mark.parametrize("name", NETS)
def test_theta_has_the_penalty_of_one_step_whether_that_step_adds_it_or_another(name: str, reduction: str) -> None:
    """Of weights that stay where they are, each step reads the same."""

    def read(every: int) -> list[Tensor]:
        model, x = CASES[name].build()
        base = optim.SGD(model.parameters(), lr=0.0)
        options = {"clip": None, "batch_fraction": 1.0, "eigenpairs": "exact", "fisher": "empirical"}
        optimizer = FlatKFAC(
            base,
            model,
            mu=MU,
            penalty="linear",
            every=every,
            reduction=reduction,
            criterion=nn.CrossEntropyLoss(),
            **options,
        )
        criterion = optimizer._options.criterion
        found = []
        for _ in range(every + 1):
            pruner = NeuronPruner(model, optimizer, x, target=0.1)
            optimizer.zero_grad()
            criterion(model(x), targets(x)).backward()
            optimizer.step()
            found.append(theta(pruner))
        return found

    at_every_step = read(1)[0]
    for seen in read(3):
        assert_close(seen, at_every_step)


def test_a_closure_given_by_keyword_to_flat_kfac_is_scored_with_the_penalty() -> None:
    results = []
    for use_closure in (False, True):
        criterion = nn.CrossEntropyLoss()
        model, x, optimizer, pruner = build("mlp", criterion=criterion)

        def closure(model: nn.Module = model, x: Tensor = x, criterion: nn.Module = criterion) -> Tensor:
            model.zero_grad()
            loss = criterion(model(x), targets(x))
            loss.backward()
            return loss

        if use_closure:
            optimizer.step(closure=closure)
        else:
            closure()
            optimizer.step()
        results.append(theta(pruner))
    assert torch.equal(*results)


def test_scores_begin_anew_after_a_cut() -> None:
    model, x, optimizer, _ = build("mlp")
    pruner = NeuronPruner(model, optimizer, x, target=0.5, start=1, every=1, events=2)
    F.cross_entropy(model(x), targets(x)).backward()
    optimizer.step()
    assert pruner.step()
    assert not pruner.finished
    assert pruner._saliency.scores() is None
    optimizer.zero_grad()
    masked = Masked(model)
    loss = F.cross_entropy(masked.model(x), targets(x))
    gradients = dict(zip(masked.masks, torch.autograd.grad(loss, list(masked.masks.values())), strict=True))
    F.cross_entropy(model(x), targets(x)).backward()
    optimizer.step()
    assert_close(theta(pruner), per_group(pruner, model, x, gradients))


@pytest.mark.parametrize("fused", [False, True])
def test_a_gradient_scaler_changes_no_score(fused: bool) -> None:
    results = []
    for enabled in (False, True):
        model, x = CASES["mlp"].build()
        optimizer = optim.SGD(model.parameters(), lr=0.1, fused=fused)
        pruner = NeuronPruner(model, optimizer, x, target=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1, enabled=enabled)
        for _ in range(3):
            optimizer.zero_grad()
            scaler.scale(F.cross_entropy(model(x), targets(x))).backward()
            scaler.step(optimizer)
            scaler.update()
        results.append(theta(pruner))
    assert_close(results[1], results[0])


def test_a_step_that_a_gradient_scaler_skips_is_not_scored() -> None:
    model, x, optimizer, pruner = build("mlp")
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    scaler.scale(F.cross_entropy(model(x), targets(x))).backward()
    model[0].weight.grad[0, 0] = torch.inf
    scaler.step(optimizer)
    scaler.update()
    assert pruner._saliency.scores() is None


def test_a_step_without_gradients_for_a_reader_keeps_its_neurons() -> None:
    model, x, optimizer, pruner = build("auxiliary_head")
    model.eval()
    F.cross_entropy(model(x), targets(x)).backward()
    optimizer.step()
    scores = theta(pruner)
    read_by_aux = torch.isin(pruner._groups.ids, pruner._channels["aux"].inputs)
    assert scores[read_by_aux].isinf().all()
    assert scores[~read_by_aux].isfinite().all()


def test_scoring_makes_no_graph_and_leaves_gradients_alone() -> None:
    model, x, optimizer, pruner = build("residual")
    F.cross_entropy(model(x), targets(x)).backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    references = [weakref.ref(p.grad) for p in model.parameters()]
    optimizer.step()
    assert not pruner._saliency.total.requires_grad
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients, strict=True))
    optimizer.zero_grad()
    assert all(reference() is None for reference in references)


def test_every_reader_is_masked_in_the_reference() -> None:
    model, _ = CASES["depthwise_separable"].build()
    masked = Masked(model)
    assert sorted(masked.masks) == ["0", "10", "6"]
    assert isinstance(masked.model[3], LAYERS)


@pytest.mark.parametrize("layer", [nn.Linear(7, 11), nn.Conv2d(6, 9, 3), nn.Conv2d(6, 10, (1, 2), groups=2)])
@pytest.mark.parametrize("in_cache", [1, 40, 10**6])
def test_a_mask_gradient_is_summed_up_alike_in_blocks_of_any_size(
    layer: Any, in_cache: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saliency, "_IN_CACHE", in_cache)
    weight, groups = layer.weight.detach().double(), getattr(layer, "groups", 1)
    gradient = torch.randn(weight.shape, dtype=torch.float64)
    outputs, columns = len(weight) // groups, weight.shape[1]
    expected = [
        sum((weight[o, c] * gradient[o, c]).sum() for o in range(g * outputs, (g + 1) * outputs))
        for g in range(groups)
        for c in range(columns)
    ]
    assert torch.allclose(saliency.mask_gradient(weight, gradient, groups), torch.stack(expected))


@pytest.mark.parametrize(("shape", "inputs"), [((0, 4), 4), ((3, 0), 0), ((0, 2, 3, 3), 2)])
def test_a_mask_gradient_of_a_layer_without_entries_is_zero(shape: tuple[int, ...], inputs: int) -> None:
    assert torch.equal(saliency.mask_gradient(torch.zeros(shape), torch.zeros(shape)), torch.zeros(inputs))


def test_a_mask_gradient_in_half_precision_is_added_up_in_single() -> None:
    weight = torch.full((4096, 2), 0.1, dtype=torch.bfloat16)
    found = saliency.mask_gradient(weight, torch.ones_like(weight))
    assert torch.allclose(found, 4096 * weight[0].float(), rtol=1e-5)
