"""python -m benchmarks.accuracy: every method runs, and what is written down is true."""

from __future__ import annotations

import copy
import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from benchmarks import accuracy, tasks
from benchmarks.execution import Execution
from benchmarks.methods import METHODS, in_neurons, in_parameters
from benchmarks.networks import torchvision_net
from benchmarks.pretrained import Weights, load_body, starting_from
from benchmarks.records import identity, read_records
from benchmarks.tasks import TASKS, Task
from benchmarks.training import Training
from examples.digits import DigitsNet, Images
from kfac_flat import FlatKFAC

DENSE = 288  # neurons of the network for digits


def command(folder: Path, *arguments: Any) -> list[dict[str, Any]]:
    """Train on digits for two epochs; returns all runs that are there afterwards."""
    usual = ["--task", "digits", "--epochs", "2", "--seeds", "0", "--sparsity", "0.75", "--out", str(folder)]
    accuracy.main([*usual, *map(str, arguments)])
    return [json.loads(line) for line in (folder / "digits.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module", autouse=True)
def measured_on_few_images() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(accuracy, "MEASURED", 16)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("accuracy")
    command(folder, "--method", "theta")
    return folder


def test_a_run_says_what_came_of_it_and_how_it_was_made(folder: Path) -> None:
    (run,) = read_records(folder / "digits.jsonl")
    assert identity(run, accuracy.IDENTITY) == ("digits", "theta", 0.75, 0, 2, "neurons", None, None)
    assert run["neurons"] == pytest.approx(DENSE / 4, abs=2)
    assert run["neurons"] == sum(run["widths"].values()) - 10
    assert run["parameters"] < 77_290 / 4
    assert run["nonzero"] <= run["parameters"]
    assert run["macs"] < 2_116_224 / 4
    assert 5 < run["accuracy"] <= 100
    assert 0 < run["latency"] < run["seconds"]
    assert run["rho"] > 0
    assert math.isfinite(run["sharpness"])
    assert run["versions"]["torch"] == torch.__version__
    assert run["threads"] == 1
    assert run["hardware"]
    assert run["revision"]
    assert "--epochs 2" in run["command"]


def test_runs_are_not_repeated_and_earlier_lines_stay_as_they_are(folder: Path) -> None:
    before = (folder / "digits.jsonl").read_bytes()
    command(folder, "--method", "theta")
    assert (folder / "digits.jsonl").read_bytes() == before
    _, random = command(folder, "--method", "theta", "random")
    after = (folder / "digits.jsonl").read_bytes()
    assert after.startswith(before)
    assert random["method"] == "random"


def test_the_folder_of_data_is_not_written_down(tmp_path: Path) -> None:
    (run,) = command(tmp_path, "--method", "sgd", "--sparsity", 0, "--data-root", tmp_path / "private")
    assert "--data-root DATA" in run["command"]
    assert "private" not in run["command"]
    assert (run["neurons"], run["parameters"], run["macs"]) == (DENSE, 77_290, 2_116_224)


def test_a_line_that_cannot_be_read_is_reported_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "digits.jsonl").write_text('{"task": "dig')
    with pytest.raises(SystemExit, match="line 1, is no JSON"):
        command(tmp_path, "--method", "theta")
    assert (tmp_path / "digits.jsonl").read_text() == '{"task": "dig'


@pytest.fixture
def few() -> tuple[Task, tuple[Images, Images]]:
    """Part of the digits, and a task for it."""
    train, test = TASKS["digits"].load(None)
    part = Images(train.images[:192], train.labels[:192])
    return TASKS["digits"], (part, test)


@pytest.fixture
def narrow(few: Any) -> tuple[Task, tuple[Images, Images]]:
    """The same, and a network a quarter as wide: 72 neurons, 5,122 parameters."""
    task, (part, test) = few
    return replace(task, network=partial(DigitsNet, 8)), (part, Images(test.images[:100], test.labels[:100]))


OTHERWISE = ("data-free", "eigendamage", "eigendamage-one-pass", "weight-magnitude", "snip")
OF_NEURONS = [name for name in METHODS if name not in OTHERWISE and not name.startswith("tp-")]


@pytest.mark.parametrize("name", OF_NEURONS)
def test_every_method_trains_and_removes_the_neurons_it_is_asked_to(name: str, narrow: Any) -> None:
    task, data = narrow
    sparsity = 0.5 if METHODS[name].pruner else 0.0
    epochs: list[int] = []
    found = accuracy.run(Training(task, METHODS[name], sparsity, 0, 3), data, lambda: epochs.append(1))
    assert found["neurons"] == pytest.approx((1 - sparsity) * DENSE / 4, abs=2)
    assert found["missed"] == 0
    assert 0 <= found["accuracy"] <= 100
    assert len(epochs) == 3


@pytest.mark.parametrize("name", ["sam", "spectral-radius"])
def test_a_second_pass_of_the_optimizer_is_not_scored(name: str, narrow: Any) -> None:
    task, (part, _) = narrow
    scores = []
    for method in (METHODS["taylor"], METHODS[f"{name}+taylor"]):
        torch.manual_seed(0)
        model = task.network()
        optimizer = method.optimizer(task.optimizer(model), model)
        assert method.pruner is not None
        pruner = method.pruner(model, optimizer, part.images[:1], target=0.5, start=1, events=1)
        tasks.CRITERION(model(part.images), part.labels).backward()
        optimizer.step()
        scores.append(pruner.step().removed)
    assert scores[0].keys() == scores[1].keys()
    assert all(torch.equal(gone, scores[1][layer]) for layer, gone in scores[0].items())


@pytest.mark.parametrize("name", ["eigendamage", "eigendamage-one-pass"])
def test_eigendamage_removes_the_parameters_of_layers_that_have_lost_their_share_of_neurons(
    name: str, narrow: Any
) -> None:
    task, data = narrow
    found = accuracy.run(Training(task, METHODS[name], 0.5, 0, 3), data)
    halved = sum(p.numel() for p in DigitsNet(4).parameters())
    assert found["missed"] == 0
    assert 0.85 * halved < found["parameters"] <= halved + 1
    assert any(layer.endswith(".project") for layer in found["widths"])


@pytest.mark.parametrize("name", ["weight-magnitude", "snip"])
def test_weights_become_zero_and_are_still_there(name: str, narrow: Any) -> None:
    task, data = narrow
    model = task.network()
    target = METHODS[name].goal(model, data[0].images[:1], 0.5, "neurons")["target"]
    found = accuracy.run(Training(task, METHODS[name], 0.5, 0, 3), data)
    assert (found["neurons"], found["parameters"]) == (DENSE / 4, sum(p.numel() for p in model.parameters()))
    assert found["missed"] == pytest.approx(0, abs=1e-3)
    assert 0.7 < target < 0.75
    weights = sum(p.numel() for p in model.parameters() if p.dim() > 1)
    assert found["parameters"] - found["nonzero"] == pytest.approx(target * weights, abs=weights / 500 + 10)


def test_data_free_merges_neurons_of_linear_layers_and_says_where_there_are_none(narrow: Any) -> None:
    task, data = narrow
    none = accuracy.run(Training(task, METHODS["data-free"], 0.5, 0, 2), data)
    assert (none["neurons"], none["missed"]) == (DENSE / 4, 0.5)
    layers = (nn.Flatten(), nn.Linear(64, 20), nn.ReLU(), nn.Linear(20, 12), nn.ReLU(), nn.Linear(12, 10))
    task = replace(task, network=lambda: nn.Sequential(*copy.deepcopy(layers)))
    found = accuracy.run(Training(task, METHODS["data-free"], 0.5, 0, 2), data)
    assert (found["neurons"], found["missed"]) == (16, 0)


def test_a_run_that_misses_its_target_says_so(tmp_path: Path, capsys: Any) -> None:
    (run,) = command(tmp_path, "--method", "data-free", "--epochs", 1)
    assert run["missed"] == 0.75
    assert "75.0% less removed than asked for" in capsys.readouterr().out


def test_what_is_counted_is_what_is_there() -> None:
    model = nn.Sequential(nn.Conv2d(1, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Flatten(), nn.Linear(5 * 4, 3))
    size, widths = accuracy.measured(model, torch.randn(1, 1, 4, 4))
    assert (size.neurons, size.parameters, size.macs) == (5, 50 + 10 + 63, 5 * 9 * 4 + 60)
    assert widths == {"0": 5, "4": 3}


@pytest.mark.parametrize("sparsity", [0.25, 0.5, 0.75])
def test_parameters_are_those_of_a_network_as_much_narrower(sparsity: float) -> None:
    def count(width: int) -> int:
        return sum(p.numel() for p in DigitsNet(width).parameters())

    share = in_parameters(DigitsNet(16), torch.randn(1, 1, 8, 8), sparsity)
    assert share == pytest.approx(1 - count(round((1 - sparsity) * 16)) / count(16))


def test_pruners_read_the_first_images_with_their_labels_in_batches(few: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    task, (part, _) = few
    monkeypatch.setattr(tasks, "READ", 100)
    read = task.sample(part)
    assert [len(images) for images, _ in read] == [64, 36]
    assert torch.equal(torch.cat([images for images, _ in read]), part.images[:100])
    assert torch.equal(torch.cat([labels for _, labels in read]), part.labels[:100])


def test_methods_differ_and_the_same_one_repeats_itself(narrow: Any) -> None:
    task, data = narrow
    names = ("hgnp", "hgnp", "theta", "magnitude-l1")
    runs = [accuracy.run(Training(task, METHODS[name], 0.5, 0, 2), data) for name in names]
    for what in ("accuracy", "rho", "sharpness", "widths"):
        assert runs[0][what] == runs[1][what]
    assert len({json.dumps(run["widths"]) for run in runs[1:]}) == 3


def test_the_order_of_the_images_follows_the_seed(narrow: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    task, data = narrow
    seeds: list[int] = []

    def epoch(self: Task, *args: Any) -> Iterator[None]:
        seeds.extend(a.initial_seed() for a in args if isinstance(a, torch.Generator))
        return iter(())

    monkeypatch.setattr(Task, "epoch", epoch)
    for seed in (3, 5):
        accuracy.run(Training(task, METHODS["sgd"], 0.0, seed, 1), data)
    assert seeds == [3, 5]


def test_the_dense_network_is_trained_as_the_methods_optimizer_does(narrow: Any) -> None:
    task, data = narrow
    names = ("hgnp", "theta", "sgd")
    flat, theta, sgd = (accuracy.run(Training(task, METHODS[name], 0.0, 0, 2), data) for name in names)
    assert theta["sharpness"] == sgd["sharpness"]
    assert flat["sharpness"] != sgd["sharpness"]
    model = nn.Linear(2, 2)
    assert isinstance(METHODS["hgnp"].optimizer(task.optimizer(model), model), FlatKFAC)


# ---------------------------------------------------------------- timing


@pytest.mark.parametrize("updates", [1, 7, 390])
@pytest.mark.parametrize("going", [1, 20, 3_000])
@pytest.mark.parametrize("epochs", [2, 9, 60])
def test_single_neurons_go_evenly_after_a_third_and_until_the_last_removal(
    updates: int, going: int, epochs: int
) -> None:
    task = TASKS["cifar10-resnet18"]
    timing = METHODS["taylor-one-by-one"].timing(task, epochs, updates, going, "neurons")
    due = [update for update in range(1, epochs * updates + 1) if timing.is_due(update)]
    each = timing.options["neurons_per_event"]
    needed = math.ceil(going / each)
    assert len(due) >= needed
    assert due[0] >= epochs // 3 * updates
    assert due[needed - 1] <= max(due[0], task.last_removal(epochs) * updates)
    assert each == 1 or going > (task.last_removal(epochs) - max(1, epochs // 3)) * updates


@pytest.mark.parametrize("epochs", [2, 24])
def test_a_removal_at_once_comes_with_the_last_of_the_others(epochs: int) -> None:
    several, single = (
        METHODS[n].timing(TASKS["digits"], epochs, 21, 9, "neurons") for n in ("kron-obd", "eigendamage-one-pass")
    )
    assert several.options["max_step"] == (0.5 if epochs > 2 else 0.95)
    options = several.options
    assert single.options["start"] == options["start"] + (options["events"] - 1) * options["every"]
    assert single.options["events"] == 1


def test_other_methods_are_stepped_at_the_end_of_each_epoch() -> None:
    timing = METHODS["hgnp"].timing(TASKS["digits"], 24, 21, 100, "neurons")
    assert [update for update in range(1, 100) if timing.is_due(update)] == [21, 42, 63, 84]
    assert timing.options == {"start": 4, "every": 1, "events": 10}


# ---------------------------------------------------------------- at equal multiply-accumulates

NARROW_MACS = accuracy.measured(DigitsNet(8), torch.ones(1, 1, 8, 8))[0].macs


# One method for each pruner with its timing; how the optimizer trains makes no difference here.
PRUNERS = {
    (method.pruner, method.timing): name
    for name, method in reversed(METHODS.items())
    if method.pruner and name in [*OF_NEURONS, "eigendamage", "eigendamage-one-pass"]
}


@pytest.mark.parametrize("name", [*PRUNERS.values(), "hgnp-per-mac"])
def test_every_method_gets_to_the_same_multiply_accumulates(name: str, narrow: Any) -> None:
    task, data = narrow
    found = accuracy.run(Training(task, METHODS[name], 0.6, 0, 3, budget="macs"), data)
    assert 0.25 * NARROW_MACS < found["macs"] <= 0.4 * NARROW_MACS + 1
    assert found["missed"] == 0


@pytest.fixture
def narrow_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command's task with a network that trains fast."""
    monkeypatch.setitem(TASKS, "digits", replace(TASKS["digits"], network=partial(DigitsNet, 4)))


@pytest.mark.parametrize("name", ["weight-magnitude", "snip"])
def test_zeros_save_no_multiplications_so_as_many_parameters_go_as_in_a_narrower_network(
    name: str, narrow: Any
) -> None:
    task, data = narrow
    found = accuracy.run(Training(task, METHODS[name], 0.75, 0, 3, budget="macs"), data)
    assert found["macs"] == NARROW_MACS
    halved = sum(p.numel() for p in DigitsNet(4).parameters())  # whose multiplications are a quarter, about
    assert found["nonzero"] == pytest.approx(halved, rel=0.15)


@pytest.mark.usefixtures("narrow_digits")
def test_a_budget_of_its_own_makes_runs_of_their_own_and_dense_ones_belong_to_all(tmp_path: Path) -> None:
    command(tmp_path, "--method", "random", "--sparsity", 0, 0.5, "--epochs", 1)
    lines = (tmp_path / "digits.jsonl").read_text().splitlines()
    old = [
        {k: v for k, v in json.loads(line).items() if k not in ("budget", "amp", "pretrained", "nonzero")}
        for line in lines
    ]
    (tmp_path / "digits.jsonl").write_text("".join(json.dumps(run) + "\n" for run in old))
    again = command(tmp_path, "--method", "random", "--sparsity", 0, 0.5, "--epochs", 1)
    assert again == old, "lines from before there were budgets count as what they were"
    usual = ["--task", "digits", "--epochs", "1", "--seeds", "0", "--out", str(tmp_path), "--method", "random"]
    accuracy.main([*usual, "--speedup", "1", "2"])
    accuracy.main([*usual, "--sparsity", "0.5", "--budget", "macs"])
    *before, new = read_records(tmp_path / "digits.jsonl")
    assert before == old
    assert (new["budget"], new["sparsity"]) == ("macs", 0.5)
    dense = accuracy.measured(DigitsNet(4), torch.ones(1, 1, 8, 8))[0].macs
    assert 0.3 * dense < new["macs"] <= 0.5 * dense


def test_the_neurons_that_go_with_multiply_accumulates_are_those_of_a_network_as_much_narrower() -> None:
    wide, narrow, example = DigitsNet(16), DigitsNet(8), torch.ones(1, 1, 8, 8)
    share = 1 - accuracy.measured(narrow, example)[0].macs / accuracy.measured(wide, example)[0].macs
    assert in_neurons(wide, example, share, "macs") == pytest.approx(DENSE / 4, abs=4)
    assert in_neurons(wide, example, share, "neurons") == round(share * DENSE / 2)


def test_single_neurons_become_as_many_equal_shares_of_multiply_accumulates() -> None:
    task, single = TASKS["digits"], METHODS["taylor-one-by-one"].timing
    in_neurons, in_macs = (single(task, 24, 21, 100, budget) for budget in ("neurons", "macs"))
    assert (in_neurons.first, in_neurons.interval) == (in_macs.first, in_macs.interval)
    assert in_neurons.options == {"start": 1, "every": 1, "neurons_per_event": 1}
    assert in_macs.options == {"start": 1, "every": 1, "events": 100, "pace": "linear"}


# ---------------------------------------------------------------- how it is run, and from which weights


@pytest.mark.usefixtures("narrow_digits")
def test_a_run_compiled_and_in_bfloat16_is_another_run_and_much_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, executions = accuracy.run, []

    def watched(training: Training, *args: Any) -> Any:
        executions.append(training.execution)
        return run(training, *args)

    monkeypatch.setattr(accuracy, "run", watched)
    usual = ["--method", "hgnp", "--sparsity", 0.5, "--epochs", 3]
    command(tmp_path, *usual)
    plain, fast = command(tmp_path, *usual, "--amp", "bf16", "--compile", "eager", "--channels-last")
    assert executions == [Execution(), Execution("bf16", "eager", channels_last=True)]
    assert (plain["amp"], fast["amp"]) == (None, "bf16")
    assert "--compile eager" in fast["command"]
    assert plain["neurons"] == fast["neurons"]
    assert plain["rho"] != fast["rho"]
    assert fast["accuracy"] == pytest.approx(plain["accuracy"], abs=20)


def test_a_network_is_compiled_while_it_lasts(narrow: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    task, data = narrow
    epochs: list[bool] = []

    def compiled(self: Execution, model: nn.Module) -> nn.Module:
        epochs.append(self.backend is not None)
        return model

    monkeypatch.setattr(Execution, "compiled", compiled)
    short = replace(task, epochs=8, last=5)
    accuracy.run(Training(short, METHODS["theta"], 0.5, 0, 8, execution=Execution(backend="eager")), data)
    places = short.removals(8)
    first, last = places["start"], places["start"] + places["events"] - 1
    assert epochs[: first + 1] == [True] * first + [False]
    assert epochs[last:] == [True] * (8 - last)
    epochs.clear()
    accuracy.run(Training(short, METHODS["sgd"], 0.0, 0, 2, execution=Execution(backend="eager")), data)
    assert epochs == [True, True]


@pytest.mark.parametrize("name", ["theta", "hgnp"])
def test_a_network_is_compiled_once_before_the_removals_and_once_after(name: str, narrow: Any) -> None:
    inputs: list[int] = []

    def backend(module: Any, example_inputs: Any) -> Any:
        inputs.append(len(example_inputs))
        return module.forward

    torch.compiler.reset()
    torch._dynamo.register_backend(name=f"counting-{name}", compiler_fn=backend)
    task, data = narrow
    found = [
        accuracy.run(Training(task, METHODS[name], 0.5, 0, 6, execution=execution), data)
        for execution in (Execution(backend=f"counting-{name}"), Execution())
    ]
    assert len(inputs) == 2
    assert found[0]["widths"] == found[1]["widths"]
    assert found[0]["accuracy"] == found[1]["accuracy"]
    torch.compiler.reset()


@pytest.fixture
def bodies(monkeypatch: pytest.MonkeyPatch) -> None:
    """A task of three classes that starts from given weights; images are the digits 0 to 2."""

    def load(_: Any) -> tuple[Images, Images]:
        train, test = TASKS["digits"].load(None)
        chosen = [(part.images[part.labels < 3], part.labels[part.labels < 3]) for part in (train, test)]
        return Images(*chosen[0]), Images(*chosen[1])

    def network() -> nn.Module:
        model = DigitsNet(8)
        model.head = nn.Linear(16, 3)
        return model

    monkeypatch.setitem(TASKS, "pretrained", replace(TASKS["digits"], load=load, network=network, pretrained=True))


@pytest.mark.usefixtures("bodies")
def test_a_pretrained_network_starts_from_the_files_weights_but_for_its_head(tmp_path: Path) -> None:
    torch.manual_seed(1)
    trained = DigitsNet(8)
    torch.save(trained.state_dict(), tmp_path / "weights.pt")
    weights = Weights.read(str(tmp_path / "weights.pt"))
    assert weights.fingerprint == hashlib.sha256((tmp_path / "weights.pt").read_bytes()).hexdigest()[:12]
    model = starting_from(TASKS["pretrained"], weights).network()
    for name, value in model.state_dict().items():
        assert name.startswith("head") or torch.equal(value, trained.state_dict()[name])
    assert model.head.weight.shape == (3, 16)  # type: ignore[union-attr]
    usual = ["--task", "pretrained", "--epochs", "1", "--seeds", "0", "--method", "theta", "--out", str(tmp_path)]
    accuracy.main([*usual, "--pretrained", str(tmp_path / "weights.pt")])
    runs = read_records(tmp_path / "pretrained.jsonl")
    assert [run["pretrained"] for run in runs] == [weights.fingerprint] * 2
    assert runs[0]["widths"]["head"] == 3


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_torchvisions_weights_fit_its_networks_with_another_head(name: str) -> None:
    weights = torchvision_net(name, 1000).state_dict()
    model = torchvision_net(name, 5)
    load_body(model, weights)
    head = {"resnet18": "fc", "mobilenet_v2": "classifier.1"}[name]
    assert model.get_submodule(head).weight.shape[0] == 5
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items() if not k.startswith(head))
    before = copy.deepcopy(model.state_dict())
    first = next(iter(weights))
    wrong = {k: v + 1 for k, v in weights.items()} | {first: torch.zeros(2, 3), "more": torch.zeros(1)}
    del wrong[f"{head}.weight"], wrong[list(weights)[1]]
    with pytest.raises(
        ValueError, match=f"{list(weights)[1]} is missing; more is not the model's; {first} is "
    ) as error:
        load_body(model, wrong)
    assert "[2, 3] and should be [" in str(error.value)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.usefixtures("bodies")
def test_weights_that_do_not_fit_are_refused_before_anything_runs(tmp_path: Path, capsys: Any) -> None:
    torch.save(DigitsNet(4).state_dict(), tmp_path / "narrow.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    (tmp_path / "text.pt").write_text("no weights")
    usual = ["--method", "theta", "--out", str(tmp_path)]
    for arguments, message in (
        (["--task", "pretrained"], "--pretrained FILE and tasks named -pretrained go together"),
        (["--pretrained", str(tmp_path / "narrow.pt")], "--pretrained FILE and tasks named -pretrained go together"),
        (
            ["--task", "pretrained", "--pretrained", str(tmp_path / "narrow.pt")],
            "stem.weight is [4, 1, 3, 3] and should",
        ),
        (["--task", "pretrained", "--pretrained", str(tmp_path / "list.pt")], "holds no state dict"),
        (["--task", "pretrained", "--pretrained", str(tmp_path / "text.pt")], "cannot be read as a state dict"),
        (["--task", "pretrained", "--pretrained", str(tmp_path / "none.pt")], "cannot be read as a state dict"),
    ):
        with pytest.raises(SystemExit) as exit_:
            accuracy.main([*usual, *arguments])
        assert exit_.value.code == 2
        assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("*.jsonl"))


# ---------------------------------------------------------------- sharpness


def test_sharpness_is_the_mean_rise_of_the_loss_under_relative_noise() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    x, y = torch.randn(20, 4), torch.randint(3, (20,))
    generator = torch.Generator().manual_seed(0)
    losses = []
    for _ in range(7):
        noisy = copy.deepcopy(model).eval()
        for layer in (noisy[0], noisy[3]):
            layer.weight.data += 0.3 * torch.randn(layer.weight.shape, generator=generator) * layer.weight.data
        losses.append(F.cross_entropy(noisy(x), y).item())
    expected = sum(losses) / 7 - F.cross_entropy(model.eval()(x), y).item()
    assert accuracy.sharpness(model, x, y, noise=0.3, draws=7) == pytest.approx(expected, rel=1e-4)
    assert accuracy.sharpness(model, x, y, noise=0.0) == pytest.approx(0, abs=1e-6)


def test_sharpness_does_not_change_when_layers_are_scaled_against_each_other() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    x, y = torch.randn(20, 4), torch.randint(3, (20,))
    before = accuracy.sharpness(model, x, y)
    with torch.no_grad():
        for p in model[0].parameters():
            p.mul_(8)
        model[2].weight.div_(8)
    assert accuracy.sharpness(model, x, y) == pytest.approx(before, rel=1e-4)
    assert abs(before) > 1e-5


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--method", "sgd"], "sgd removes no neurons: give --sparsity 0"),
        (["--method", "sgd", "--speedup", "1", "2"], "sgd removes no neurons: give --sparsity 0"),
        (["--method", "magic"], "invalid choice: 'magic'"),
        (["--task", "imagenet"], "invalid choice: 'imagenet'"),
        (["--sparsity", "1"], "must be at least 0 and less than 1"),
        (["--speedup", "0.5"], "must be at least 1"),
        (["--speedup", "2", "--sparsity", "0.5"], "not allowed with"),
        (["--amp", "int8"], "invalid choice: 'int8'"),
    ],
)
def test_impossible_options_are_refused(wrong: list[str], message: str, capsys: Any) -> None:
    with pytest.raises(SystemExit) as exit_:
        accuracy.main(wrong)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


def test_tasks_with_files_ask_for_them(tmp_path: Path) -> None:
    for task, holds in (("mnist-mlp", "MNIST/"), ("cifar10-resnet18-small", "cifar-10-batches-py/")):
        with pytest.raises(SystemExit, match=f"--data-root, the folder with {holds}"):
            accuracy.main(["--task", task, "--method", "theta", "--out", str(tmp_path)])
