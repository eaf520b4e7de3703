"""What Python code asks of values decides what it does; what is followed is what runs, or it is said that it is not."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kfac_flat.pruning.errors import CutError
from kfac_flat.pruning.faithful import Results, first_difference
from kfac_flat.pruning.graph import NeuronGraph
from kfac_flat.pruning.rules import is_leaf
from kfac_flat.pruning.tracing import ExampleInputs, Program, skeleton
from tests.pruning.lifecycle import assert_masked, assert_reloads, pruned
from tests.pruning.masking import prune_at_random, pruner_for

BATCH = torch.randn(6, 6, dtype=torch.float64)
IMAGES = torch.randn(4, 3, 8, 8, dtype=torch.float64)


class Asking(nn.Module):
    """Mixes all neurons, so that none may go, where the answer is yes."""

    def __init__(self, question: Callable[[Any], Any]) -> None:
        super().__init__()
        self.question = question
        self.one, self.two, self.three = nn.Linear(6, 12), nn.Linear(12, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(x).relu()
        if self.question(x):
            x = x - x.mean(-1, keepdim=True)
        return self.three(self.two(x).relu())


ANSWERED: dict[str, Callable[[Any], Any]] = {
    "requires_grad": lambda x: x.requires_grad,
    "is_leaf": lambda x: not x.is_leaf,
    "no_grad": lambda x: not torch.is_grad_enabled(),
    "as text": lambda x: f"{x.shape[-1]}" == "12",
    "padded text": lambda x: f"{x.shape[-1]:04d}" == "0012",
    "dim": lambda x: x.dim() in (2, 3),
}


@pytest.mark.parametrize("question", ANSWERED)
def test_questions_are_answered_as_when_the_model_runs(question: str) -> None:
    pruner = pruner_for(Asking(ANSWERED[question]).double(), BATCH, target=0.1)
    assert "mixes different neurons" in pruner.frozen["one"]
    assert "two" not in pruner.frozen


WRONGLY_ANSWERED: dict[str, Callable[[Any], Any]] = {
    "isinstance": lambda x: isinstance(x, Tensor),
    "type": lambda x: type(x) is Tensor,
    "is_tensor": torch.is_tensor,
    "hasattr": lambda x: not hasattr(x, "sizes"),
    "getattr": lambda x: getattr(x, "sizes", None) is None,
    "callable": lambda x: not callable(x),
    "grad_fn": lambda x: x.grad_fn is None,
    "shape is a tuple": lambda x: isinstance(x.shape, tuple),
    "size is a number": lambda x: isinstance(x.shape[0], int),
    "size in a set": lambda x: x.shape[-1] in {12, 6, 5},
    "size in a dict": lambda x: {12: True, 6: True}.get(x.shape[-1], False),
}


@pytest.mark.parametrize("question", WRONGLY_ANSWERED)
def test_a_trace_that_does_something_else_than_the_code_is_refused(question: str) -> None:
    with pytest.raises(ValueError, match=r"does something else when it is traced.*two"):
        pruner_for(Asking(WRONGLY_ANSWERED[question]).double(), BATCH)


@pytest.mark.parametrize(
    "question",
    [
        lambda x: x.device == torch.device("cpu"),
        lambda x: str(x.device) == "cpu",
        lambda x: not x.is_meta,
        lambda x: x.is_cpu,
        lambda x: x.get_device() < 0,
        lambda x: x.data_ptr() != 0,
    ],
)
def test_where_a_tensor_lies_is_not_guessed(question: Callable[[Any], Any]) -> None:
    with pytest.raises(ValueError, match=r"cannot be traced.*asks for the kind of device"):
        pruner_for(Asking(question).double(), BATCH)


def test_tensors_on_one_device_may_be_told_to_be() -> None:
    pruner = pruner_for(Asking(lambda x: x.device != x.relu().device).double(), BATCH, target=0.1)
    assert "one" not in pruner.frozen


@pytest.mark.parametrize("question", [lambda x: x.shape[0] > 1, lambda x: len(x) > 1])
def test_a_single_example_does_not_stand_for_a_batch_that_is_treated_otherwise(question: Callable[[Any], Any]) -> None:
    model = Asking(question).double()
    with pytest.raises(ValueError, match="something else for a single example than for two"):
        pruner_for(model, BATCH[:1])
    assert "mixes different neurons" in pruner_for(model, BATCH, target=0.1).frozen["one"]


def test_a_model_that_takes_single_examples_only_is_followed() -> None:
    def refuse_several(x: Any) -> bool:
        if x.shape[0] != 1:
            raise ValueError("one at a time")
        return False

    assert "one" not in pruner_for(Asking(refuse_several).double(), BATCH[:1], target=0.1).frozen


def test_parts_of_a_tensor_taken_in_a_loop_are_followed() -> None:
    class Loop(Asking):
        def forward(self, x: Tensor) -> Tensor:
            parts = self.one(x).unsqueeze(0)
            for part in parts:
                x = part.relu()
            return self.three(self.two(x).relu())

    def make() -> nn.Module:
        return Loop(bool)

    found = pruned(make, BATCH, BATCH)
    assert_masked(found)
    assert_reloads(found)


class ByWidth(nn.Module):
    """Does with an activation ``[N, 12, 8, 8]`` what depends on its width."""

    def __init__(self, how: Callable[[Any], Any]) -> None:
        super().__init__()
        self.how = how
        self.one, self.norm = nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12)
        self.two, self.three = nn.Conv2d(12, 8, 3, padding=1), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.how(self.norm(self.one(x)).relu())
        return self.three(self.two(x).relu().mean((2, 3)))


BY_WIDTH: dict[str, Callable[[Any], Any]] = {
    "roll": lambda x: torch.roll(x, x.shape[1] // 4, 2),
    "crop": lambda x: x[:, :, : x.shape[1] // 2],
    "select": lambda x: x.select(2, x.shape[1] // 2).unsqueeze(2),
    "narrow": lambda x: x.narrow(2, 0, x.shape[1] // 2),
    "expand": lambda x: x.mean(2, keepdim=True).expand(-1, -1, x.shape[1] // 2, -1),
    "view": lambda x: x.view(x.shape[0], x.shape[1], 16 if x.shape[1] == 12 else 8, -1),
    "flip": lambda x: x.flip(2 if x.shape[1] == 12 else 3),
    "chunk": lambda x: x.chunk(2 if x.shape[1] == 12 else 4, 2)[0],
    "cat along": lambda x: torch.cat([x, x * 2], 2 if x.shape[1] == 12 else 3),
    "cat order": lambda x: torch.cat([x, x.tanh()] if x.shape[1] == 12 else [x.tanh(), x], 2),
    "operand": lambda x: (lambda y: y if x.shape[1] == 12 else x)(x.tanh() * 3),
    "order": lambda x: (lambda y: x - y if x.shape[1] == 12 else y - x)(x.tanh() * 3),
}


@pytest.mark.parametrize("how", BY_WIDTH)
def test_what_depends_on_the_width_keeps_the_layer_whole(how: str) -> None:
    found = pruned(lambda: ByWidth(BY_WIDTH[how]), IMAGES, IMAGES, 0.4)
    assert "depend" in found.pruner.frozen["one"]
    assert found.pruner.widths == {"one": 12, "two": 4, "three": 3}
    assert_masked(found)


FOLLOWED: dict[str, Callable[[Any], Any]] = {
    "whole": lambda x: x[:, : x.shape[1]],
    "channels last": lambda x: x.movedim(1, 3).reshape(-1, 64 * x.shape[1]).view(-1, 8, 8, x.shape[1]).movedim(3, 1),
}


@pytest.mark.parametrize("how", FOLLOWED)
def test_sizes_that_say_where_the_neurons_lie_may_follow_the_width(how: str) -> None:
    found = pruned(lambda: ByWidth(FOLLOWED[how]), IMAGES, IMAGES)
    assert found.pruner.widths == {"one": 6, "two": 4, "three": 3}
    assert_masked(found)


@functools.lru_cache
def narrow(width: Any) -> bool:
    return type(width) is int and width < 12


LOOKED_UP: dict[str, Callable[[Any], Any]] = {  # a value is found where what stands for it in a trace is not, once cut
    "in a dict": lambda x: dict.fromkeys(range(1, 12), True).get(x.shape[-1], False),
    "in a set": lambda x: x.shape[-1] in frozenset(range(1, 12)),
    "in a cache": lambda x: narrow(x.shape[-1]),
}


@pytest.mark.parametrize("how", LOOKED_UP)
def test_a_trace_of_a_cut_model_is_compared_with_its_code_as_well(how: str) -> None:
    graph = NeuronGraph(Asking(LOOKED_UP[how]).double(), BATCH)
    assert "what the code does around it depends on the number of neurons" in graph.frozen["one"]


def test_what_no_trial_finds_is_found_before_a_cut() -> None:
    model = Asking(lambda x: isinstance(x.shape[-1], int) and x.shape[-1] < 12).double()  # never a value in a trace
    pruner = pruner_for(model, BATCH)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(CutError, match="what the code does around it depends on the number of neurons"):
        prune_at_random(pruner, model)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_sum_in_place_is_a_sum() -> None:
    class InPlace(Asking):
        def forward(self, x: Tensor) -> Tensor:
            y = self.one(x)
            y += y.relu()
            return self.three(self.two(y).relu())

    found = pruned(lambda: InPlace(bool), BATCH, BATCH)
    assert found.pruner.widths == {"one": 6, "two": 4, "three": 3}
    assert_masked(found)


class InPlace(nn.Module):
    """Goes on with both names of what it has changed in place, of which a trace makes two results."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.side, self.two = nn.Linear(6, 12), nn.Linear(6, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        known = changed = self.one(x)
        changed += self.side(x).relu()
        return self.two(changed.relu() + known)


def test_what_was_changed_in_place_may_be_called_by_its_old_name() -> None:
    found = pruned(InPlace, BATCH, BATCH)
    assert found.pruner.widths == {"one": 6, "side": 6, "two": 3}
    assert_masked(found)


class Remembering(nn.Module):
    """Changes on the way what it holds."""

    def __init__(self, remember: Callable[[Any, Any], Any]) -> None:
        super().__init__()
        self.remember = remember
        self.one, self.two, self.three = nn.Linear(6, 12), nn.Linear(12, 8), nn.Linear(8, 3)
        self.by_size: dict[Any, Any] = {}
        self.calls: list[int] = []
        self.notes = SimpleNamespace(calls=0)
        self.count = 0
        self.register_buffer("mean", torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.remember(self, self.one(x).relu())
        return self.three(self.two(x).relu())


def kept_by_size(model: Any, x: Any) -> Any:
    size = x.shape[0]
    if size not in model.by_size:
        model.by_size[size] = x.new_ones(1) * 2
    return x * model.by_size[size]


def moving_mean(model: Any, x: Any) -> Any:
    model.mean = model.mean * 0.9
    return x * model.mean.sum()  # new tensors, where one has just gone


@pytest.mark.parametrize("remember", [kept_by_size, moving_mean])
@pytest.mark.parametrize("examples", [1, 6])
def test_what_a_model_keeps_from_call_to_call_does_not_pass_from_one_comparison_to_the_next(
    remember: Callable[[Any, Any], Any], examples: int
) -> None:
    found = pruned(lambda: Remembering(remember), BATCH, BATCH[:examples])
    assert found.pruner.widths == {"one": 6, "two": 4, "three": 3}
    assert found.pruner.frozen.keys() == {"three"}


def alternately(calls: int, x: Any) -> Any:
    return x * 2 if calls % 2 else x - x.mean(-1, keepdim=True)


def counted_in_a_list(model: Any, x: Any) -> Any:
    model.calls.append(1)
    return alternately(len(model.calls), x)


def counted_in_an_object(model: Any, x: Any) -> Any:
    model.notes.calls += 1
    return alternately(model.notes.calls, x)


def counted(model: Any, x: Any) -> Any:
    model.count += 1
    return alternately(model.count, x)


@pytest.mark.parametrize("remember", [counted, counted_in_a_list, counted_in_an_object])
def test_a_model_that_does_something_else_every_other_time_is_refused(remember: Callable[[Any, Any], Any]) -> None:
    with pytest.raises(ValueError, match="does something else when it is traced"):
        pruner_for(Remembering(remember).double(), BATCH)


def in_another_mode(model: Any, x: Any) -> Any:
    return x * model.two.eval().in_features


@pytest.mark.parametrize("remember", [kept_by_size, moving_mean, in_another_mode])
def test_a_comparison_leaves_the_skeleton_as_it_was(remember: Callable[[Any, Any], Any]) -> None:
    inputs = ExampleInputs.of(BATCH)
    bare = skeleton(nn.Sequential(Remembering(remember), nn.BatchNorm1d(3)).double())
    program = Program.of(bare, inputs, False, is_leaf, ())
    bare.train()
    before = [(held, dict(held)) for m in bare.modules() for held in (vars(m), m._parameters, m._buffers, m._modules)]
    within = dict(bare[0].by_size)
    assert first_difference(bare, program, inputs, Results()) is None
    for held, own in before:
        assert held.keys() == own.keys()
        assert all(held[name] is own[name] for name in own)
    assert bare[0].by_size == within


def test_a_scripted_module_does_not_keep_code_from_being_compared() -> None:
    model = Asking(lambda x: isinstance(x, Tensor)).double()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        model.held = torch.jit.script(nn.Softmax(-1))
    with pytest.raises(ValueError, match=r"does something else when it is traced.*two"):
        pruner_for(model, BATCH)


def test_code_that_cuts_a_buffer_to_a_size_is_asked_what_it_does_for_two_as_well() -> None:
    class Masked(Asking):
        def __init__(self, question: Callable[[Any], Any]) -> None:
            super().__init__(question)
            self.register_buffer("mask", torch.ones(9, 1))

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x * self.mask[: x.shape[0]])

    with pytest.raises(ValueError, match="something else for a single example than for two"):
        pruner_for(Masked(lambda x: x.shape[0] > 1).double(), BATCH[:1])
    assert "one" not in pruner_for(Masked(lambda x: False).double(), BATCH[:1], target=0.1).frozen


class OnData(nn.Module):
    """Cannot be traced, nor run without data."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if x.sum().item() > 0 else x


class Behind(nn.Module):
    """Puts modules before one that asks whether a value is a tensor."""

    def __init__(self, *before: nn.Module) -> None:
        super().__init__()
        self.before, self.asking = nn.Sequential(*before), Asking(lambda x: isinstance(x, Tensor))

    def forward(self, x: Tensor) -> Tensor:
        return self.asking(self.before(x))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("before", [(), (nn.BatchNorm1d(6),)])
def test_code_is_compared_in_both_modes_where_the_traces_are_alike(training: bool, before: tuple[nn.Module]) -> None:
    model = Behind(*before).double()
    model.asking.question = lambda x: torch.is_grad_enabled() is training and isinstance(x, Tensor)
    with pytest.raises(ValueError, match=r"does something else when it is traced.*two"):
        pruner_for(model, BATCH[:1])


@pytest.mark.filterwarnings("ignore:these submodules cannot be traced")
def test_what_cannot_run_without_data_does_not_keep_code_from_being_compared() -> None:
    with pytest.raises(ValueError, match=r"does something else when it is traced.*two"):
        pruner_for(Behind(OnData()).double(), BATCH)
