"""python -m benchmarks.flatness: what is measured is what is said, on networks small enough to be sure."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from benchmarks import accuracy, flatness
from benchmarks.records import read_records
from benchmarks.tasks import TASKS
from benchmarks.training import Trained
from examples.digits import DigitsNet, Images
from kfac_flat import spectral_radii
from tests.benchmarks.test_report import CIRCUMSTANCES


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def batch() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(30, 4, dtype=torch.float64), torch.randint(3, (30,))


@pytest.mark.parametrize("relative", [False, True])
def test_the_top_eigenvalue_is_that_of_the_full_hessian(relative: bool) -> None:
    model, (x, y) = network(), batch()
    chosen = {n: p.detach() for n, p in model.named_parameters() if not relative or n.endswith("weight")}
    start = torch.cat([p.flatten() for p in chosen.values()])

    def loss(v: Tensor) -> Tensor:
        at = start * v if relative else start + v  # for relative changes, v is all of ones here
        parts = at.split([p.numel() for p in chosen.values()])
        weights = {n: part.view_as(p) for (n, p), part in zip(chosen.items(), parts, strict=True)}
        return F.cross_entropy(functional_call(model, weights, (x,)), y)

    at = torch.ones_like(start) if relative else torch.zeros_like(start)
    hessian = torch.autograd.functional.hessian(loss, at)
    expected = torch.linalg.eigvalsh(hessian)[-1].item()
    found = flatness.top_eigenvalue(model, x, y, relative)
    assert found == pytest.approx(expected, rel=0.01)


def test_only_the_relative_eigenvalue_stays_when_layers_are_scaled_against_each_other() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8, bias=False), nn.ReLU(), nn.Linear(8, 3, bias=False))
    x, y = torch.randn(40, 4), torch.randint(3, (40,))
    before = [flatness.top_eigenvalue(model, x, y, relative) for relative in (False, True)]
    with torch.no_grad():
        model[0].weight.mul_(10)
        model[2].weight.div_(10)
    after = [flatness.top_eigenvalue(model, x, y, relative) for relative in (False, True)]
    assert after[0] > 2 * before[0]
    assert after[1] == pytest.approx(before[1], rel=0.02)


def test_accuracy_under_noise_is_the_mean_over_networks_whose_weights_were_multiplied() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)).eval()
    data = Images(torch.randn(50, 4), torch.randint(3, (50,)))
    before = copy.deepcopy(model.state_dict())
    generator, shares = torch.Generator().manual_seed(0), []
    for _ in range(5):
        noisy = copy.deepcopy(model)
        for layer in (noisy[0], noisy[3]):
            layer.weight.data *= 1 + 0.7 * torch.randn(layer.weight.shape, generator=generator)
        shares.append(100 * (noisy(data.images).argmax(1) == data.labels).double().mean().item())
    assert flatness.noisy_accuracy(model, data, 0.7, draws=5) == pytest.approx(sum(shares) / 5)
    assert len(set(shares)) > 1
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_each_measure_is_of_the_images_and_the_noise_that_it_is_named_for(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (accuracy, flatness):
        monkeypatch.setattr(module, "MEASURED", 12)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    train_set, test_set = (Images(torch.randn(40, 4) * scale, torch.randint(3, (40,))) for scale in (1, 3))
    model.train()(test_set.images)  # its statistics differ from those of a batch
    record = flatness.flatness(model, train_set, test_set)
    model.eval()
    x, y = train_set.images[:12], train_set.labels[:12]
    assert record["rho"] == max(spectral_radii(model, test_set.images[:12]).values())
    assert record["hessian"] == flatness.top_eigenvalue(model, x, y)
    assert record["relative_hessian"] == flatness.top_eigenvalue(model, x, y, relative=True)
    assert record["sharpness"] == accuracy.sharpness(model, x, y)
    assert record["accuracy_under_noise"] == {
        str(noise): flatness.noisy_accuracy(model, test_set, noise) for noise in (0.1, 0.2, 0.3, 0.4)
    }
    assert len(set(record["accuracy_under_noise"].values())) > 1


def test_the_accuracy_of_a_run_is_that_on_test_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flatness, "flatness", lambda *_: {})
    train_set, test_set = (Images(torch.ones(n, 4), torch.zeros(n, dtype=torch.long)) for n in (6, 4))
    model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 2))
    with torch.no_grad():
        model[1].bias.copy_(torch.tensor([90.0, -90.0]))
    test_set.labels[0] = 1
    assert flatness.found(Trained(model, 1.5, 0.0), (train_set, test_set)) == {
        "accuracy": 75.0,
        "seconds": 1.5,
        "neurons": 5,
    }


def test_the_page_has_each_number_in_its_column_and_a_curve_from_no_noise_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = [
        {
            "task": "t",
            "epochs": 1,
            "method": "sam",
            "seed": seed,
            "sparsity": sparsity,
            **CIRCUMSTANCES,
            "accuracy": 90.0 + seed + 5 * (not sparsity),
            "seconds": 1.0,
            "rho": 1.0,
            "hessian": 2.0,
            "relative_hessian": 3.0,
            "sharpness": 4.0,
            "accuracy_under_noise": {"0.1": 80.0 + seed, "0.2": 70.0, "0.3": 60.0, "0.4": 50.0},
        }
        for sparsity in (0.0, 0.5)
        for seed in (0, 2)
    ]
    figures: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: figures.append(self))
    text = "\n".join(flatness.page(records, tmp_path))
    cells = [cell.strip() for cell in text.split("50% of the neurons removed\n")[1].split("| SAM (2) |")[1].split("|")]
    assert [cell.split(" ±")[0] for cell in cells[:9]] == ["91.00", "1", "2", "3", "4", "81.0", "70.0", "60.0", "50.0"]
    dense, half = figures[0].axes
    assert [axes.get_title() for axes in (dense, half)] == ["Dense", "50% of the neurons removed"]
    for axes, accuracy_without in ((dense, 96), (half, 91)):
        (line,) = axes.lines
        assert list(zip(*line.get_data(), strict=True)) == [
            (0, accuracy_without), (0.1, 81), (0.2, 70), (0.3, 60), (0.4, 50),
        ]  # fmt: skip


def test_runs_are_written_down_once_and_the_page_tells_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TASKS, "digits", replace(TASKS["digits"], network=partial(DigitsNet, 4)))
    for module in (accuracy, flatness):
        monkeypatch.setattr(module, "MEASURED", 16)
    monkeypatch.setattr(flatness, "DRAWS", 2)
    usual = ["--seeds", "0", "1", "--epochs", "2", "--out", str(tmp_path), "--page", str(tmp_path / "flatness.md")]
    flatness.main([*usual, "--method", "theta", "hgnp"])
    runs = read_records(tmp_path / "digits.jsonl")
    assert len(runs) == 2 * 2 * 2
    assert {r["neurons"] for r in runs if not r["sparsity"]} == {36}
    dense = [r for r in runs if not r["sparsity"]]
    assert all(r["hessian"] > 0 and r["relative_hessian"] > 0 and r["rho"] > 0 for r in dense)
    assert len({r["hessian"] for r in dense if r["method"] == "theta"}) == 2, "each seed has a network of its own"
    assert runs[0]["accuracy_under_noise"].keys() == {"0.1", "0.2", "0.3", "0.4"}
    flatness.main([*usual, "--method", "theta"])
    assert read_records(tmp_path / "digits.jsonl") == runs
    flatness.main([*usual, "--report"])
    text = (tmp_path / "flatness.md").read_text()
    assert "## digits, 2 epochs" in text
    own = [r for r in runs if (r["method"], r["sparsity"]) == ("theta", 0.75)]
    cells = next(
        line for line in text.split("75% of the neurons removed")[1].splitlines() if line.startswith("| SGD (2)")
    )
    assert f"{(own[0]['accuracy'] + own[1]['accuracy']) / 2:.2f} ±" in cells
    assert "| HGNP (2) |" in text
    assert (tmp_path / "flatness" / "digits-2.png").read_bytes().startswith(b"\x89PNG")
