"""The examples under other libraries' loops: what they print, and that they go on from what they left behind."""

import re
from pathlib import Path
from types import ModuleType

import pytest

from examples import accelerate_digits, lightning_digits, transformer
from tests.examples.running import said_at_exit

pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]

LINE = r"epoch (\d+): (\d+)% of neurons removed, accuracy ([\d.]+) %"
EXAMPLES = {
    "lightning": (lightning_digits, ["--width", "16"], "last.ckpt", 50, 40),
    "accelerate": (accelerate_digits, ["--width", "16"], ".", 50, 40),
    "transformer": (transformer, ["--width", "24"], "checkpoint-*", 30, 40),
}


@pytest.mark.parametrize(("example", "options", "saved", "target", "least"), EXAMPLES.values(), ids=EXAMPLES)
def test_neurons_go_while_it_learns_and_it_goes_on_from_its_checkpoint(
    example: ModuleType,
    options: list[str],
    saved: str,
    target: int,
    least: float,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = [*options, "--epochs", "3", "--out", str(tmp_path)]
    example.main(options)
    lines = re.findall(LINE, capsys.readouterr().out)
    assert [int(epoch) for epoch, _, _ in lines] == [1, 2, 3]
    assert target - 5 <= int(lines[-1][1]) <= target + 2  # tied neurons go together
    assert float(lines[-1][2]) > least

    (checkpoint,) = tmp_path.glob(saved) if "*" in saved else [tmp_path / saved]
    example.main([*options[:-3], "4", *options[-2:], "--resume", str(checkpoint)])
    again = re.findall(LINE, capsys.readouterr().out)
    assert [(int(epoch), removed) for epoch, removed, _ in again] == [(4, lines[-1][1])]


@pytest.mark.parametrize("example", [example for example, *_ in EXAMPLES.values()])
def test_help_names_the_options(example: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    text = said_at_exit(example.main, ["--help"], 0, capsys)
    for option in ("--epochs", "--width", "--target", "--seed", "--out", "--resume"):
        assert option in text
