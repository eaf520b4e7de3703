"""C-OBD, C-OBS, Kron-OBD and Kron-OBS are what the dense Fisher block says, and prune by it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn, optim
from torch.nn import functional as F

from baselines import ChannelOBDPruner, ChannelOBSPruner, KronOBDPruner, KronOBSPruner
from baselines import kron_pruning as kron
from kfac_flat import NeuronPruner
from kfac_flat.curvature.radius import LayerData
from tests.baselines.test_fisher import Twice, most_likely
from tests.curvature.test_layers import convolutions, linears
from tests.reference import Residual, covariance, mlp, patches, positions, seeded

PRUNERS = [ChannelOBDPruner, ChannelOBSPruner, KronOBDPruner, KronOBSPruner]
SURGEONS = [ChannelOBSPruner, KronOBSPruner]
# torch's own remark on even kernels; it is made once in a process, which is no behaviour to test
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
few = settings(max_examples=25, deadline=None)


# ---------------------------------------------------------------- against the dense Fisher


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@st.composite
def blocks(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """W, positive definite A and G, and rows that go, not all of them."""
    d_out, d_in, seed = draw(st.integers(2, 4)), draw(st.integers(1, 4)), draw(st.integers(0, 2**20))
    A, G = (m @ m.T + 0.1 * torch.eye(d) for d in (d_in, d_out) for m in [random(d, d, seed=seed + d)])
    gone = draw(st.lists(st.booleans(), min_size=d_out, max_size=d_out).filter(lambda g: any(g) and not all(g)))
    return random(d_out, d_in, seed=seed + 2), A, G, torch.tensor(gone)


def vec(W: Tensor) -> Tensor:
    """Stack columns."""
    return W.T.flatten()


def unvec(w: Tensor, like: Tensor) -> Tensor:
    return w.reshape(like.shape[1], like.shape[0]).T


def constrained_minimiser(W: Tensor, F: Tensor, gone: Tensor) -> Tensor:
    """dW that minimises vec(dW)^T F vec(dW) / 2 where the rows that go become zero: the KKT system, solved densely."""
    fixed = vec(gone[:, None].expand_as(W)).nonzero().flatten()
    E = torch.eye(W.numel(), dtype=torch.float64)[fixed]
    KKT = torch.cat([torch.cat([F, E.T], 1), torch.cat([E, torch.zeros(len(E), len(E)).double()], 1)])
    right = torch.cat([torch.zeros(W.numel()).double(), -vec(W)[fixed]])
    return unvec(torch.linalg.solve(KKT, right)[: W.numel()], W)


def rise(dW: Tensor, F: Tensor) -> Tensor:
    return vec(dW) @ F @ vec(dW)


@few
@given(blocks())
def test_kron_obd_is_the_quadratic_form_of_the_removed_row(block: tuple[Tensor, ...]) -> None:
    W, A, G, _ = block
    found = kron.kron_obd_importance(W[None], A[None], G[None])[0]
    for o in range(len(W)):
        dW = torch.zeros_like(W)
        dW[o] = -W[o]
        assert torch.isclose(found[o], rise(dW, torch.kron(A, G)), rtol=1e-9)


@few
@given(blocks())
def test_kron_obs_is_the_constrained_minimiser_of_the_dense_quadratic_form(block: tuple[Tensor, ...]) -> None:
    W, A, G, gone = block
    F = torch.kron(A, G)
    updated = kron.kron_obs_update(W[None], G[None], gone[None])[0]
    assert torch.allclose(updated, W + constrained_minimiser(W, F, gone), rtol=1e-7, atol=1e-8)
    found = kron.kron_obs_importance(W[None], A[None], torch.linalg.inv(G)[None])[0]
    for o in range(len(W)):
        alone = torch.arange(len(W)) == o
        least = constrained_minimiser(W, F, alone)
        assert torch.isclose(found[o], rise(least, F), rtol=1e-7)


@few
@given(blocks())
def test_kron_obs_costs_no_more_than_kron_obd(block: tuple[Tensor, ...]) -> None:
    W, A, G, _ = (t[None] for t in block)
    obs, obd = kron.kron_obs_importance(W, A, torch.linalg.inv(G)), kron.kron_obd_importance(W, A, G)
    assert (obs <= obd * (1 + 1e-9)).all()


@few
@given(blocks())
def test_channel_obs_is_surgery_weight_by_weight_with_the_inverse_of_the_dense_block(block: tuple[Tensor, ...]) -> None:
    W, A, G, gone = block
    F_inverse = torch.linalg.inv(torch.kron(A, G))
    importance, updated = torch.zeros(len(W)).double(), W.clone()
    for o, i in torch.cartesian_prod(torch.arange(len(W)), torch.arange(W.shape[1])):
        q = i * len(W) + o
        importance[o] += W[o, i] ** 2 / F_inverse[q, q]
        if gone[o]:
            updated -= unvec(W[o, i] / F_inverse[q, q] * F_inverse[:, q], W)
    inverses = torch.linalg.inv(A)[None], torch.linalg.inv(G)[None]
    assert torch.allclose(kron.channel_obs_importance(W[None], *inverses)[0], importance, rtol=1e-7)
    found = kron.channel_obs_update(W[None], *inverses, gone[None])[0]
    assert torch.allclose(found[~gone], updated[~gone], rtol=1e-7, atol=1e-8)
    assert not found[gone].any()


@few
@given(st.one_of(linears(), convolutions()))
def test_statistics_are_sums_over_examples_and_positions_with_a_one_for_the_bias(case: Any) -> None:
    layer, a, g = case
    seen, p, q = LayerData(layer, a, g), patches(layer, a), positions(layer, g)
    if layer.bias is not None:
        p = torch.cat([p, torch.ones_like(p[..., :1])], -1)
    A, G = kron.kronecker_factors(seen)
    (diagonal,) = kron.fisher_diagonal(seen)
    W = kron.weight_matrix(layer)
    output = torch.einsum("ngtd,god->ngot", p, W)
    reference = layer(a).movedim(-1, 1) if isinstance(layer, nn.Linear) else layer(a)
    assert torch.allclose(output.flatten(), reference.flatten(), atol=1e-12)
    for group in range(p.shape[1]):
        assert torch.allclose(A[group], covariance(p[:, group]), atol=1e-12)
        assert torch.allclose(G[group], covariance(q[:, group]) / q.shape[2], atol=1e-12)
        own = torch.zeros_like(diagonal[group])
        for n in range(len(p)):
            gradient = sum(torch.outer(q[n, group, t], p[n, group, t]) for t in range(p.shape[2]))
            own += torch.as_tensor(gradient) ** 2 / len(p)
        assert torch.allclose(diagonal[group], own, atol=1e-12)


def test_damping_makes_any_factor_invertible_and_is_relative_to_it() -> None:
    M = torch.diag(torch.tensor([4.0, 0.0]).double())[None]
    assert torch.equal(kron.damped(M, 0.5)[0], torch.diag(torch.tensor([5.0, 1.0]).double()))
    assert torch.linalg.inv(kron.damped(torch.zeros_like(M), 0.5)).isfinite().all()


# ---------------------------------------------------------------- the pruners


def pruner_of(kind: type[NeuronPruner], model: nn.Module, x: Tensor, **options: Any) -> Any:
    optimizer = options.pop("optimizer", None) or optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    usual = {
        "target": 0.4,
        "start": 1,
        "every": 1,
        "events": 1,
        "max_share": 1.0,
        "likelihood": most_likely,
        "data": [x],
    }
    return kind(model, optimizer, x[:1], **(usual | options))


def brute_force(model: nn.Sequential, x: Tensor, kind: type[NeuronPruner]) -> dict[int, Tensor]:
    """Importance of each hidden neuron of an MLP from dense Fisher blocks, by layer."""
    activations, outputs = {}, {}
    h = x
    for i, layer in enumerate(model):
        activations[i], h = h, layer(h)
        outputs[i] = h
    loss = F.cross_entropy(h, h.argmax(1), reduction="sum")
    hidden = [i for i, layer in enumerate(model[:-1]) if isinstance(layer, nn.Linear)]
    gradients = dict(zip(hidden, torch.autograd.grad(loss, [outputs[i] for i in hidden]), strict=True))
    scores = {}
    for i in hidden:
        a = torch.cat([activations[i], torch.ones(len(x), 1)], 1).detach()
        W = torch.cat([model[i].weight, model[i].bias[:, None]], 1).detach()
        A, G = a.T @ a / len(x), gradients[i].T @ gradients[i] / len(x)
        blocks_ = [m + 1e-4 * m.trace() / len(m) * torch.eye(len(m)) for m in (A, G)]
        dense, inverse = torch.kron(A, G), torch.linalg.inv(torch.kron(*blocks_))
        F_diagonal = (gradients[i].T ** 2 @ a**2) / len(x)
        own = []
        for o in range(len(W)):
            row = torch.zeros_like(W)
            row[o] = -W[o]
            if kind is KronOBDPruner:
                own.append(rise(row, dense))
            elif kind is ChannelOBDPruner:
                own.append((row**2 * F_diagonal).sum())
            elif kind is ChannelOBSPruner:
                own.append((vec(row) ** 2 / inverse.diagonal()).sum())
            else:
                definite = torch.kron(A + 1e-12 * torch.eye(len(A)), blocks_[1])
                own.append(rise(constrained_minimiser(W, definite, torch.arange(len(W)) == o), definite))
        scores[i] = torch.stack(own)
    return scores


@pytest.mark.parametrize("kind", PRUNERS)
def test_the_neurons_of_least_importance_go(kind: type[NeuronPruner]) -> None:
    model, x = mlp(), random(40, 4, seed=3)
    expected = brute_force(model, x, kind)
    pruner = pruner_of(kind, model, x)
    found = pruner._layer_scores()
    for i, scores in expected.items():
        assert torch.allclose(found[str(i)], scores, rtol=1e-5)
    smallest = torch.cat(list(expected.values())).argsort()[: round(0.4 * 11)]
    removed = pruner.step().removed
    gone = [offset + i for name, offset in (("0", 0), ("2", 6)) if name in removed for i in removed[name].tolist()]
    assert gone == sorted(smallest.tolist())


@pytest.mark.parametrize("kind", [ChannelOBDPruner, KronOBDPruner])
def test_brain_damage_leaves_the_remaining_weights_alone(kind: type[NeuronPruner]) -> None:
    model, x = mlp(), random(40, 4, seed=3)
    before = copy.deepcopy(model)
    pruner = pruner_of(kind, model, x)
    assert pruner.step()
    kept = pruner.survivors
    assert torch.equal(model[2].weight, before[2].weight[kept["2"]][:, kept["0"]])
    assert torch.equal(model[2].bias, before[2].bias[kept["2"]])


@pytest.mark.parametrize("kind", SURGEONS)
def test_surgery_changes_the_remaining_weights_as_the_formula_says(kind: type[NeuronPruner]) -> None:
    model, x = mlp(), random(40, 4, seed=3)
    ema = copy.deepcopy(model)
    with torch.no_grad():
        ema[0].weight.mul_(2)
    before, other = copy.deepcopy(model), copy.deepcopy(ema)
    parameters = list(model.parameters())
    pruner = pruner_of(kind, model, x, copies=[ema], target=0.5)
    pruner._layer_scores()
    statistics = copy.deepcopy(pruner._statistics)
    assert pruner.step()
    assert all(p is q for p, q in zip(parameters, model.parameters(), strict=True))
    for old, new in ((before, model), (other, ema)):
        for name, columns in (("0", torch.arange(4)), ("2", pruner.survivors["0"])):
            gone = torch.ones(len(old.get_submodule(name).weight), dtype=torch.bool)
            gone[pruner.survivors[name]] = False
            assert gone.any()
            W = kron.weight_matrix(old.get_submodule(name))
            updated = pruner._updated(W, gone[None], *statistics[name])[0][~gone]
            assert torch.allclose(new.get_submodule(name).weight, updated[:, columns])
            assert torch.allclose(new.get_submodule(name).bias, updated[:, -1])
            assert not torch.allclose(updated, W[0][~gone], rtol=1e-2)


def test_compensation_makes_up_exactly_for_a_neuron_whose_effect_another_one_has() -> None:
    """Two neurons with the same outgoing weights have the same gradient: one takes over the other's row."""
    model = seeded(lambda: nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 4)))
    with torch.no_grad():
        model[1].weight[:, 1] = model[1].weight[:, 0]
        model[0].weight[1] *= 0.1
        model[0].bias[1] *= 0.1
    x = random(50, 4, seed=5)
    expected = model(x).detach()
    pruner = pruner_of(KronOBSPruner, model, x, target=0.33, damping=1e-12)
    report = pruner.step()
    assert report.removed["0"].tolist() in ([0], [1])
    assert torch.allclose(model(x), expected, atol=1e-6)


def permuted(model: nn.Sequential, order: Tensor) -> nn.Sequential:
    """The same function with the first layer's neurons in another order."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        other[0].weight.copy_(model[0].weight[order])
        other[0].bias.copy_(model[0].bias[order])
        other[2].weight.copy_(model[2].weight[:, order])
    return other


@pytest.mark.parametrize("kind", PRUNERS)
@settings(max_examples=5, deadline=None)
@given(order=st.permutations(range(6)), batches=st.permutations(range(4)))
def test_scores_follow_the_neurons_and_do_not_depend_on_the_order_of_the_batches(
    kind: type[NeuronPruner], order: list[int], batches: list[int]
) -> None:
    model, x = mlp(), random(40, 4, seed=3)
    parts = x.chunk(4)
    before = pruner_of(kind, model, x, data=parts)._layer_scores()
    other = permuted(model, torch.tensor(order))
    after = pruner_of(kind, other, x, data=[parts[i] for i in batches])._layer_scores()
    assert torch.allclose(after["0"], before["0"][torch.tensor(order)], rtol=1e-6)
    assert torch.allclose(after["2"], before["2"], rtol=1e-6)


class Refusing(list[Any]):
    """A history that takes nothing."""

    def append(self, item: Any) -> None:
        raise RuntimeError("full")


@pytest.mark.parametrize("kind", PRUNERS)
def test_a_step_that_fails_at_the_end_leaves_everything_as_it_was(kind: type[NeuronPruner]) -> None:
    model, x = mlp(), random(40, 4, seed=3)
    optimizer = optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(x).sum().backward()
    optimizer.step()
    pruner = pruner_of(kind, model, x, optimizer=optimizer)
    before, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    pruner.history = Refusing()
    with pytest.raises(RuntimeError, match="full"):
        pruner.step()
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    momenta = optimizer.state_dict()["state"]
    assert all(torch.equal(momenta[i]["momentum_buffer"], s["momentum_buffer"]) for i, s in state["state"].items())
    pruner.history = []
    assert pruner.step()


@pytest.mark.parametrize("kind", PRUNERS)
def test_convolutions_with_batch_norm_and_tied_and_grouped_channels_are_pruned_and_train_on(kind: Any) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.first = Residual(), nn.Conv2d(2, 4, 1)
            self.depthwise = nn.Conv2d(4, 4, 3, padding=1, groups=4)
            self.grouped = nn.Conv2d(4, 8, 1, groups=2)
            self.mix = nn.Conv2d(8, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.body(self.mix(self.grouped(self.depthwise(self.first(x))).relu()))

    model, x = seeded(Net), random(12, 2, 5, 5, seed=2)
    optimizer = optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    pruner = pruner_of(kind, model, x, optimizer=optimizer, target=0.5, events=2, ranking="layer")
    for _ in range(2):
        assert pruner.step()
        loss = F.cross_entropy(model(x), torch.arange(12) % 3)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.isfinite()
    assert pruner.sparsity >= 0.45
    assert {"body.stem", "body.conv", "depthwise", "grouped"} <= {n for r in pruner.history for n in r.removed}


def test_the_data_are_read_only_when_a_removal_is_due() -> None:
    class Counted(list[Any]):
        times = 0

        def __iter__(self) -> Any:
            self.times += 1
            return super().__iter__()

    model, x = mlp(), random(40, 4, seed=3)
    data = Counted([x])
    pruner = pruner_of(KronOBDPruner, model, x, data=data, start=3)
    reports = [pruner.step() for _ in range(4)]
    assert list(map(bool, reports)) == [False, False, True, False]
    assert data.times == 1


def test_layers_without_kronecker_factors_stay_and_say_so() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.twice, self.head = nn.Conv1d(1, 4, 3), Twice(), nn.Linear(3, 2)
            self.before = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.twice(self.before(self.conv(x[:, None]).mean(2))))

    model, x = seeded(Net), random(10, 6, seed=0)
    pruner = pruner_of(KronOBDPruner, model, x, target=0.1)
    assert "neither a Linear nor a Conv2d" in pruner.frozen["conv"]
    removed = pruner.step().removed
    assert removed
    assert not removed.keys() & {"conv", "twice.a"}


def test_a_manifest_of_surgery_is_loaded_without_changing_weights() -> None:
    model, x = mlp(), random(40, 4, seed=3)
    pruner = pruner_of(KronOBSPruner, model, x)
    pruner.step()
    fresh = mlp(seed=1)
    dense = copy.deepcopy(fresh)
    other = pruner_of(KronOBSPruner, fresh, x)
    other.plan()
    other.load_state_dict(pruner.state_dict())
    kept = pruner.survivors
    assert torch.equal(fresh[2].weight, dense[2].weight[kept["2"]][:, kept["0"]])


@pytest.mark.parametrize(
    ("options", "message"),
    [({"damping": 0.0}, "must be positive"), ({"keep_removed": True}, "cannot be undone")],
)
@pytest.mark.parametrize("kind", SURGEONS)
def test_what_surgery_cannot_do_is_refused(kind: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pruner_of(kind, mlp(), torch.zeros(2, 4).double(), **options)


@pytest.mark.parametrize("kind", [ChannelOBDPruner, KronOBDPruner])
def test_brain_damage_can_be_undone(kind: Callable[..., Any]) -> None:
    model, x = mlp(), random(40, 4, seed=3)
    before = copy.deepcopy(model.state_dict())
    pruner = pruner_of(kind, model, x, keep_removed=True)  # type: ignore[arg-type]
    pruner.step()
    pruner.undo()
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
