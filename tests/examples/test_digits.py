"""python -m examples.digits: the command, what it prints and what it leaves behind."""

import re

import matplotlib.image
import pytest
import torch

import kfac_flat
from examples import digits
from tests.examples.running import penalties, printed_by, said_at_exit
from tests.page.reading import read


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("digits") / "not" / "there"


@pytest.fixture(scope="module")
def printed(folder):
    return printed_by("digits", "--epochs", 3, "--width", 8, "--target", 0.5, "--seed", 3, "--out", folder)


def test_the_table_compares_the_three_methods(printed):
    rows = {name: re.findall(rf"^ *{name} +([\d.]+) % +([\d,]+)", printed, re.MULTILINE) for name in METHODS}
    neurons = {name: int(found[-1][1].replace(",", "")) for name, found in rows.items()}
    assert neurons["dense SGD"] == 3 * 8 + 3 * 16
    assert abs(neurons["HGNP"] - 36) <= 1
    assert abs(neurons["same pruning, mu = 0"] - 36) <= 1
    for column in ("accuracy", "neurons", "parameters", "MACs", "rho", "ms per"):
        assert column in printed
    assert f"torch {torch.__version__}" in printed


METHODS = ("dense SGD", "HGNP", "same pruning, mu = 0")


@pytest.mark.parametrize("name", ["history.png", "widths.png"])
def test_pictures_are_drawn(printed, folder, name):
    assert name in printed
    pixels = matplotlib.image.imread(folder / name)
    assert min(pixels.shape[:2]) > 400
    assert pixels.std() > 0.01


def test_the_page_tells_of_the_network_that_was_saved(printed, folder):
    assert "report.html" in printed
    root = read(folder / "report.html")
    kept = torch.load(folder / "checkpoint.pt", weights_only=True)["pruner"]["layers"]
    rows = {name.partition(" ")[0]: cells for name, cells in root.table("Output channels of each layer").items()}
    assert {name: int(cells[1]) for name, cells in rows.items()} == {name: len(kept[name]["out"]) for name in rows}
    accuracy = re.search(r"^ *HGNP +([\d.]+) %", printed, re.MULTILINE)[1]
    *_, last = root.table("Values at the end of each epoch").values()
    assert float(last[0]) == float(accuracy)


def test_a_new_process_finds_the_accuracy_that_was_saved(printed, folder):
    accuracy = re.search(r"^ *HGNP +([\d.]+) %", printed, re.MULTILINE)[1]
    loaded = printed_by("digits", "--load", folder / "checkpoint.pt")
    assert f"test accuracy {accuracy} %, saved with {accuracy} %" in loaded


def test_loading_measures_and_does_not_quote(printed, folder):
    checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
    checkpoint["accuracy"] = 12.34
    checkpoint["model"]["head.weight"].zero_()
    torch.save(checkpoint, folder / "spoilt.pt")
    loaded = printed_by("digits", "--load", folder / "spoilt.pt")
    assert "saved with 12.34 %" in loaded
    assert float(re.search(r"test accuracy ([\d.]+) %", loaded)[1]) < 30


def test_the_row_of_hgnp_is_that_of_the_saved_network(printed, folder):
    checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
    model = kfac_flat.shrink(digits.DigitsNet(checkpoint["width"]), checkpoint["pruner"])
    model.load_state_dict(checkpoint["model"])
    test_set = digits.load_data("cpu")[1]
    row = re.search(r"^ *HGNP +([\d.]+) % +([\d,]+) +([\d,]+) +([\d,]+) +([\d.]+) +([\d.]+)", printed, re.MULTILINE)
    accuracy, _, parameters, macs, rho, _ = (float(number.replace(",", "")) for number in row.groups())
    assert accuracy == round(digits.accuracy(model, test_set), 2)
    assert parameters == sum(p.numel() for p in model.parameters())
    widths = [m.out_channels for m in model.modules() if isinstance(m, torch.nn.Conv2d)]
    assert parameters < macs < 64 * max(widths) ** 2 * 9 * len(widths)
    assert rho == pytest.approx(max(kfac_flat.spectral_radii(model.eval(), test_set.images).values()), rel=0.02)


def test_hgnp_trains_with_the_penalty_and_the_others_without(monkeypatch):
    seen = penalties(digits, monkeypatch)
    train_set, test_set = digits.load_data("cpu")
    settings = digits.Settings(epochs=2, width=4)
    for method in (digits.Method("dense"), digits.Method("HGNP", 0.5, 0.5), digits.Method("mu = 0", 0.0, 0.5)):
        digits.train(method, settings, train_set, test_set, lambda epoch: None)
    assert seen == [0.5]


def test_several_seeds_give_a_spread(tmp_path):
    printed = printed_by("digits", "--epochs", 2, "--width", 6, "--target", 0.5, "--seeds", 2, "--out", tmp_path)
    spread = re.search(r"^ *dense SGD +([\d.]+) ± ([\d.]+) %", printed, re.MULTILINE)
    assert float(spread[2]) > 0


def test_the_checkpoint_is_plain_and_small(printed, folder):
    checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
    model = kfac_flat.shrink(digits.DigitsNet(checkpoint["width"]), checkpoint["pruner"])
    model.load_state_dict(checkpoint["model"])
    assert sum(p.numel() for p in model.parameters()) < sum(p.numel() for p in digits.DigitsNet(8).parameters())


def test_help_names_the_options(capsys):
    text = said_at_exit(digits.main, ["--help"], 0, capsys)
    for option in ("--device", "--epochs", "--target", "--mu", "--seed", "--seeds", "--out", "--load"):
        assert option in text


@pytest.mark.parametrize("wrong", [["--target", "1.5"], ["--epochs", "1"], ["--seeds", "0"], ["--mu", "-1"]])
def test_impossible_options_are_refused(wrong, capsys):
    assert "must" in said_at_exit(digits.main, wrong, 2, capsys)


def test_the_three_start_alike_and_see_the_same_batches():
    def first_batch(seed):
        torch.manual_seed(seed)
        weights = digits.DigitsNet(4).head.weight
        images = digits.load_data("cpu")[0]
        return weights, next(images.batches(8, torch.Generator().manual_seed(seed)))[0]

    for one, other in zip(first_batch(1), first_batch(1), strict=True):
        assert torch.equal(one, other)
