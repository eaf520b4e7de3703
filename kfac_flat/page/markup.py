"""HTML from plain values: whatever is not markup already is escaped, so that no name can break a page."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from importlib import resources

_VOID = ("meta", "link", "wbr")  # elements that have no end tag
_LOADS_NOTHING = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


class Markup(str):
    """Text that is HTML."""

    __slots__ = ()


def element(name: str, /, *content: str, **attributes: str | float | None) -> Markup:
    """Write an element; content that is no :class:`Markup`, and all attributes, are escaped.

    Args:
        name: Of the element.
        content: Text and markup inside it.
        attributes: Those that are None are left out. ``class_`` is written as class, ``aria_label`` as aria-label.

    Example:
        >>> element("p", "a < b", element("b", "!"), class_="note", title=None)
        '<p class="note">a &lt; b<b>!</b></p>'
    """
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Markup(f"<{name}{written}>{joined(content)}" + ("" if name in _VOID else f"</{name}>"))


def joined(content: Iterable[str], between: str = "") -> Markup:
    """Put texts and markup one after the other."""
    return Markup(between.join(c if isinstance(c, Markup) else escape(c, quote=False) for c in content))


def dotted(name: str) -> Markup:
    """Write a module's name, which may go on in a new line behind each dot and colon.

    Example:
        >>> dotted("block.conv")
        'block.<wbr>conv'
    """
    return joined(re.split(r"(?<=[.:])(?=.)", name), element("wbr"))


@dataclass(frozen=True)
class Column:
    """A column of a table: what stands above it, and how what stands in it is set: "text", "number" or "wide"."""

    title: str
    kind: str = "number"


def table(caption: str, columns: Sequence[Column], rows: Iterable[Sequence[str]]) -> Markup:
    """Write a table whose first column names the rows. Where it is wider than the page, it is moved by itself."""
    head = (element("th", c.title, scope="col", class_=c.kind) for c in columns)
    body = (
        element(
            "tr",
            *(
                element("td", cell, class_=c.kind) if i else element("th", cell, scope="row", class_=c.kind)
                for i, (c, cell) in enumerate(zip(columns, row, strict=True))
            ),
        )
        for row in rows
    )
    inside = element(
        "table",
        element("caption", caption),
        element("thead", element("tr", *head)),
        element("tbody", joined(body, "\n")),
    )
    return element("div", inside, class_="scroll", tabindex=0, role="region", aria_label=caption)


def details(summary: str, *content: str) -> Markup:
    """Write something that is shown when it is asked for."""
    return element("details", element("summary", summary), *content)


@dataclass(frozen=True)
class Section:
    """A part of a page: its heading, the anchor by which it is reached, and what stands in it."""

    anchor: str
    heading: str
    content: Markup


def page(title: str, lead: Markup, sections: Sequence[Section], made_by: str) -> str:
    """Write a page that needs nothing from outside.

    Args:
        title: Stands above it and in the browser's tab.
        lead: What to know first.
        sections: The parts, linked to at the top.
        made_by: Stands at the end.
    """
    style = resources.files(__package__).joinpath("style.css").read_text(encoding="utf-8")
    links = (element("li", element("a", s.heading, href=f"#{s.anchor}")) for s in sections)
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=_LOADS_NOTHING),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("link", rel="icon", href="data:,"),
        element("title", title),
        element("style", Markup(style)),
    )
    body = element(
        "body",
        element("a", "Skip to the content", href="#content", class_="skip"),
        element(
            "header",
            element("h1", dotted(title)),
            lead,
            element("nav", element("ul", *links), aria_label="Parts of this page"),
        ),
        element("main", joined(map(_section, sections), "\n"), id="content", tabindex=-1),
        element("footer", element("p", made_by)),
    )
    return f"<!doctype html>\n{element('html', head, body, lang='en')}\n"


def _section(section: Section) -> Markup:
    heading = f"{section.anchor}-heading"
    return element(
        "section",
        element("h2", section.heading, id=heading),
        section.content,
        id=section.anchor,
        aria_labelledby=heading,
    )
