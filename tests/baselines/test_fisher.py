"""The true Fisher over a data set is that of the model in eval mode, at labels drawn from it, whatever the batches."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from baselines.fisher import fisher_statistics
from kfac_flat.curvature.layers import input_factor, output_factor
from kfac_flat.curvature.radius import LayerData
from tests.reference import Residual, factors, mlp, read, seeded


def most_likely(output: Tensor, generator: torch.Generator) -> Tensor:
    """A likelihood that draws nothing: the label is the class with the largest logit."""
    return F.cross_entropy(output, output.argmax(1), reduction="none")


def kronecker(data: LayerData) -> tuple[Tensor, Tensor]:
    return input_factor(data.layer, data.a), output_factor(data.layer, data.g)


def trained_a_little() -> tuple[Residual, Tensor]:
    model: Residual = seeded(Residual)
    x = torch.randn(7, 2, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    model(x)  # running statistics that are not those of the batch
    return model, x


@settings(max_examples=10, deadline=None)
@given(st.lists(st.integers(1, 6), max_size=3, unique=True).map(sorted), st.booleans())
def test_means_are_those_of_the_whole_data_set_in_eval_mode_however_it_is_split(cuts: list[int], train: bool) -> None:
    model, x = trained_a_little()
    names = ["stem", "conv", "head"]
    batches = [(part, "labels") for part in x.tensor_split(cuts)]
    found, unread = fisher_statistics(model.train(train), batches, kronecker, names, likelihood=most_likely)
    reference = copy.deepcopy(model).eval()
    seen = read(reference, lambda out: most_likely(out, torch.Generator()).sum(), x)
    for name in names:
        ((A, G),) = factors(reference.get_submodule(name), *seen[name])
        assert torch.allclose(found[name][0][0], A, rtol=1e-10, atol=1e-14)
        assert torch.allclose(found[name][1][0], G, rtol=1e-10, atol=1e-14)
    assert not unread


def test_labels_are_drawn_from_the_model_itself() -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(3, 4)))
    x = torch.tensor([[0.5, -1.0, 2.0]], dtype=torch.float64)
    p = model(x).softmax(1)[0].detach()
    expected = torch.diag(p) - torch.outer(p, p)  # covariance of onehot(y) - p
    found, _ = fisher_statistics(model, [x.expand(20_000, 3)] * 2, kronecker, ["0"])
    assert torch.allclose(found["0"][1][0], expected, atol=0.01)
    assert (expected.abs() > 0.05).any()
    other, _ = fisher_statistics(model, [x.expand(20_000, 3)] * 2, kronecker, ["0"], seed=1)
    assert not torch.equal(found["0"][1], other["0"][1])


def test_model_mode_buffers_gradients_and_random_state_stay_as_they_are() -> None:
    model, x = trained_a_little()
    model.head.eval()
    modes = [m.training for m in model.modules()]
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    fisher_statistics(model, [x], kronecker, ["stem", "conv", "head"])
    assert modes == [m.training for m in model.modules()]
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(state, torch.get_rng_state())


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.unused = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(self.a(x).tanh()))


def test_a_layer_that_is_called_twice_or_never_is_left_out_and_changes_nothing_for_the_others() -> None:
    model, x = seeded(Twice), torch.randn(5, 3, dtype=torch.float64)
    found, unread = fisher_statistics(model, [x, x], kronecker, ["a", "b", "unused"], seed=3)
    alone, _ = fisher_statistics(model, [x, x], kronecker, ["b"], seed=3)
    assert list(found) == ["b"]
    assert all(map(torch.equal, found["b"], alone["b"]))
    assert "more than once" in unread["a"]
    assert "does not depend" in unread["unused"]


@pytest.mark.parametrize(
    ("data", "message"), [([], "no examples"), ([torch.full((2, 4), torch.nan).double()], "0 is not finite")]
)
def test_data_that_tell_nothing_are_refused(data: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fisher_statistics(mlp(), data, kronecker, ["0"])
