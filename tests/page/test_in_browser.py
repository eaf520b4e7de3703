"""Pages as people use them: on a phone and on a desk, light and dark, by mouse, by keyboard and by ear."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.keys import Keys

from kfac_flat import PruneReport
from kfac_flat.pruning import page
from kfac_flat.pruning.inspection import inspect
from kfac_flat.pruning.inspection_page import write_inspection
from tests.page.browser import Browser
from tests.page.browser import browser as browser
from tests.pruning.nets import CASES
from tests.pruning.test_page import huge, run

PAGES = ("step", "run", "inspection", "huge", "awkward")
SCHEMES = ("light", "dark")
WIDTHS = (360, 1280)


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One page of each kind."""
    paths = {name: tmp_path_factory.mktemp("pages") / f"{name}.html" for name in PAGES}
    _, pruner = run()
    pruner.history[1].html(paths["step"])
    pruner.html(paths["run"], series={"accuracy (%)": [50.0, 70.0, 80.0, 85.0], "rho": [9.0, 3.0, 500.0, 1.0]})
    found = inspect(CASES["residual"].build()[0], CASES["residual"].build()[1], target=0.5)
    write_inspection(found, paths["inspection"], "What can be pruned")
    page.write_run(huge(40), [huge(40)], {"accuracy": [80.0]}, paths["huge"], "Huge")
    report = awkward(pruner.history[0])
    page.write_run(report, [report], {"x" * 90: [1e-30]}, paths["awkward"], "W" * 120)
    return paths


def awkward(report: PruneReport) -> PruneReport:
    """Give layers names, and reasons words, that do not fit any screen."""
    names = {name: f"{name}<b>&\"'{'m' * 150}" for name in report.widths_before}
    return replace(
        report,
        widths_before={names[n]: w * 100_000 for n, w in report.widths_before.items()},
        widths_after={names[n]: w * 100_000 for n, w in report.widths_after.items()},
        before=replace(report.before, macs=10**17),
        after=replace(report.after, macs=10**16),
        frozen={names[n]: "w" * 200 for n in report.frozen},
        removed={names[n]: gone for n, gone in report.removed.items()},
    )


@pytest.fixture(params=PAGES)
def path(request: pytest.FixtureRequest, pages: dict[str, Path]) -> Path:
    return pages[request.param]


def everywhere(browser: Browser, path: Path) -> Iterator[tuple[int, str]]:
    """Open the page on phones and desks, light and dark."""
    for width in WIDTHS:
        for scheme in SCHEMES:
            browser.show(path, width, scheme)
            yield width, scheme


def test_nothing_is_loaded_and_nothing_complained_of(browser: Browser, path: Path) -> None:
    browser.show(path)
    assert browser.messages() == []
    assert set(browser.requests()) <= {path.as_uri(), "data:,"}
    assert path.as_uri() in browser.requests() or browser.run("return document.title")


def test_no_page_is_wider_than_the_screen(browser: Browser, path: Path) -> None:
    for width, scheme in everywhere(browser, path):
        browser.run("for (const d of document.querySelectorAll('details')) d.open = true")
        assert browser.run("return document.documentElement.scrollWidth") <= width, (width, scheme)
        outside = browser.run(
            """return [...document.querySelectorAll('body *:not(.skip)')].filter(
                 e => !e.closest('.scroll *') && e.getBoundingClientRect().right > innerWidth + 1
               ).map(e => e.outerHTML.slice(0, 200))"""
        )
        assert outside == []


def test_the_reader_s_colour_scheme_is_taken(browser: Browser, path: Path) -> None:
    backs = {}
    for scheme in SCHEMES:
        browser.show(path, scheme=scheme)
        backs[scheme] = luminance(browser.run("return getComputedStyle(document.body).backgroundColor"))
    assert backs["light"] > 0.8
    assert backs["dark"] < 0.05


TEXTS = """
const found = [];
for (const e of document.querySelectorAll('body *')) {
  const own = [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim());
  if (!own || e.closest('title')) continue;
  let back = 'rgba(0, 0, 0, 0)';
  for (let a = e; a && back === 'rgba(0, 0, 0, 0)'; a = a.parentElement) back = getComputedStyle(a).backgroundColor;
  const style = getComputedStyle(e);
  const colour = e.closest('svg') ? style.fill : style.color;
  found.push([e.textContent.slice(0, 40), colour, back, parseFloat(style.fontSize)]);
}
return found;
"""


def luminance(colour: str) -> float:
    """Relative luminance [WCAG 2.2]."""
    channels = [int(c) / 255 for c in re.fullmatch(r"rgb\((\d+), (\d+), (\d+)\)", colour).groups()]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one: str, other: str) -> float:
    """Contrast ratio [WCAG 2.2]."""
    dark, light = sorted(map(luminance, (one, other)))
    return (light + 0.05) / (dark + 0.05)


def test_contrast_is_computed_as_the_guidelines_say() -> None:
    assert contrast("rgb(0, 0, 0)", "rgb(255, 255, 255)") == pytest.approx(21)
    assert contrast("rgb(118, 118, 118)", "rgb(255, 255, 255)") == pytest.approx(4.54, abs=0.01)


def test_all_text_stands_out_and_is_large_enough(browser: Browser, path: Path) -> None:
    for width, scheme in everywhere(browser, path):
        texts = browser.run(TEXTS)
        assert len(texts) > 20
        for text, colour, back, size in texts:
            assert contrast(colour, back) >= 4.5, (text, colour, back, width, scheme)
            assert size >= 11, text


def test_what_is_drawn_stands_out(browser: Browser, pages: dict[str, Path]) -> None:
    drawn = {".line": "stroke", ".marks": "stroke", ".strip path": "fill", ".bar i": "backgroundColor"}
    for scheme in SCHEMES:
        browser.show(pages["run"], scheme=scheme)
        card = browser.run("return getComputedStyle(document.querySelector('section')).backgroundColor")
        for selector, property_ in drawn.items():
            colour = browser.run(f"return getComputedStyle(document.querySelector('{selector}')).{property_}")
            assert contrast(colour, card) >= 3, (selector, scheme)
        gone = browser.run("return getComputedStyle(document.querySelector('.strip')).backgroundColor")
        left = browser.run("return getComputedStyle(document.querySelector('.strip path')).fill")
        assert contrast(gone, left) >= 3, scheme


def test_all_that_can_be_used_is_reached_by_tab_in_order_and_shows_it(browser: Browser, path: Path) -> None:
    browser.show(path)
    browser.run("for (const d of document.querySelectorAll('details')) d.open = true")
    wanted = browser.run("return [...document.querySelectorAll('a[href], summary, [tabindex=\"0\"]')]")
    reached = []
    for _ in wanted:
        ActionChains(browser.driver).send_keys(Keys.TAB).perform()
        reached.append(browser.driver.switch_to.active_element)
        outline = browser.run(
            "const s = getComputedStyle(document.activeElement); return s.outlineStyle + s.outlineWidth"
        )
        assert outline == "solid3px"
        assert browser.run(
            "const r = document.activeElement.getBoundingClientRect(); return r.bottom > 0 && r.top < innerHeight"
        )
    assert [e.id for e in reached] == [e.id for e in wanted]


def test_the_skip_link_leads_to_the_content(browser: Browser, pages: dict[str, Path]) -> None:
    browser.show(pages["run"])
    ActionChains(browser.driver).send_keys(Keys.TAB, Keys.ENTER).perform()
    assert browser.run("return document.activeElement.tagName") == "MAIN"
    ActionChains(browser.driver).send_keys(Keys.TAB).perform()
    assert browser.run("return document.activeElement.closest('main') !== null")


def test_details_open_by_keyboard(browser: Browser, pages: dict[str, Path]) -> None:
    browser.show(pages["run"])
    browser.run("document.querySelector('summary').focus()")
    ActionChains(browser.driver).send_keys(Keys.ENTER).perform()
    assert browser.run("return document.querySelector('details').open")


def test_assistive_technology_is_told_of_parts_headings_tables_and_pictures(browser: Browser, path: Path) -> None:
    browser.show(path)
    browser.run("for (const d of document.querySelectorAll('details')) d.open = true")
    told = browser.accessible()
    names: dict[str, list[str]] = {}
    for role, name in told:
        names.setdefault(role, []).append(name)
    for landmark in ("banner", "navigation", "main", "contentinfo"):
        assert len(names[landmark]) == 1
    counts: dict[str, Any] = {
        tag: browser.run(f"return document.querySelectorAll('{tag}').length") for tag in ("table", "svg", "h1", "h2")
    }
    assert counts["h1"] == 1
    assert len(names["heading"]) == 1 + counts["h2"]
    assert len(names.get("image", []) + names.get("img", [])) == counts["svg"]
    assert len(names["table"]) == counts["table"]
    for role in ("image", "img", "table", "region", "heading", "link", "columnheader", "rowheader", "navigation"):
        assert all(name.strip() for name in names.get(role, [])), role
    assert len(names["rowheader"]) == browser.run("return document.querySelectorAll('tbody tr').length")
    assert browser.run("return document.documentElement.lang") == "en"


def test_values_show_under_the_pointer(browser: Browser, pages: dict[str, Path]) -> None:
    browser.show(pages["run"])
    point = browser.run("return document.querySelectorAll('figure g')[2]")
    shown = "return getComputedStyle(document.querySelectorAll('figure g')[2].querySelector('circle')).opacity"
    assert browser.run(shown) == "0"
    ActionChains(browser.driver).move_to_element(point).perform()
    assert browser.run(shown) == "1"


def test_in_print_everything_is_shown_on_white(browser: Browser, pages: dict[str, Path]) -> None:
    browser.show(pages["run"], scheme="dark", medium="print")
    assert browser.run("return getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    heights = browser.run("return [...document.querySelectorAll('details table')].map(t => t.offsetHeight)")
    assert len(heights) == 2
    assert min(heights) > 50
    assert browser.run("return getComputedStyle(document.querySelector('nav')).display") == "none"
