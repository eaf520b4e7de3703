"""The documentation builds without a warning or a network, and its code runs and prints what the pages say."""

from __future__ import annotations

import contextlib
import io
import os
import re
import subprocess
import sys
from doctest import ELLIPSIS, NORMALIZE_WHITESPACE, OutputChecker
from pathlib import Path
from typing import Any

import pytest
from sybil import Example, Sybil
from sybil.parsers.myst import CodeBlockParser, PythonCodeBlockParser

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
SOURCES = {str(path.relative_to(DOCS)): path.read_text("utf-8") for path in sorted(DOCS.rglob("*.md"))}
PAGES_WITH_CODE = [page for page, text in SOURCES.items() if "```python" in text]
SHARED = "howto/index.md"  # the other pages of its folder go on from its code

EXAMPLES = [path.name for path in sorted((ROOT / "examples").glob("*.py")) if "def main(" in path.read_text("utf-8")]


# ---------------------------------------------------------------- the pages' code


def compare_output(example: Example) -> str | None:
    """Say what the code before has printed, if it is not this block; an ellipsis in it stands for anything."""
    shown, printed = str(example.parsed), example.namespace["printed"].getvalue()
    return None if alike(shown, printed) else f"the page shows\n{shown}\nbut its code prints\n{printed}"


def compare_words(example: Example) -> str | None:
    """The same where numbers differ from machine to machine, as after a training."""
    shown, printed = str(example.parsed), example.namespace["printed"].getvalue()
    same = alike(NUMBER.sub("0", shown), NUMBER.sub("0", printed))
    return None if same else f"but for its numbers, the page shows\n{shown}\nbut its code prints\n{printed}"


def alike(shown: str, printed: str) -> bool:
    return OutputChecker().check_output(shown, printed, ELLIPSIS | NORMALIZE_WHITESPACE)


NUMBER = re.compile(r"\d[\d,]*(\.\d+)?")
READER = Sybil(
    [
        PythonCodeBlockParser(doctest_optionflags=ELLIPSIS),
        CodeBlockParser("output", compare_output),
        CodeBlockParser("output varies", compare_words),
    ]
)


def run(page: str, namespace: dict[str, Any]) -> None:
    """Run the code blocks of a page from top to bottom, and compare what they print with the output blocks below."""
    document = READER.parse(DOCS / page)
    document.namespace = namespace
    for example in document.examples():
        if example.region.evaluator not in (compare_output, compare_words):
            namespace["printed"] = io.StringIO()
        with contextlib.redirect_stdout(namespace["printed"]):
            example.evaluate()


# torch's own exporter still does what torch's own pytree deprecates.
@pytest.mark.filterwarnings(r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated:FutureWarning")
@pytest.mark.parametrize("page", PAGES_WITH_CODE)
def test_the_code_of_a_page_runs_and_prints_what_the_page_shows(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {"__name__": "__main__"}
    if page.startswith("howto/") and page != SHARED:
        run(SHARED, namespace)
    run(page, namespace)


# ---------------------------------------------------------------- the site


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the site where nothing can be fetched, warnings being errors."""
    built = tmp_path_factory.mktemp("site")
    nowhere = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    command = [sys.executable, "-m", "sphinx", "--fail-on-warning", "--keep-going", "--nitpicky", "--quiet"]
    building = subprocess.run(
        [*command, "--doctree-dir", str(built / ".doctrees"), str(DOCS), str(built)],
        env={**os.environ, **nowhere},
        capture_output=True,
        text=True,
        check=False,
    )
    assert building.returncode == 0, building.stderr
    return built


def test_the_site_builds_without_a_warning_and_every_page_is_in_it(site: Path) -> None:
    assert {page.removesuffix(".md") for page in SOURCES} <= {
        str(path.relative_to(site).with_suffix("")) for path in site.rglob("*.html")
    }


def test_a_page_is_read_without_a_network(site: Path) -> None:
    loaded = re.compile(r"""<(?:script|img|iframe)[^>]+src="(?:https?:)?//|<link[^>]+href="(?:https?:)?//|@import""")
    found = {path.name: loaded.findall(path.read_text("utf-8")) for path in site.rglob("*.html")}
    assert not {page: loads for page, loads in found.items() if loads}


@pytest.mark.parametrize("example", EXAMPLES)
def test_an_example_is_linked_from_the_documentation(example: str) -> None:
    assert any(f"/examples/{example})" in text for text in SOURCES.values())
