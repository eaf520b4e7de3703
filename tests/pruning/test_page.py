"""The HTML pages of a step and of a run say what the reports say."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from kfac_flat import NeuronPruner, PruneReport, Size
from kfac_flat.pruning import page
from tests.page.reading import Element, parsed, read
from tests.page.test_markup import TEXTS
from tests.pruning.masking import layers_of, prune_at_random, pruner_for, widths_of
from tests.pruning.nets import CASES, Net

SIZES = {"Neurons": "neurons", "Parameters": "parameters", "MACs": "macs"}


def run(name: str = "residual", events: int = 3) -> tuple[nn.Module, NeuronPruner]:
    """Prune a network in several steps, with one in which nothing goes."""
    model, inputs = CASES[name].build()
    pruner = pruner_for(model, inputs, target=0.6, events=events)
    for event in range(events):
        prune_at_random(pruner, model, seed=event)
    assert not pruner.step()
    return model, pruner


def number(text: str) -> int:
    return int(text.replace(",", ""))


def tiles(root: Element) -> dict[str, tuple[int, int]]:
    """What the page says of each size: afterwards, and before."""
    found = {}
    for tile in root.one(class_="tiles").all("div"):
        before = re.search(r"of ([\d,]+), ", tile.one("dd").text)[1]
        found[tile.one("dt").text] = number(tile.one("b").text), number(before)
    return found


def shares(root: Element) -> dict[str, float]:
    """The lengths of the bars below the sizes, as shares of the whole."""
    bars = {tile.one("dt").text: tile.one("i").attributes["style"] for tile in root.one(class_="tiles").all("div")}
    return {title: float(style.removeprefix("width:").removesuffix("%")) / 100 for title, style in bars.items()}


def positions(text: str) -> list[int]:
    """Read ranges such as "0-2, 5"."""
    ends = [[int(end) for end in part.split("-")] for part in text.split(", ")]
    return [i for first, *last in ends for i in range(first, (last or [first])[0] + 1)]


def filled(strip: Element) -> list[int]:
    """Channels that a picture shows as left: those whose middle lies in one of the rectangles."""
    rectangles = [
        (int(start), int(start) + int(length))
        for path in strip.all("path")
        for start, length in re.findall(r"M(\d+) 0h(\d+)v1H\1", path.attributes["d"])
    ]
    return sorted(i for first, end in rectangles for i in range(first, end))


# ---------------------------------------------------------------- a step


def test_the_page_of_a_step_has_the_numbers_of_its_report(tmp_path: Path) -> None:
    _, pruner = run()
    report = pruner.history[1]
    path = report.html(str(tmp_path / "step.html"), title="Second step")
    assert path == tmp_path / "step.html"
    root = read(path)
    assert root.one("h1").text == "Second step"
    assert tiles(root) == {t: (getattr(report.after, a), getattr(report.before, a)) for t, a in SIZES.items()}
    left = {title: getattr(report.after, name) / getattr(report.before, name) for title, name in SIZES.items()}
    assert shares(root) == pytest.approx(left, rel=1e-3)
    assert f"Epoch 2: {report.sparsity:.1%} of the neurons removed." in root.one("header").text
    rows = root.table("Output channels of each layer")
    assert len(rows) == len(report.widths_before)
    for name, before in report.widths_before.items():
        (cells,) = (cells for named, cells in rows.items() if named.partition(" ")[0] == name)
        assert [number(cell) for cell in cells[:2]] == [before, report.widths_after[name]]
        gone = before - report.widths_after[name]
        assert cells[2] == (f"{gone / before:.1%}" if gone else "-")
    went = root.table("Channels that went.*")
    assert {name: positions(cells[1]) for name, cells in went.items()} == {
        name: gone.tolist() for name, gone in report.removed.items()
    }
    assert {name: number(cells[0]) for name, cells in went.items()} == {n: len(g) for n, g in report.removed.items()}


def test_bars_are_as_long_as_layers_are_wide(tmp_path: Path) -> None:
    _, pruner = run()
    report = pruner.history[0]
    bars = read(report.html(tmp_path / "step.html")).all("span", aria_hidden="true")
    bars = [bar for bar in bars if bar.attributes["class"].startswith("bar")]
    most = max(report.widths_before.values())
    for bar, (name, before) in zip(bars, report.widths_before.items(), strict=True):
        outer, inner = (float(e.attributes["style"][6:-1]) for e in (bar, bar.one("i")))
        assert outer == pytest.approx(100 * before / most, rel=1e-3)
        assert inner == pytest.approx(100 * report.widths_after[name] / before, rel=1e-3)


def test_a_step_in_which_nothing_went_says_why(tmp_path: Path) -> None:
    _, pruner = run()
    report = pruner.history[-1]
    root = read(report.html(tmp_path / "step.html"))
    assert report.reason[1:] in root.one("header").text
    assert "Channels that went" not in root.text
    assert root.one(class_="tiles").text.count("unchanged") == 3


def test_each_frozen_layer_is_marked_with_the_number_of_its_reason(tmp_path: Path) -> None:
    model = Net(
        lambda self, x: self.head(self.hidden(self.lstm(self.embed(x))[0])),
        embed=nn.Embedding(7, 4), lstm=nn.LSTM(4, 6), hidden=nn.Linear(6, 9), head=nn.Linear(9, 2),
    )  # fmt: skip
    pruner = pruner_for(model, torch.zeros(3, 1, dtype=torch.long))
    root = read(pruner.plan().html(tmp_path / "plan.html"))
    listed = root.one("dl", class_="reasons")
    reasons = {dt.text: dd.text.split(", ") for dt, dd in zip(listed.all("dt"), listed.all("dd"), strict=True)}
    found = {name: re.fullmatch(r"\((\d+)\) (.*)", head).groups() for head, names in reasons.items() for name in names}
    assert {name: reason for name, (_, reason) in found.items()} == pruner.frozen
    assert {"embed", "lstm", "head"} <= set(found)
    rows = list(root.table("Output channels of each layer"))
    assert rows == ["hidden", f"head frozen ({found['head'][0]})"]


# ---------------------------------------------------------------- a run


def test_the_page_of_a_run_compares_the_dense_model_with_the_present_one(tmp_path: Path) -> None:
    model, pruner = run()
    dense = {name: widths_of(m)[1] for name, m in layers_of(CASES["residual"].build()[0]).items()}
    parameters = sum(p.numel() for p in CASES["residual"].build()[0].parameters())
    root = read(pruner.html(tmp_path / "run.html"))
    shown = tiles(root)
    assert shown["Parameters"] == (sum(p.numel() for p in model.parameters()), parameters)
    assert shown["Neurons"] == (pruner.size.neurons, pruner.history[0].before.neurons)
    assert pruner.history[-1].reason[1:] in root.one("header").text
    rows = {name.partition(" ")[0]: cells for name, cells in root.table("Output channels of each layer").items()}
    assert {n: number(cells[0]) for n, cells in rows.items()} == dense
    assert {n: number(cells[1]) for n, cells in rows.items()} == {
        n: widths_of(m)[1] for n, m in layers_of(model).items()
    }


def test_survivors_are_those_of_the_pruner_as_numbers_and_in_the_picture(tmp_path: Path) -> None:
    _, pruner = run()
    root = read(pruner.html(tmp_path / "run.html"))
    listed = root.table("Original positions of the channels.*")
    dense = pruner.history[0].widths_before
    cut = {name: left.tolist() for name, left in pruner.survivors.items() if len(left) < dense[name]}
    assert cut
    assert {name: positions(cells[0]) for name, cells in listed.items()} == cut
    strips = root.all("svg", class_="strip")
    for strip, (name, left) in zip(strips, cut.items(), strict=True):
        assert filled(strip) == left
        assert strip.attributes["viewbox"] == f"0 0 {dense[name]} 1"
        assert strip.attributes["aria-label"] == f"{name}: {len(left)} of {dense[name]} channels left"


def test_values_over_time_are_those_of_the_history_and_the_series(tmp_path: Path) -> None:
    _, pruner = run()
    accuracy, rho = [61.0, 70.25, 83.5, 90.0], [3.5, math.nan, 2.0, 1e-3]
    root = read(pruner.html(tmp_path / "run.html", series={"rho": torch.tensor(rho), "accuracy (%)": accuracy}))
    (table,) = (t for t in root.all("table") if t.one("caption").text == "Values at the end of each epoch")
    titles = [th.text for th in table.one("thead").all("th")]
    assert titles == ["Epoch", "rho", "accuracy (%)", "Sparsity", "Parameters", "MACs", "Neurons"]
    rows = root.table("Values at the end of each epoch")
    assert list(rows) == ["1", "2", "3", "4"]
    for i, (cells, report) in enumerate(zip(rows.values(), pruner.history, strict=True)):
        assert float(cells[0]) == pytest.approx(rho[i], rel=1e-3, nan_ok=True)
        assert float(cells[1]) == accuracy[i]
        assert cells[2] == f"{report.sparsity:.1%}"
        assert [number(c) for c in cells[3:]] == [report.after.parameters, report.after.macs, report.after.neurons]


def test_charts_begin_before_the_first_step_and_mark_those_that_took_neurons(tmp_path: Path) -> None:
    _, pruner = run()
    root = read(pruner.html(tmp_path / "run.html", series={"loss": [4.0, 3.0, 2.0, 1.0]}))
    figures = {f.one("figcaption").one("span").text: f for f in root.all("figure")}
    assert list(figures) == ["loss", "Sparsity", "Parameters", "MACs"]
    told = [g.one("title").text for g in figures["Parameters"].all("g")]
    first = pruner.history[0].before.parameters
    values = [first, *(r.after.parameters for r in pruner.history)]
    assert told == [f"epoch {i}: {value:,}" for i, value in enumerate(values)]
    for figure in figures.values():
        assert figure.one("path", class_="marks").attributes["d"].count("M") == 3
        assert figure.one("svg").attributes["role"] == "img"
        assert figure.one("svg").attributes["aria-label"].startswith(figure.one("span").text)


def test_a_latency_budget_is_shown_in_milliseconds(tmp_path: Path) -> None:
    size = Size(8, 100, 1000, 0.00250), Size(4, 50, 500, 0.00125)
    report = PruneReport(3, {"a": 8}, {"a": 4}, *size, 0.5, {"a": torch.arange(4)})
    path = page.write_run(report, [report], {}, tmp_path / "run.html", "Run")
    root = read(path)
    (tile,) = (t for t in root.one(class_="tiles").all("div") if t.one("dt").text == "Latency")
    assert tile.one("dd").text == "1.25 msof 2.5 ms, 2.00x fewer"
    assert root.table("Values at the end of each epoch")["3"][3] == "1.25 ms"


@pytest.mark.parametrize("values", [[], [1.0, 2.0], [1.0] * 5])
def test_series_of_another_length_are_refused_and_nothing_is_written(tmp_path: Path, values: list[float]) -> None:
    _, pruner = run()
    with pytest.raises(ValueError, match=rf"'accuracy'\] has {len(values)} values, but there were 4 steps"):
        pruner.html(tmp_path / "run.html", series={"accuracy": values})
    assert not (tmp_path / "run.html").exists()


def test_a_run_without_steps_has_a_page(tmp_path: Path) -> None:
    model, inputs = CASES["mlp"].build()
    root = read(pruner_for(model, inputs).html(tmp_path / "run.html", series={"accuracy": []}))
    assert not root.all("figure")
    assert "0.0% of the neurons" in root.one("header").text


def test_a_resumed_run_compares_with_the_dense_model_though_its_history_is_short(tmp_path: Path) -> None:
    _, pruner = run(events=3)
    model, inputs = CASES["residual"].build()
    resumed = pruner_for(model, inputs, target=0.6, events=3)
    resumed.load_state_dict(pruner.state_dict())
    resumed.step()
    root = read(resumed.html(tmp_path / "run.html"))
    assert tiles(root) == tiles(read(pruner.html(tmp_path / "whole.html")))
    listed = root.table("Original positions of the channels.*")
    assert {n: positions(c[0]) for n, c in listed.items()} == {n: pruner.survivors[n].tolist() for n in listed}
    assert list(root.table("Values at the end of each epoch")) == ["5"]
    sparsity = root.all("figure")[0]
    assert [g.one("title").text for g in sparsity.all("g")] == [
        f"epoch {epoch}: {pruner.sparsity:.1%}" for epoch in (4, 5)
    ]


# ---------------------------------------------------------------- any model


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(names=st.lists(TEXTS.filter(lambda s: s.strip() == s != ""), min_size=1, max_size=4, unique=True), why=TEXTS)
def test_names_and_reasons_are_shown_as_they_are_and_break_nothing(tmp_path: Path, names: list[str], why: str) -> None:
    widths, size = dict.fromkeys(names, 4), Size(8, 100, 1000)
    removed = {name: torch.tensor([1]) for name in names}
    report = PruneReport(1, widths, widths, size, size, 0.0, removed, why, dict.fromkeys(names[:1], why))
    root = read(page.write_run(report, [report], {names[0]: [1.0]}, tmp_path / "run.html", names[0]))
    plain = read(page.write_run(_plainly_named(report), [report], {"a": [1.0]}, tmp_path / "plain.html", "a"))
    layers = list(root.table("Output channels of each layer"))
    assert layers == [f"{names[0]} frozen (1)", *names[1:]]
    assert [s.attributes["aria-label"] for s in root.all("svg", class_="strip")] == [
        f"{name}: 3 of 4 channels left" for name in names
    ]
    assert root.one("dl", class_="reasons").one("dt").text == f"(1) {why}"
    assert root.one("head").one("title").text == names[0]

    def skeleton(root: Element) -> list[str]:
        return [e.tag for e in root.one("main").all() if e.tag != "wbr"]

    assert skeleton(root) == skeleton(plain)


def _plainly_named(report: PruneReport) -> PruneReport:
    plain = {name: f"layer{i}" for i, name in enumerate(report.widths_before)}
    widths = {plain[name]: width for name, width in report.widths_before.items()}
    removed = {plain[name]: gone for name, gone in report.removed.items()}
    frozen = {plain[name]: "why" for name in report.frozen}
    return PruneReport(1, widths, widths, report.before, report.after, 0.0, removed, "why", frozen)


def huge(layers: int = 300, width: int = 4096) -> PruneReport:
    """Report on a run that took every other channel or so of a very large model."""
    names = [f"backbone.encoder.layers.{i}.feed_forward.intermediate.dense" for i in range(layers)]
    generator = torch.Generator().manual_seed(0)
    removed = {name: (torch.rand(width, generator=generator) < 0.5).nonzero().flatten() for name in names}
    after = {name: width - len(gone) for name, gone in removed.items()}
    neurons = layers * width
    sizes = Size(neurons, 7_000_000_000, 7_000_000_000_000), Size(sum(after.values()), 3_500_000_000, 10**12)
    frozen = {f"decoder.{i}": f"reason {i % 3}" for i in range(layers)}
    return PruneReport(100, dict.fromkeys(names, width), after, *sizes, 0.5, removed, frozen=frozen)


@pytest.mark.parametrize("whole", [False, True], ids=["step", "run"])
def test_pages_of_huge_models_stay_small_and_say_where_they_leave_something_out(tmp_path: Path, whole: bool) -> None:
    report, path = huge(), tmp_path / "huge.html"
    if whole:
        page.write_run(report, [report] * 100, {"accuracy": [float(i) for i in range(100)]}, path, "Huge")
    else:
        report.html(path)
    assert path.stat().st_size < 1_000_000
    root = read(path)
    assert len(root.table("Output channels of each layer")) == 300
    listed = root.table("Original positions.*" if whole else "Channels that went.*")
    for name, cells in listed.items():
        written, _, rest = cells[-1].rpartition(", and ")
        total = 4096 - len(report.removed[name]) if whole else len(report.removed[name])
        assert len(positions(written)) + number(rest.removesuffix(" more")) == total


@given(st.lists(st.booleans(), min_size=1, max_size=600), st.integers(1, 40))
def test_ranges_name_every_position_or_say_how_many_they_do_not(stays: list[bool], limit: int) -> None:
    given = [i for i, s in enumerate(stays) if s]
    text = page.ranges(torch.tensor(given, dtype=torch.long), limit)
    written, _, rest = text.partition("and ")
    read = positions(written.rstrip(", ")) if written.strip(", ") not in ("", "none") else []
    assert read == given[: len(read)]
    assert len(read) + (number(rest.removesuffix(" more")) if rest else 0) == len(given)


@settings(max_examples=50)
@given(st.integers(257, 2000), st.floats(0, 1), st.integers(0, 10**6))
def test_pictures_of_wide_layers_are_the_fuller_the_more_channels_are_left(width: int, left: float, seed: int) -> None:
    stays = torch.rand(width, generator=torch.Generator().manual_seed(seed)) < left
    drawn = parsed(page.strip(stays, "wide", 256)).one("svg")
    assert drawn.attributes["viewbox"] == "0 0 256 1"
    shades = [0.0] * 256
    for path in drawn.all("path"):
        for start, length in re.findall(r"M(\d+) 0h(\d+)", path.attributes["d"]):
            for i in range(int(start), int(start) + int(length)):
                assert shades[i] == 0.0
                shades[i] = float(path.attributes.get("opacity", 1))
    cells: list[list[bool]] = [[] for _ in shades]
    for channel, stay in enumerate(stays.tolist()):
        cells[channel * 256 // width].append(stay)
    assert shades == [math.ceil(4 * sum(cell) / len(cell)) / 4 for cell in cells]


def test_an_empty_layer_of_survivors_is_said_to_have_none() -> None:
    nothing: Tensor = torch.tensor([], dtype=torch.long)
    assert page.ranges(nothing, 3) == "none"
