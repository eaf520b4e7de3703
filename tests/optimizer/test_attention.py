"""nn.MultiheadAttention is read like the explicit layers and the attention function that it stands for."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD

from kfac_flat import FlatKFAC, NeuronPruner, spectral_radii
from tests import reference
from tests.optimizer.loops import penalty, plain
from tests.reference import assert_gradients_close, batch, cross_entropy_sum, seeded

WIDTH, HEADS, LENGTH = 8, 2, 5
PARTS = ("q_proj", "k_proj", "v_proj", "out_proj")


class Explicit(nn.Module):
    """Attention written down with four linear layers."""

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        packed = attention.in_proj_weight is not None
        weights = (
            attention.in_proj_weight.chunk(3) if packed else [getattr(attention, f"{n}_weight") for n in PARTS[:3]]
        )
        biases = [None] * 3 if attention.in_proj_bias is None else attention.in_proj_bias.chunk(3)
        out = attention.out_proj
        for name, weight, bias in zip(PARTS, [*weights, out.weight], [*biases, out.bias], strict=True):
            layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, dtype=weight.dtype)
            with torch.no_grad():
                layer.weight.copy_(weight)
                if bias is not None:
                    layer.bias.copy_(bias)
            self.add_module(name, layer)
        self.head_dim = attention.head_dim

    def forward(self, query: Tensor, key: Tensor, value: Tensor, **masks: Any) -> Tensor:
        """Everything with the examples first; a mask of [T, T] is added to the logits, one of [N, T] hides keys."""
        q, k, v = (
            self.get_submodule(name)(t).unflatten(2, (-1, self.head_dim)).transpose(1, 2)
            for name, t in zip(PARTS[:3], (query, key, value), strict=True)
        )
        mask = None
        if "attn_mask" in masks:
            mask = masks["attn_mask"]
        if "key_padding_mask" in masks:
            mask = ~masks["key_padding_mask"][:, None, None, :]
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            heads = F.scaled_dot_product_attention(q, k, v, mask)
        out: Tensor = self.get_submodule("out_proj")(heads.transpose(1, 2).flatten(2))
        return out


class Encoder(nn.Module):
    """Reads a sequence by itself, or another sequence made from the same data, through attention."""

    def __init__(self, cross: bool, **options: Any) -> None:
        super().__init__()
        self.cross, self.batch_first = cross, options.get("batch_first", False)
        self.embed, self.context = nn.Linear(4, WIDTH), nn.Linear(4, options.get("kdim", WIDTH))
        self.attention: nn.Module = nn.MultiheadAttention(WIDTH, HEADS, **options)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor, **masks: Any) -> Tensor:
        query = torch.tanh(self.embed(x))
        key = torch.tanh(self.context(x.flip(1))) if self.cross else query
        value = 2 * key if self.cross else query
        if isinstance(self.attention, Explicit):
            return self.head(self.attention(query, key, value, **masks).mean(1))
        if not self.batch_first:
            query, key, value = (t.transpose(0, 1) for t in (query, key, value))
        attended = self.attention(query, key, value, need_weights=False, **masks)[0]
        return self.head(attended.mean(1 if self.batch_first else 0))


def explicit(model: Encoder) -> Encoder:
    """The same network with the layers of its attention written down."""
    other = copy.deepcopy(model)
    assert isinstance(other.attention, nn.MultiheadAttention)
    other.attention = Explicit(other.attention)
    return other


def packed(gradients: dict[str, Tensor], like: nn.Module) -> list[Tensor]:
    """Gradients of the explicit layers in the form of the parameters that they were made from."""
    result = []
    for name, parameter in like.named_parameters():
        holder, _, kind = name.rpartition(".in_proj_")
        if holder:
            parts = [gradients[f"{holder}.{part}.{kind}"] for part in PARTS[:3]]
            result.append(torch.cat(parts))
        elif name.endswith("_proj_weight"):
            result.append(gradients[name.replace("_proj_weight", "_proj.weight")])
        else:
            result.append(gradients[name])
        assert result[-1].shape == parameter.shape
    return result


def expected(model: Encoder, x: Tensor, y: Tensor, reduction: str, **masks: Any) -> tuple[Tensor, list[Tensor]]:
    """rho and its gradient from the explicit network, laid out as the model's parameters are."""
    other = explicit(model)

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = other

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x, **masks)

    rho, gradient = reference.rho_and_gradient(Masked(), cross_entropy_sum(y), x, reduction=reduction)
    names = [name for name, _ in other.named_parameters()]
    return rho, packed(dict(zip(names, gradient, strict=True)), model)


def given(model: Encoder, optimizer: FlatKFAC, x: Tensor, y: Tensor, **masks: Any) -> list[Tensor]:
    """What the penalty adds when the model is called with masks."""

    class Called(nn.Module):
        def parameters(self, recurse: bool = True) -> Any:
            return model.parameters(recurse)

        def forward(self, x: Tensor) -> Tensor:
            return model(x, **masks)

    return penalty(Called(), optimizer, x, y)


@pytest.mark.parametrize("reduction", ["max", "sum"])
@pytest.mark.parametrize(
    "options",
    [{}, {"batch_first": True}, {"bias": False}, {"kdim": 6, "vdim": 6}],
    ids=["examples second", "examples first", "no bias", "other widths"],
)
@pytest.mark.parametrize("cross", [False, True], ids=["self", "cross"])
def test_rho_and_its_gradient_are_those_of_the_explicit_layers(
    cross: bool, options: dict[str, Any], reduction: str
) -> None:
    if not cross and "kdim" in options:
        options = {"kdim": WIDTH, "vdim": WIDTH, "batch_first": True}
    model = seeded(lambda: Encoder(cross, **options))
    x, y = batch(6, LENGTH, 4)
    rho, gradient = expected(model, x, y, reduction)
    optimizer = plain(model, mu=0.3, reduction=reduction)
    seen = penalty(model, optimizer, x, y)
    trained = [g for g, p in zip(gradient, model.parameters(), strict=True) if p.grad is not None]
    assert optimizer.rho == pytest.approx(float(rho), rel=1e-9)
    assert_gradients_close(seen, [0.3 * g for g in trained])
    unused = set() if cross else {"context"}
    assert set(optimizer.radii()) == {"embed", "context", "head", *(f"attention.{part}" for part in PARTS)} - unused
    assert optimizer.skipped_layers == {}


@pytest.mark.parametrize(
    "masks",
    [
        {"attn_mask": torch.linspace(-1, 1, LENGTH * LENGTH, dtype=torch.float64).view(LENGTH, LENGTH)},
        {"key_padding_mask": torch.arange(LENGTH) >= torch.tensor([[5], [4], [3], [2], [1], [5]])},
    ],
    ids=["attention mask", "padding mask"],
)
def test_masks_are_those_of_the_call(masks: dict[str, Tensor]) -> None:
    model = seeded(lambda: Encoder(False, batch_first=True))
    x, y = batch(6, LENGTH, 4)
    rho, gradient = expected(model, x, y, "sum", **masks)
    bare, _ = expected(model, x, y, "sum")
    assert abs(float(rho - bare)) > 1e-3 * float(bare)
    optimizer = plain(model, mu=0.3, reduction="sum")
    seen = given(model, optimizer, x, y, **masks)
    trained = [g for g, p in zip(gradient, model.parameters(), strict=True) if p.grad is not None]
    assert optimizer.rho == pytest.approx(float(rho), rel=1e-9)
    assert_gradients_close(seen, [0.3 * g for g in trained])


@pytest.mark.parametrize("name", ["q_proj", "k_proj", "v_proj", "out_proj"])
def test_a_part_of_attention_can_be_chosen_by_name(name: str) -> None:
    model = seeded(lambda: Encoder(False, batch_first=True))
    x, y = batch(6, LENGTH, 4)
    optimizer = plain(model, mu=0.3, layers=[f"attention.{name}"])
    penalty(model, optimizer, x, y)
    (radius,) = optimizer.radii().values()
    whole = reference.radii(explicit(model), cross_entropy_sum(y), x)[f"attention.{name}"]
    assert radius == pytest.approx(whole.item(), rel=1e-9)


def test_mask_terms_of_the_projections_add_up_on_the_matrix_that_holds_them() -> None:
    model = seeded(lambda: Encoder(False, batch_first=True))
    optimizer = plain(model, mu=0.3, reduction="sum")
    penalty(model, optimizer, *batch(6, LENGTH, 4))
    terms = optimizer.state_dict()["kfac_flat"]["mask_terms"]
    weight = model.attention.in_proj_weight
    parts = [terms[f"attention.{part}"] for part in PARTS[:3]]
    assert all((part > 0).any() for part in parts)
    assert torch.allclose(optimizer.input_mask_gradients()[weight], sum(parts))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("norm_first", [True, False])
def test_torchs_encoder_layer_is_read_as_a_whole(norm_first: bool, training: bool) -> None:
    """In evaluation mode too, in which it may take a short cut that calls none of its layers."""

    def make() -> nn.Module:
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 12, 0.0, batch_first=True, norm_first=norm_first)
        encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        return nn.Sequential(nn.Linear(4, WIDTH), encoder, nn.Flatten(), nn.Linear(WIDTH * LENGTH, 3))

    model = seeded(make).train(training)
    other = copy.deepcopy(model)

    class Itself(nn.Module):
        """Takes the arguments and gives the results of torch's module."""

        def __init__(self, attention: nn.MultiheadAttention) -> None:
            super().__init__()
            self.explicit, self.batch_first, self.in_proj_bias = Explicit(attention), True, None

        def forward(self, x: Tensor, *_: Any, **options: Any) -> tuple[Tensor, None]:
            return self.explicit(x, x, x), None

    for layer in other[1].layers:
        layer.self_attn = Itself(layer.self_attn)
    x, y = batch(6, LENGTH, 4)
    assert torch.allclose(other(x), model(x), atol=1e-12)
    rho, gradient = reference.rho_and_gradient(other, cross_entropy_sum(y), x, reduction="sum")
    named = zip((n.replace(".explicit", "") for n, _ in other.named_parameters()), gradient, strict=True)
    optimizer = plain(model, mu=0.3, reduction="sum")
    seen = penalty(model, optimizer, x, y)
    assert optimizer.rho == pytest.approx(float(rho), rel=1e-9)
    assert_gradients_close(seen, [0.3 * g for g in packed(dict(named), model)])
    assert len(optimizer.radii()) == 2 + 2 * (len(PARTS) + 2)


@pytest.mark.parametrize("batch_first", [True, False])
def test_dropout_in_torchs_encoder_layer_is_that_of_the_pass(batch_first: bool) -> None:
    """There would be a warning, and so an error, that the copy computes something else than the model."""

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Linear(4, WIDTH), nn.Linear(WIDTH, 3)
            self.layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 12, 0.5, batch_first=batch_first)

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.embed(x) if batch_first else self.embed(x).transpose(0, 1)
            return self.head(self.layer(hidden).mean(1 if batch_first else 0))

    model = seeded(Encoder)
    optimizer = plain(model, mu=0.3)
    penalty(model, optimizer, *batch(6, LENGTH, 4))
    assert optimizer.rho > 0


class Own(nn.MultiheadAttention):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x, x, x, need_weights=False)[0]


class Inheriting(nn.MultiheadAttention):
    """Changes nothing."""


def test_a_subclass_is_read_where_it_keeps_the_forward_and_named_where_it_does_not() -> None:
    model = nn.Sequential(nn.Linear(4, WIDTH), Own(WIDTH, HEADS), nn.Flatten(), nn.Linear(WIDTH * LENGTH, 3)).double()
    optimizer = plain(model, mu=0.3)
    penalty(model, optimizer, *batch(6, LENGTH, 4))
    assert set(optimizer.radii()) == {"0", "3"}
    assert optimizer.skipped_layers.keys() == {"1", "1.out_proj"}
    assert "Own has a forward of its own" in optimizer.skipped_layers["1"]

    encoder = seeded(lambda: Encoder(False))
    same = copy.deepcopy(encoder)
    same.attention.__class__ = Inheriting
    x, y = batch(6, LENGTH, 4)
    seen = [penalty(m, plain(m, mu=0.3, reduction="sum"), x, y) for m in (encoder, same)]
    assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True))


def test_frozen_attention_has_no_block_and_is_passed_through() -> None:
    model = seeded(lambda: Encoder(False))
    model.attention.requires_grad_(False)
    x, y = batch(6, LENGTH, 4)
    optimizer = plain(model, mu=0.3, reduction="sum")
    penalty(model, optimizer, x, y)
    whole = reference.radii(explicit(model), cross_entropy_sum(y), x)
    assert optimizer.radii() == {name: pytest.approx(whole[name].item(), rel=1e-9) for name in ("embed", "head")}


def test_attention_that_reads_the_data_itself_is_read() -> None:
    """Nothing before it needs a gradient."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention: nn.Module = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
            self.head = nn.Linear(WIDTH, 3)

        def forward(self, x: Tensor) -> Tensor:
            attended = self.attention(x, x, x)
            return self.head((attended if isinstance(attended, Tensor) else attended[0]).mean(1))

    model = seeded(Model)
    other = copy.deepcopy(model)
    other.attention = Explicit(other.attention)
    x, y = batch(6, LENGTH, WIDTH)
    whole = reference.radii(other, cross_entropy_sum(y), x)
    optimizer = plain(model, mu=0.3)
    penalty(model, optimizer, x, y)
    assert optimizer.radii() == {name: pytest.approx(r.item(), rel=1e-9) for name, r in whole.items()}


def test_dropout_of_attention_weights_falls_on_the_same_ones() -> None:
    """rho of the very pass that the user made, from the inputs that out_proj had in it."""
    model = seeded(lambda: Encoder(False, batch_first=True, dropout=0.5))
    x, y = batch(6, LENGTH, 4)
    seen: list[Tensor] = []
    model.head.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach()))
    optimizer = plain(model, mu=0.3)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        penalty(model, optimizer, x, y)
    g = (model.head(seen[0]).softmax(1) - F.one_hot(y, 3)).detach()
    ((A, G),) = reference.factors(model.head, seen[0], g)
    tops = torch.linalg.eigvalsh(A)[-1] * torch.linalg.eigvalsh(G)[-1]
    assert optimizer.radii()["head"] == pytest.approx(float(tops), rel=1e-9)


def test_the_users_attention_stays_what_it_is() -> None:
    model = seeded(lambda: Encoder(False))
    before = [(name, type(m), set(vars(m))) for name, m in model.named_modules()]
    optimizer = plain(model, mu=0.3)
    penalty(model, optimizer, *batch(6, LENGTH, 4))
    assert [(name, type(m), set(vars(m))) for name, m in model.named_modules()] == before
    assert optimizer.rho == pytest.approx(max(optimizer.radii().values()))


def test_spectral_radii_count_attention_too() -> None:
    model = seeded(lambda: Encoder(False))
    x, _ = batch(6, LENGTH, 4)
    seen, known = (spectral_radii(m, x, exact=True) for m in (model, explicit(model)))
    assert {name: pytest.approx(value, rel=1e-9) for name, value in known.items()} == seen


class Cuttable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.attention = nn.Linear(4, WIDTH), nn.MultiheadAttention(WIDTH, 4, batch_first=True)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.embed(x))
        return self.head(self.attention(x, x, x, need_weights=False)[0].mean(1))


def test_curvature_of_attention_follows_a_cut() -> None:
    """Before and after it the same layers are read, and their eigenvectors keep what the manifest keeps."""
    model = seeded(Cuttable, dtype=torch.float32)
    x, y = batch(12, LENGTH, 4, dtype=torch.float32)
    optimizer = FlatKFAC(SGD(model.parameters(), lr=0.01), model, mu=0.1, every=100, reduction="sum")
    pruner = NeuronPruner(model, optimizer, x, target=0.4, start=1, every=1, events=1)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()

    step()
    before = optimizer.state_dict()["kfac_flat"]
    assert pruner.step()
    name = "attention"
    kept = pruner.state_dict()["layers"][name]
    assert 0 < len(kept["out"]) < 3 * WIDTH
    after = optimizer.state_dict()["kfac_flat"]
    for i, part in enumerate(PARTS[:3]):
        rows = kept["out"][(kept["out"] >= i * WIDTH) & (kept["out"] < (i + 1) * WIDTH)] - i * WIDTH
        for factor, chosen in (("A", kept["in"]), ("G", rows)):
            vector = before["eigenvectors"][f"{name}.{part}"][factor][:, chosen]
            assert torch.allclose(after["eigenvectors"][f"{name}.{part}"][factor], vector / vector.norm())
        assert torch.equal(after["mask_terms"][f"{name}.{part}"], before["mask_terms"][f"{name}.{part}"][kept["in"]])
    optimizer.load_state_dict(optimizer.state_dict())
    step()
    assert set(optimizer.radii()) == set(before["radii"])
    assert {f"{name}.{part}" for part in PARTS} <= set(before["radii"])


def test_curvature_of_attention_comes_back_when_a_cut_is_undone() -> None:
    model = seeded(Cuttable, dtype=torch.float32)
    x, y = batch(12, LENGTH, 4, dtype=torch.float32)
    optimizer = FlatKFAC(SGD(model.parameters(), lr=0.01), model, mu=0.1, every=100, reduction="sum")
    pruner = NeuronPruner(model, optimizer, x, target=0.4, start=1, every=1, events=1, keep_removed=True)
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    before = copy.deepcopy(optimizer.state_dict()["kfac_flat"])
    assert pruner.step()
    assert optimizer.state_dict()["kfac_flat"]["eigenvectors"]["attention.q_proj"]["G"].numel() < WIDTH
    pruner.undo()
    after = optimizer.state_dict()["kfac_flat"]
    for name, vectors in before["eigenvectors"].items():
        assert all(torch.equal(after["eigenvectors"][name][factor], v) for factor, v in vectors.items())
    assert all(torch.equal(after["mask_terms"][name], term) for name, term in before["mask_terms"].items())
