"""Every function on the page of equations exists, in the file that it is linked to, and holds the line shown."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from pkgutil import resolve_name

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "equations.md").read_text("utf-8")
SHOWN = re.findall(r"^\[([\w.]+)\]\(\.\./([\w/.]+)\): ``(.+)``$", PAGE, re.MULTILINE)


def collapsed(text: str) -> str:
    return " ".join(text.split())


def test_every_equation_has_a_function() -> None:
    equations = re.findall(r"^\$\$\n.+?\n\$\$\n\n\[", PAGE, re.MULTILINE | re.DOTALL)
    assert len(equations) == len(SHOWN) == PAGE.count("\n$$\n\n") > 40


@pytest.mark.parametrize(("name", "file", "line"), SHOWN, ids=[f"{name}-{i}" for i, (name, _, _) in enumerate(SHOWN)])
def test_the_function_of_an_equation_holds_the_line_shown(name: str, file: str, line: str) -> None:
    function = inspect.unwrap(resolve_name(name))
    assert Path(inspect.getfile(function)) == ROOT / file
    assert collapsed(line) in collapsed(inspect.getsource(function))
