"""What a report says about a cut, in words, in a picture and to a logger."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import re
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.tensorboard import SummaryWriter

from kfac_flat import NeuronPruner, PruneReport, Size
from kfac_flat.pruning.text import shortened
from tests.pruning.masking import layers_of, prune_at_random, pruner_for, widths_of
from tests.pruning.nets import CASES, Net


def pruned(name: str = "tokens") -> tuple[nn.Module, NeuronPruner, PruneReport]:
    """Cut a network of which one layer can lose neurons and three cannot."""
    model, inputs = CASES[name].build()
    pruner = pruner_for(model, inputs, target=0.2)
    prune_at_random(pruner, model)
    return model, pruner, pruner.history[-1]


def made_up(layers: int, name: str = "stage{}.block", frozen: int = 0) -> PruneReport:
    """Report on a network with any number of layers, the last ones frozen."""
    names = [name.format(i) for i in range(layers)]
    before = {n: 8 * (i % 7 + 1) for i, n in enumerate(names)}
    whole = names[layers - frozen :]
    after = {n: width if n in whole else width // 2 for n, width in before.items()}
    size = Size(sum(before.values()), 11_689_512, 1_814_073_344)
    small = Size(sum(after.values()), 3_000_000, 500_000_000)
    removed = {n: torch.arange(width // 2) for n, width in before.items() if n not in whole}
    reasons = {n: f"reason {i % 2} " + "of some length " * 12 for i, n in enumerate(whole)}
    return PruneReport(3, before, after, size, small, 0.5, removed, frozen=reasons)


# ---------------------------------------------------------------- the table


def test_the_table_has_the_models_widths_and_sizes_before_and_after() -> None:
    dense = {name: widths_of(m)[1] for name, m in layers_of(CASES["tokens"].build()[0]).items()}
    parameters = sum(p.numel() for p in CASES["tokens"].build()[0].parameters())
    model, _, report = pruned()
    small = {name: widths_of(m)[1] for name, m in layers_of(model).items()}
    table = report.table()
    for name, before in dense.items():
        row = re.search(rf"^{name} +(\d+) +(\d+) +(\S+) +(\S+)", table, re.MULTILINE)
        lost = before - small[name]
        expected = [str(lost), f"{100 * lost / before:.1f}%"] if lost else ["-", "-"]
        assert [*map(int, row.groups()[:2]), *row.groups()[2:]] == [before, small[name], *expected]
    assert dense != small
    left = sum(p.numel() for p in model.parameters())
    found = re.search(r"^parameters +(\d+) +-> +(\d+) +([\d.]+)x fewer$", table, re.MULTILINE)
    assert [int(found[1]), int(found[2])] == [parameters, left]
    assert float(found[3]) == pytest.approx(parameters / left, abs=0.005)
    for line in ("neurons", "MACs"):
        assert re.search(rf"^{line} +[\d,]+ +-> +[\d,]+ +[\d.]+x fewer$", table, re.MULTILINE)


def test_the_table_gives_the_reason_of_each_frozen_layer() -> None:
    _, pruner, report = pruned()
    assert report.frozen == pruner.frozen
    assert report.frozen
    table = " ".join(report.table().split())
    for name, reason in report.frozen.items():
        mark = re.search(rf"^{name} .*(\[\d\])$", report.table(), re.MULTILINE)[1]
        assert f"{mark} frozen: {reason}" in table
    assert len(re.findall(r"\] frozen:", table)) == len(set(report.frozen.values()))


def test_frozen_parts_that_have_no_width_are_named_in_the_table_and_do_not_stop_the_picture(tmp_path: Path) -> None:
    model = Net(
        lambda self, x: self.head(self.hidden(self.lstm(self.embed(x))[0] + self.shift)),
        embed=nn.Embedding(7, 4), lstm=nn.LSTM(4, 6), hidden=nn.Linear(6, 9), head=nn.Linear(9, 2),
    )  # fmt: skip
    model.shift = nn.Parameter(torch.ones(1, 6))
    report = pruner_for(model, torch.zeros(3, 1, dtype=torch.long)).plan()
    table = " ".join(report.table().split())
    for name in ("embed", "lstm", "shift"):
        assert name not in report.widths_before
        assert f"{name} frozen: {report.frozen[name]}" in table
    assert "[1] frozen: forms the model's output" in table
    assert "[2]" not in table, "a number that stands at no layer says nothing"
    assert "" not in report.frozen
    assert report.plot(tmp_path / "widths.png").exists()


@pytest.mark.parametrize("width", [80, 100, 120])
@pytest.mark.parametrize(
    "name", ["a{}", "backbone.encoder.layers.{}.attention_free_mixing.feed_forward.intermediate.dense"]
)
def test_lines_keep_to_the_width_and_columns_are_aligned(name: str, width: int) -> None:
    report = made_up(30, name, frozen=4)
    lines = report.table(width).splitlines()
    assert max(map(len, lines)) <= width
    blocks = report.table(width).split("\n\n")
    header, *rows = blocks[1].splitlines()
    assert len(rows) == 30
    for title in ("before", "after", "removed", "share"):
        end = header.index(title) + len(title)
        assert {row[end - 1 : end + 1].strip()[:1].isspace() for row in rows} == {False}
        assert {row[end : end + 1] for row in rows} <= {" ", ""}
    assert len({row.split()[0] for row in rows}) == 30, "shortened names can still be told apart"


def test_a_reason_why_nothing_went_stands_in_the_table() -> None:
    model, inputs = CASES["mlp"].build()
    report = pruner_for(model, inputs).plan()
    assert not report
    assert report.reason in " ".join(report.table().split())
    assert report.table().count("unchanged") == 3


@given(st.text(), st.integers(1, 60))
def test_shortened_names_fit_and_keep_both_ends(name: str, length: int) -> None:
    short = shortened(name, length)
    assert len(short) <= length
    if len(name) <= length:
        assert short == name
    elif length > 3:
        assert (short[0], short[-1]) == (name[0], name[-1])


@given(st.lists(st.sampled_from(["features", "denselayer", "conv_transpose", "b"]), min_size=1, max_size=5), st.data())
def test_layers_that_differ_in_a_number_are_told_apart(words: list[str], data: st.DataObject) -> None:
    numbers = st.integers(0, 99).map(str)
    one, other = (".".join(word + data.draw(numbers) for word in words) for _ in range(2))
    assert (shortened(one, 24) == shortened(other, 24)) == (one == other)


# ---------------------------------------------------------------- for loggers


def test_tensorboard_reads_back_what_the_reports_say(tmp_path: Path) -> None:
    model, inputs = CASES["residual"].build()
    pruner = pruner_for(model, inputs, target=0.6, events=3)
    with SummaryWriter(tmp_path) as writer:
        for epoch in range(3):
            prune_at_random(pruner, model, seed=epoch)
            for name, value in pruner.history[-1].scalars().items():
                writer.add_scalar(name, value, pruner.history[-1].epoch)
    events = EventAccumulator(str(tmp_path)).Reload()
    widths = {f"pruning/width/{name}" for name in layers_of(model)}
    assert set(events.Tags()["scalars"]) == widths | {
        f"pruning/{what}" for what in ("sparsity", "neurons", "parameters", "macs")
    }
    for tag, attribute in (("neurons", "neurons"), ("parameters", "parameters"), ("macs", "macs")):
        read = [(e.step, e.value) for e in events.Scalars(f"pruning/{tag}")]
        assert read == [(r.epoch, getattr(r.after, attribute)) for r in pruner.history]
    assert events.Scalars("pruning/sparsity")[-1].value == pytest.approx(pruner.sparsity)
    for name, module in layers_of(model).items():
        assert events.Scalars(f"pruning/width/{name}")[-1].value == widths_of(module)[1]


# ---------------------------------------------------------------- the picture


@pytest.mark.parametrize(("layers", "frozen"), [(1, 0), (20, 3), (160, 0), (160, 160)])
def test_the_picture_is_drawn_where_it_was_asked_for(tmp_path: Path, layers: int, frozen: int) -> None:
    path = tmp_path / "widths.png"
    assert made_up(layers, frozen=frozen).plot(str(path)) == path
    height, width = matplotlib.image.imread(path).shape[:2]
    assert width > 1000
    assert height > 25 * min(layers, 40), "each layer has a line of its own"
    assert height < 3000


def colours(path: Path) -> dict[str, int]:
    """Pixels of each colour that says something."""
    pixels = (matplotlib.image.imread(path)[..., :3] * 255).round().astype(int)
    wanted = {"kept": (0x00, 0x72, 0xB2), "removed": (0xE4, 0xE4, 0xE4)}
    return {name: int((pixels == colour).all(-1).sum()) for name, colour in wanted.items()}


def test_bars_are_as_long_as_layers_are_wide(tmp_path: Path) -> None:
    def bars(kept: int) -> int:
        size = Size(300, 300, 300)
        report = PruneReport(1, {"a": 100, "b": 200}, {"a": kept, "b": 2 * kept}, size, size, 0.5)
        return colours(report.plot(tmp_path / f"{kept}.png"))["kept"]

    none, some, most = (bars(kept) for kept in (0, 30, 90))
    assert (most - none) / (some - none) == pytest.approx(3, rel=0.05)


def test_names_are_drawn_as_they_are(tmp_path: Path) -> None:
    report = made_up(3, name="$\\broken_{}{{")
    assert report.plot(tmp_path / "widths.svg").read_text().startswith("<?xml")


IN_A_NEW_PROCESS = """
import sys
{before}
import torch, kfac_flat
from kfac_flat import PruneReport, Size
assert not any(name.split(".")[0] == "matplotlib" and module for name, module in sys.modules.items())
report = PruneReport(1, {{"a": 4}}, {{"a": 2}}, Size(4, 8, 8), Size(2, 4, 4), 0.5)
{after}
"""


def run(before: str, after: str) -> str:
    code = IN_A_NEW_PROCESS.format(before=before, after=after)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout


def test_drawing_leaves_the_global_state_of_pyplot_alone(tmp_path: Path) -> None:
    picture = str(tmp_path / "picture.png")
    printed = run("", f"report.plot({picture!r}); print('matplotlib.pyplot' in sys.modules)")
    assert printed.strip() == "False"


def test_without_matplotlib_all_but_the_picture_works_and_the_error_tells_what_to_install() -> None:
    printed = run(
        "sys.modules['matplotlib'] = None",
        "print(report.table(), report.scalars())\n"
        "try:\n    report.plot('x.png')\nexcept ImportError as error:\n    print(error)",
    )
    assert "2.00x fewer" in printed
    assert "pip install matplotlib" in printed


# ---------------------------------------------------------------- who is left


def test_survivors_are_the_original_positions_over_several_cuts() -> None:
    model, inputs = CASES["residual"].build()
    dense = copy.deepcopy(model)
    pruner = pruner_for(model, inputs, target=0.6, events=3)
    assert {n: t.tolist() for n, t in pruner.survivors.items()} == {
        name: list(range(widths_of(m)[1])) for name, m in layers_of(dense).items()
    }
    for event in range(3):
        prune_at_random(pruner, model, seed=event)
    for name, module in layers_of(model).items():
        left = pruner.survivors[name]
        gone = torch.cat([r.removed.get(name, torch.tensor([], dtype=torch.long)) for r in pruner.history])
        assert left.dtype == torch.int64
        assert sorted([*left.tolist(), *gone.tolist()]) == list(range(widths_of(layers_of(dense)[name])[1]))
        if module.bias is not None:  # lr = 0: what is left is as it was
            assert torch.equal(module.bias, layers_of(dense)[name].bias[left])


def test_survivors_cannot_be_changed_from_outside() -> None:
    _, pruner, _ = pruned()
    before = {name: t.clone() for name, t in pruner.survivors.items()}
    for positions in pruner.survivors.values():
        positions.zero_()
    assert all(torch.equal(t, before[name]) for name, t in pruner.survivors.items())
    with pytest.raises(AttributeError):
        pruner.survivors = {}


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda r: pickle.loads(pickle.dumps(r))], ids=["deepcopy", "pickle"])
def test_reports_can_be_copied_and_compared(copied: object) -> None:
    _, pruner, report = pruned()
    other = copied(report)
    assert other == report
    assert str(other) == str(report)
    assert other.table() == report.table()
    assert [r.table() for r in copied(pruner.history)] == [r.table() for r in pruner.history]
    name, positions = next(iter(other.removed.items()))
    assert dataclasses.replace(other, removed={name: positions + 1}) != report
    assert report != "a report"
