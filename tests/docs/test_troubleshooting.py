"""Whatever the library says to its users, the page on troubleshooting explains, in the same words."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text("utf-8")

# Sentences in the code that are not addressed to users.
NO_MESSAGES = {
    "Full backward hook is firing when gradients are computed",  # a warning of torch, which is silenced
    "outside lower left",  # a place in a picture
    # What a torch.fx.Tracer says of code that it cannot follow, put into a reason that is on the page.
    "symbolically traced variables cannot be used as inputs to control flow",
    "… cannot be run without data: …",
    "it asks for the kind of device",
}

# Files that are made of sentences, on pages and in a terminal; of these, what is raised and warned counts.
WRITERS = {
    "kfac_flat/command_line.py",
    "kfac_flat/page/charts.py",
    "kfac_flat/page/markup.py",
    "kfac_flat/pruning/inspection.py",
    "kfac_flat/pruning/inspection_page.py",
    "kfac_flat/pruning/page.py",
}


def messages(source: str, raised_only: bool = False) -> set[str]:
    """Return all that a file may say: what is raised and warned, and whatever else in it reads like a sentence.

    What is put in when a message is made is written as "…".
    """
    tree = ast.parse(source)
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    said = {_written(part) for text in _said(tree) for part in _parts(text)}
    if raised_only:
        return said
    other = {_written(text) for text in _texts(tree) if id(text) not in docstrings}
    return (said | {text for text in other if _is_sentence(text)}) - NO_MESSAGES


def _said(tree: ast.AST) -> Iterator[ast.expr]:
    """Yield what is raised, and what warnings are given."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            yield from node.exc.args
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("warnings.warn", "warn_user"):
            yield node.args[0]


def _parts(said: ast.expr) -> Iterator[ast.expr]:
    """Yield the texts that a message is put together from."""
    if isinstance(said, ast.BinOp):
        yield from (*_parts(said.left), *_parts(said.right))
    elif _is_text(said):
        yield said


def _texts(node: ast.AST) -> Iterator[ast.expr]:
    """Yield the texts below a node, each whole, and those that are put into them."""
    if isinstance(node, ast.expr) and _is_text(node):
        yield node
    for child in ast.iter_child_nodes(node):
        if not (isinstance(node, ast.JoinedStr) and isinstance(child, ast.Constant)):
            yield from _texts(child.value if isinstance(child, ast.FormattedValue) else child)


def _is_text(node: ast.expr) -> bool:
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str))


def _is_sentence(text: str) -> bool:
    """Tell English from what is meant for computers, such as the names of axes."""
    return len(re.findall(r"(?<![\w.])[a-zA-Z']{2,}(?= )", text)) > 1 and not re.fullmatch(
        r"[\w ().]+->[\w ().]+", text
    )


def _written(text: ast.expr) -> str:
    parts = text.values if isinstance(text, ast.JoinedStr) else [text]
    return collapsed("".join(part.value if isinstance(part, ast.Constant) else "…" for part in parts))


def collapsed(text: str) -> str:
    return " ".join(text.split())


FILES = {
    str(path.relative_to(ROOT)): path.read_text("utf-8")
    for package in ("kfac_flat", "baselines")
    for path in sorted((ROOT / package).rglob("*.py"))
}
SAID = [(file, message) for file, text in FILES.items() for message in sorted(messages(text, file in WRITERS))]


@pytest.mark.parametrize("file", sorted({file for file, _ in SAID}))
def test_every_error_warning_and_reason_is_on_the_page(file: str) -> None:
    page = collapsed(PAGE)
    missing = [message for said_in, message in SAID if said_in == file and message not in page]
    assert not missing, "docs/troubleshooting.md does not explain:\n" + "\n".join(missing)


def test_the_page_explains_no_message_that_there_is_not() -> None:
    quoted = re.findall(r"^(?:\| )?(`+) ?(.+?) ?\1(?:$| \|)", PAGE, re.MULTILINE)
    assert quoted
    assert {text for _, text in quoted} <= {message for _, message in SAID}


def test_all_writers_are_there() -> None:
    assert FILES.keys() >= WRITERS


def test_messages_are_found_wherever_they_are_made() -> None:
    source = '''
def f(x):
    """A docstring of many words."""
    if x:
        raise ValueError(f"x={x!r} must be " "positive" + f": give {', '.join(x)}")
    warnings.warn("beware" + "; ".join(f"{a} of all the dogs" for a in x), stacklevel=2)
    why = {"a": "is not called by itself", "b": "no_sentence"}
    raise KeyError("no")
'''
    assert messages(source) == {
        "x=… must be positive",
        ": give …",
        "beware",
        "… of all the dogs",
        "is not called by itself",
        "no",
    }
    assert messages(source, raised_only=True) == {"x=… must be positive", ": give …", "beware", "no"}
