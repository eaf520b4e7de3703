"""python -m examples.export_onnx: the files hold the networks that the table speaks of."""

from __future__ import annotations

import re
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch

from examples import export_onnx
from examples.digits import DigitsNet, load_data
from tests.examples.running import printed_by, said_at_exit

ROW = r"^ *{} +([\d.]+) % +(\S+) +([\d,]+) +([\d,]+) +([\d,]+) +([\d.]+) +([\d.]+)"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("export") / "not" / "there"


@pytest.fixture(scope="module")
def printed(folder: Path) -> str:
    return printed_by("export_onnx", "--epochs", 3, "--width", 8, "--target", 0.5, "--out", folder)


@pytest.mark.parametrize("name", ["dense", "pruned"])
def test_a_row_tells_of_the_file(name: str, printed: str, folder: Path) -> None:
    row = re.search(ROW.format(name), printed, re.MULTILINE)
    assert row
    accuracy, difference, parameters, macs, kilobytes, *times = (float(cell.replace(",", "")) for cell in row.groups())
    path = folder / f"{name}.onnx"
    stored = onnx.load(path).graph.initializer
    matrices = [tuple(t.dims) for t in stored if len(t.dims) > 1]
    in_file = sum(torch.Size(dims).numel() for dims in matrices)
    assert 0.8 * parameters < in_file <= parameters
    assert kilobytes == round(path.stat().st_size / 1000)
    assert macs > parameters
    assert 0 <= difference < 1e-5
    assert all(time > 0 for time in times)

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    test_set = load_data("cpu")[1]
    logits = [session.run(None, {session.get_inputs()[0].name: x.numpy()})[0] for x in test_set.images.split(7)]
    found = torch.cat([torch.from_numpy(part).argmax(1) for part in logits])
    assert accuracy == round(100 * (found == test_set.labels).double().mean().item(), 2)


def test_the_pruned_file_is_the_smaller_one(printed: str, folder: Path) -> None:
    dense, pruned = (
        re.search(ROW.format(name), printed, re.MULTILINE)[3].replace(",", "") for name in ("dense", "pruned")
    )
    assert int(pruned) < 0.6 * int(dense)
    assert (folder / "pruned.onnx").stat().st_size < (folder / "dense.onnx").stat().st_size


def test_a_file_is_that_of_the_very_weights(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = DigitsNet(4)
    images = load_data("cpu")[1].images[:5]
    model(images)  # the running statistics move away from where they begin
    export_onnx.export(model, images, tmp_path / "model.onnx")
    session = export_onnx.opened(tmp_path / "model.onnx", threads=1)
    expected = model(images).detach()
    assert export_onnx.relative_difference(export_onnx.computed(session, images), expected) < 1e-5
    with torch.no_grad():
        model.head.weight.mul_(1.01)
    with pytest.raises(RuntimeError, match="something else than torch"):
        export_onnx.relative_difference(export_onnx.computed(session, images), model(images).detach())


def test_outputs_that_are_no_numbers_are_a_difference() -> None:
    with pytest.raises(RuntimeError, match="something else than torch"):
        export_onnx.relative_difference(torch.full((2, 3), torch.nan), torch.ones(2, 3))


def test_help_names_the_options(capsys: pytest.CaptureFixture[str]) -> None:
    text = said_at_exit(export_onnx.main, ["--help"], 0, capsys)
    for option in ("--target", "--epochs", "--threads", "--out"):
        assert option in text
