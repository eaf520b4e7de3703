"""python -m examples.finetune: what is loaded, what is left, and that it can be used."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

import kfac_flat
from examples import finetune
from examples.digits import Settings
from examples.torchvision_models import models
from tests.examples.running import penalties, printed_by, said_at_exit

ARCH = "shufflenet_v2_x0_5"
HEADS = {
    "resnet18": "fc",
    "vgg11_bn": "classifier.6",
    "squeezenet1_1": "classifier.1",
    "mnasnet0_5": "classifier.1",
    "densenet121": "classifier",
    "vit_b_16": "heads.head",
    "swin_t": "head",
}


def weights_of(arch: str, folder: Path, classes: int = 1000) -> tuple[Path, dict[str, Tensor]]:
    """Make a file as a user has it, of weights that stand for pretrained ones."""
    torch.manual_seed(5)
    state = models.get_model(arch, num_classes=classes).state_dict()
    torch.save(state, folder / "weights.pt")
    return folder / "weights.pt", state


def stripes(folder: Path, each: int = 12) -> None:
    """Draw images that stand out from each other: stripes that lie, stripes that stand."""
    generator = torch.Generator().manual_seed(0)
    for name in ("lying", "standing"):
        (folder / name).mkdir(parents=True)
        for i in range(each):
            lines = (torch.arange(48) % 8 < 4).float().expand(48, 48)
            pixels = 200 * (lines if name == "standing" else lines.T) + 55 * torch.rand(48, 48, generator=generator)
            Image.fromarray(pixels.byte().numpy()).convert("RGB").save(folder / name / f"{i}.png")


def loaded(path: Path) -> tuple[torch.nn.Module, dict[str, Any]]:
    """Load what has been saved as the example says at its end."""
    saved = torch.load(path, weights_only=True)
    model = models.get_model(saved["arch"], num_classes=len(saved["classes"]))
    kfac_flat.shrink(model, saved["pruner"]).load_state_dict(saved["model"])
    return model, saved


# ---------------------------------------------------------------- the network


@pytest.mark.parametrize("arch", HEADS)
def test_the_head_is_found(arch: str) -> None:
    assert finetune.head(arch) == {f"{HEADS[arch]}.weight", f"{HEADS[arch]}.bias"}


@pytest.mark.parametrize("arch", ["resnet18", "squeezenet1_1", "mnasnet0_5"])
def test_all_weights_but_the_heads_are_those_of_the_file(arch: str, tmp_path: Path) -> None:
    path, given = weights_of(arch, tmp_path)
    found = finetune.pretrained(arch, 10, path).state_dict()
    assert found.keys() == given.keys()
    for name, t in found.items():
        assert len(t) == 10 if name.startswith(f"{HEADS[arch]}.") else torch.equal(t, given[name])


def test_a_head_for_as_many_classes_is_made_anew_all_the_same(tmp_path: Path) -> None:
    path, given = weights_of(ARCH, tmp_path, classes=10)
    torch.manual_seed(6)
    found = finetune.pretrained(ARCH, 10, path).state_dict()
    assert not torch.equal(found["fc.weight"], given["fc.weight"])
    assert torch.equal(found["conv1.0.weight"], given["conv1.0.weight"])


def test_files_from_before_batches_were_counted_load(tmp_path: Path) -> None:
    _, given = weights_of(ARCH, tmp_path)
    torch.save({name: t for name, t in given.items() if "num_batches" not in name}, tmp_path / "old.pt")
    found = finetune.pretrained(ARCH, 10, tmp_path / "old.pt").state_dict()
    assert all(torch.equal(t, given[name]) for name, t in found.items() if not name.startswith("fc."))


@pytest.mark.parametrize(("content", "message"), [({}, r"not those of torchvision's .*conv1"), ([1], "but a list")])
def test_other_weights_are_refused(content: Any, message: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "other.pt")
    with pytest.raises(SystemExit, match=f"(?s){message}"):
        finetune.pretrained(ARCH, 10, tmp_path / "other.pt")


# ---------------------------------------------------------------- the data


def test_a_quarter_of_each_class_is_held_out_and_never_trained_on(tmp_path: Path) -> None:
    stripes(tmp_path / "images")
    data = finetune.load_folder(tmp_path / "images", 32)
    assert data.classes == ["lying", "standing"]
    train, test = ([image for image, _ in part] for part in (data.train, data.test))
    assert (len(train), len(test)) == (18, 6)
    assert sorted(label for _, label in data.test) == [0, 0, 0, 1, 1, 1]
    assert not any(torch.equal(one, other) for one in train for other in test)
    assert train[0].shape == (3, 32, 32)


def test_a_folder_without_images_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty" / "class").mkdir(parents=True)
    with pytest.raises(SystemExit, match="must hold one folder of images per class"):
        finetune.load_folder(tmp_path / "empty", 32)


def test_digits_become_larger_and_coloured_and_keep_their_labels() -> None:
    data = finetune.load_digits(16)
    small = finetune.load_data("cpu")[1]
    assert len(data.test) == len(small.labels) == 450
    image, label = data.test[7]
    assert image.shape == (3, 16, 16)
    assert label == small.labels[7]
    brightness = image[:, ::2, ::2].mean(0).flatten()
    assert torch.corrcoef(torch.stack([brightness, small.images[7].flatten()]))[0, 1] > 0.9


# ---------------------------------------------------------------- the command


def test_a_folder_of_images_and_weights_give_a_smaller_network_that_starts_from_them(tmp_path: Path) -> None:
    path, given = weights_of(ARCH, tmp_path)
    stripes(tmp_path / "images")
    standing_still = ("--lr", 1e-9, "--mu", 0, "--epochs", 3, "--batch-size", 6)
    options = ("--arch", ARCH, "--weights", path, "--data", tmp_path / "images", "--size", 32)
    printed = printed_by("finetune", *options, *standing_still, "--out", tmp_path / "not" / "there")
    model, saved = loaded(tmp_path / "not" / "there" / "checkpoint.pt")
    assert saved["classes"] == ["lying", "standing"]
    assert "no --weights" not in printed
    kept = saved["pruner"]["layers"]["conv1.0"]["out"]
    assert 0 < len(kept) <= 24
    assert torch.allclose(model.conv1[0].weight, given["conv1.0.weight"][kept], atol=1e-5)
    before, after = (int(n.replace(",", "")) for n in re.search(r"([\d,]+) -> ([\d,]+) neurons", printed).groups())
    assert after == pytest.approx(before / 2, rel=0.02)


def test_digits_are_learned_from_nothing_and_the_saved_network_is_as_good_as_printed(tmp_path: Path) -> None:
    printed = printed_by("finetune", "--arch", ARCH, "--epochs", 3, "--lr", 0.1, "--target", 0.3, "--out", tmp_path)
    assert "no --weights were given" in printed
    model, _ = loaded(tmp_path / "checkpoint.pt")
    found = finetune.accuracy(model, finetune.load_digits(32).test, Settings())
    assert f"{found:.2f} %" in printed
    assert found > 60


def test_hgnp_is_what_trains(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen = penalties(finetune, monkeypatch)
    stripes(tmp_path / "images", each=4)
    data = finetune.load_folder(tmp_path / "images", 32)
    epochs: list[Any] = []
    model = finetune.pretrained(ARCH, 2, None)
    pruner = finetune.finetune(model, data, Settings(epochs=2, batch_size=4), 0.5, 0.3, epochs.append)
    assert seen == [0.5]
    assert pruner.sparsity >= 0.3
    assert epochs[0].rho > 0


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--arch", "resnet19"], "no such classifier"),
        (["--arch", "googlenet"], "must have one output"),
        (["--weights", "not/there.pt"], "no such file"),
        (["--data", "not/there"], "no such folder"),
        (["--target", "1.5"], "must lie between"),
    ],
)
def test_impossible_options_are_refused(wrong: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in said_at_exit(finetune.main, wrong, 2, capsys)
