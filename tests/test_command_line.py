"""kfac-flat inspect: what it prints of a user's own model, and how it says no."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch import nn

from examples.torchvision_models import models
from kfac_flat.command_line import example_inputs, main
from tests.page.reading import read

ROOT = Path(__file__).parents[1]
MADE = "tests.made_models"


@pytest.fixture(autouse=True)
def wide_screen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "path", [*sys.path])


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    main(["inspect", *arguments])
    return capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run a command that cannot be done; it says so in one line on stderr, and nothing else."""
    with pytest.raises(SystemExit) as exit_:
        main(list(arguments))
    assert exit_.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.endswith("\n")
    assert err.count("\n") == 1
    assert err.startswith("kfac-flat")
    return err.partition(": error: ")[2].strip()


def rows(text: str) -> dict[str, list[str]]:
    return {name: cells for name, *cells in (line.split() for line in text.splitlines() if line.strip())}


# ---------------------------------------------------------------- what it prints


@pytest.mark.parametrize(
    ("factory", "width"),
    [
        ("Tower", 8),
        ("build", 12),
        ("model", 9),
        ("Shelf.model", 5),
        ("Shelf.build", 7),
        ("Shelf.build()", 7),
        ("Tower(6)", 6),
        ("Tower(width=4, bias=False)", 4),
        ("build_wide(11)", 11),
    ],
)
def test_models_are_found_made_and_called(capsys: pytest.CaptureFixture[str], factory: str, width: int) -> None:
    layers = rows(printed(capsys, f"{MADE}:{factory}", "--input", "1,6"))
    assert layers["layers.0"][:3] == ["6", str(width), str(width - 1)]
    assert layers["head"][:3] == [str(width), "3", "0"]
    assert layers["neurons"] == [str(width), "1"]


def test_what_is_frozen_is_named_with_the_reason(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, f"{MADE}:Tokens", "--input", "2,5:int64", "--input", "2,5:bool")
    frozen = " ".join(text.partition("Frozen:")[2].split())
    assert "forms the model's output: head" in frozen
    assert re.search(r"Embedding has no rule[^:]*: embed", frozen)


@pytest.mark.parametrize(
    "inputs", [["ids=1,5:int64", "mask=1,5:float32"], ["mask=1, 5 : bool", "ids=1,5:int64"], ["1,5:long", "1,5"]]
)
def test_inputs_are_given_by_position_or_by_name(capsys: pytest.CaptureFixture[str], inputs: list[str]) -> None:
    text = printed(capsys, f"{MADE}:Tokens", *(word for given in inputs for word in ("--input", given)))
    assert rows(text)["hidden"][:3] == ["4", "10", "9"]


def test_an_even_cut_shows_what_would_be_left(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, f"{MADE}:Tower(20, depth=3)", "--input", "1,6", "--target", "0.25")
    assert [rows(text)[f"layers.{i}"][-1] for i in range(3)] == ["15"] * 3
    left = sum(p.numel() for p in import_module(MADE).Tower(15, depth=3).parameters())
    assert rows(text)["parameters"][1] == str(left)


def test_parts_that_cannot_be_traced_are_noted(capsys: pytest.CaptureFixture[str]) -> None:
    main(["inspect", f"{MADE}:PartlyOpaque", "--input", "1,4"])
    out, err = capsys.readouterr()
    assert err.startswith("note: these submodules cannot be traced")
    assert rows(out)["first"][2] == "0"


def test_torchvision_s_networks_are_inspected(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, "torchvision.models:resnet18", "--input", "1,3,64,64")
    model = models.resnet18()
    assert rows(text)["parameters"][0] == f"{sum(p.numel() for p in model.parameters()):,}"
    for name, module in model.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            assert rows(text)[name][3] == f"{sum(p.numel() for p in module.parameters()):,}"
    assert "64 x conv1 + layer1.0.conv2 + layer1.1.conv2\n" in text


def test_the_page_says_what_is_printed(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "model.html"
    arguments = [f"{MADE}:Tower(20, depth=2)", "--input", "1,6", "--target", "0.5", "--html", str(path)]
    text = printed(capsys, *arguments)
    assert f"Written to {path}" in text
    root = read(path)
    assert root.one("h1").text == f"What can be pruned of {arguments[0]}"
    costs = root.table("Channels, how many of them can go.*")
    for name, cells in costs.items():
        assert cells == rows(text)[name.partition(" ")[0]][:-1]
    assert set(costs) == {"layers.0", "layers.1", "head frozen (1)"}
    even = root.table("Output channels of each layer.*")
    assert even["layers.0"] == ["20", "10", "50.0%"]
    assert root.table("Groups of channels.*") == {"layers.0": ["20"], "layers.1": ["20"]}
    tiles = root.one(class_="tiles").all("div")
    assert [tile.one("b").text for tile in tiles] == [rows(text)[what][0] for what in ("neurons", "parameters", "MACs")]
    for tile, what in zip(tiles, ("neurons", "parameters", "MACs"), strict=True):
        now, even, least = (number.replace(",", "") for number in rows(text)[what])
        assert tile.one("i").attributes["style"] == f"width:{100 * int(least) / int(now):.4g}%"
        assert tile.one("dd").text.replace(",", "") == f"{now}{even} at 50% {least} at least"
    assert re.search(r"\S+% of the parameters are in tensors that can shrink", text)[0] in root.one("header").text


# ---------------------------------------------------------------- how it says no


@pytest.mark.parametrize(
    ("model", "told"),
    [
        ("tests.made_modles:Tower", r"there is no module tests.made_modles here: run this in the folder that holds it"),
        ("nowhere.models:Tower", r"there is no module nowhere here"),
        (f"{MADE}:Towr", r"tests.made_models has no Towr; did you mean Tower\?"),
        (f"{MADE}:Shelf.modle", r"tests.made_models.Shelf has no modle; did you mean model\?"),
        (f"{MADE}:zzzz", r"tests.made_models has no zzzz: name a model, or a class or function of one"),
        (
            f"{MADE}:build_wide",
            r"does not take these arguments .*'width'.*such as \"tests.made_models:build_wide\(10\)\"",
        ),
        (f"{MADE}:build(3)", r"does not take these arguments \(too many positional arguments\)"),
        (f"{MADE}:Tower(height=3)", r"does not take these arguments \(.*'height'\)"),
        (f"{MADE}:model(3)", r"tests.made_models:model is a model already: leave the arguments away"),
        (f"{MADE}:build_nothing", r"gives an object of type dict: name a function that returns a torch.nn.Module"),
        (f"{MADE}:number", r"tests.made_models:number is of type int: name a model, or a class or function of one"),
        (f"{MADE}:Tower(width)", r"arguments that are plain values, such as mypackage.models:Net\(width=32\)"),
        (f"{MADE}:Tower(**{{'width': 3}})", r"must be a name, or a name and arguments"),
        (f"{MADE}:Tower(", r"behind the colon stands a name"),
        (f"{MADE}:", r"behind the colon stands a name"),
        (f"{MADE}:[Tower]", r"must be a name, or a name and arguments"),
        (MADE, r"tests.made_models must be MODULE:FACTORY, such as torchvision.models:resnet18"),
        ("tests/made_models.py:Tower", r"is a file: name the module as in an import, such as tests.made_models:Tower"),
        ("made models:Tower", r"must be MODULE:FACTORY"),
        ("..relative:Tower", r"must be MODULE:FACTORY"),
        ("torch.nn:ReLU", r"ReLU has no Linear layer and no convolution, so no neurons"),
        (f"{MADE}:Branching", r"Branching.forward cannot be traced by torch.fx"),
    ],
)
def test_models_that_are_not_there_are_refused(capsys: pytest.CaptureFixture[str], model: str, told: str) -> None:
    assert re.search(told, refused(capsys, "inspect", model, "--input", "1,6"))


@pytest.mark.parametrize(
    ("inputs", "told"),
    [
        (
            ["1,7"],
            r"with --input 1,7: the model does not run on example_inputs: layers.0 \(Linear\) fails: .*\. Give what",
        ),
        (["1,6", "1,6"], r"--input 1,6: example_inputs do not fit the model's arguments .*: too many positional"),
        (
            ["y=1,6"],
            r"--input y=1,6: example_inputs do not fit the model's arguments .*: missing a required argument: 'x'",
        ),
        (["1,a"], r"--input 1,a: write the sizes of the tensor"),
        (["1,0"], r"--input 1,0: write the sizes of the tensor, whole numbers from 1"),
        (["1,-6"], r"write the sizes of the tensor"),
        ([""], r"write the sizes of the tensor"),
        (["1,6:float"], None),
        (["1,6:flaot32"], r"torch has no dtype flaot32; say float32, float16, int64 or bool"),
        (["1,6:nn"], r"torch has no dtype nn"),
        (["x=1,6", "1,6"], r"give all inputs by position or all by name"),
        (["x=1,6", "x=1,6"], r"x is given twice"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(
    capsys: pytest.CaptureFixture[str], inputs: list[str], told: str | None
) -> None:
    arguments = ["inspect", f"{MADE}:Tower", *(word for given in inputs for word in ("--input", given))]
    if told is None:
        main(arguments)
    else:
        assert re.search(told, refused(capsys, *arguments))


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "arguments are required: COMMAND"),
        (["inspekt"], "invalid choice: 'inspekt'"),
        (["inspect", f"{MADE}:Tower"], "arguments are required: --input"),
        (["inspect", f"{MADE}:Tower", "--input", "1,6", "--target", "2"], "2 must be a number between 0 and 1"),
        (["inspect", f"{MADE}:Tower", "--input", "1,6", "--target", "x"], "x must be a number between 0 and 1"),
        (["inspect", f"{MADE}:Tower(4)", "--input", "1,6", "--target", "0.9"], "75.0% of the neurons can go at most"),
        (["inspect", f"{MADE}:Tower", "--input", "1,6", "--html", "/no/such/x.html"], "there is no folder /no/such"),
        (["inspect", f"{MADE}:Tower", "--input", "1,6", "--html", "."], "is a folder: name a file in it"),
    ],
)
def test_options_that_make_no_sense_are_refused(
    capsys: pytest.CaptureFixture[str], arguments: list[str], told: str
) -> None:
    assert told in refused(capsys, *arguments)


def test_a_module_that_needs_another_says_which(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "needy.py").write_text("import not_installed_anywhere\n")
    monkeypatch.chdir(tmp_path)
    told = refused(capsys, "inspect", "needy:build", "--input", "1,6")
    assert told == "needy cannot be imported: it needs not_installed_anywhere, which is not installed"


def test_errors_in_the_user_s_own_code_keep_their_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken.py").write_text("def build():\n    raise KeyError('weights')\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(KeyError, match="weights"):
        main(["inspect", "broken:build", "--input", "1,6"])


# ---------------------------------------------------------------- as a command


def test_it_runs_as_a_module_in_the_user_s_folder(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from torch import nn\n\ndef build():\n    return nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 2))\n"
    )
    command = [sys.executable, "-W", "error", "-m", "kfac_flat", "inspect"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "80"}

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*command, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )

    done = run("mine:build", "--input", "1,4", "--html", "mine.html")
    assert (done.returncode, done.stderr) == (0, "")
    assert rows(done.stdout)["0"][:3] == ["4", "5", "4"]
    read(tmp_path / "mine.html")
    done = run("mine:model", "--input", "1,4")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("python -m kfac_flat inspect: error: mine has no model")


def test_help_shows_examples(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["inspect", "--help"])
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    for part in ("--input", "--target", "--html", "examples:", "kfac-flat inspect torchvision.models:resnet18"):
        assert part in text


def test_the_command_of_that_name_is_installed() -> None:
    module, name = re.search(r'^kfac-flat = "(.+):(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE).groups()
    assert getattr(import_module(module), name) is main


def test_zeros_of_the_right_kind_are_made() -> None:
    made = example_inputs(["2,3:int64", "4:bfloat16"])
    assert [(tuple(t.shape), t.dtype) for t in made] == [((2, 3), torch.int64), ((4,), torch.bfloat16)]


def test_the_documentation_shows_what_is_printed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    text = (ROOT / "docs" / "command_line.md").read_text(encoding="utf-8")
    command = shlex.split(re.search(r"\$ kfac-flat inspect (.*)", text)[1])
    assert re.search(r"```text\n(.*?)```", text, re.DOTALL)[1] == printed(capsys, *command)
    wrong, told = re.search(r"\$ kfac-flat inspect (.*)\nkfac-flat inspect: error: (.*)", text).groups()
    assert refused(capsys, "inspect", *shlex.split(wrong)) == told
