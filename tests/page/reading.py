"""Reading a page as a program does: the standard library's parser, and the rules that HTML sets."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path

VOID = {"meta", "link", "wbr"}


@dataclass
class Element:
    """An element of a page, with what it holds."""

    tag: str
    attributes: dict[str, str]
    content: list[Element | str] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(part if isinstance(part, str) else part.text for part in self.content)

    def all(self, tag: str = "", **attributes: str) -> list[Element]:
        """Elements inside this one, with such attributes."""
        inside = [part for part in self.content if isinstance(part, Element)]
        found = [found for part in inside for found in [part, *part.all()]]
        return [
            e
            for e in found
            if tag in ("", e.tag)
            and all(e.attributes.get(k.rstrip("_").replace("_", "-")) == v for k, v in attributes.items())
        ]

    def one(self, tag: str = "", **attributes: str) -> Element:
        (found,) = self.all(tag, **attributes)
        return found

    def table(self, caption: str) -> dict[str, list[str]]:
        """The cells of the table with this caption, by what names the row."""
        (table,) = [t for t in self.all("table") if re.fullmatch(caption, t.one("caption").text)]
        rows = [[cell.text for cell in row.all() if cell.tag in ("th", "td")] for row in table.one("tbody").all("tr")]
        return {name: cells for name, *cells in rows}


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open = [Element("", {})]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        assert len(set(names)) == len(names), f"<{tag}> has an attribute twice"
        element = Element(tag, {name: value or "" for name, value in attrs})
        self.open[-1].content.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop().tag == tag, f"</{tag}> closes another element"

    def handle_data(self, data: str) -> None:
        self.open[-1].content.append(data)


def parsed(text: str) -> Element:
    """Parse HTML; each element must be closed, in order."""
    reader = _Reader()
    reader.feed(text)
    reader.close()
    assert len(reader.open) == 1, f"<{reader.open[-1].tag}> is not closed"
    return reader.open[0]


def read(path: Path) -> Element:
    """Parse a page, and check that it is whole and needs nothing from outside."""
    text = path.read_text(encoding="utf-8")
    assert text.startswith("<!doctype html>\n")
    root = parsed(text)
    anchors = [e.attributes["id"] for e in root.all() if "id" in e.attributes]
    assert len(set(anchors)) == len(anchors)
    for e in root.all():
        assert e.tag not in ("script", "iframe", "object", "img", "base")
        assert not any(name.startswith("on") for name in e.attributes)
        for name in ("href", "src", "srcset", "action", "xlink:href"):
            link = e.attributes.get(name, "data:,")
            assert link == "data:," or link.removeprefix("#") in anchors, f"<{e.tag} {name}={link}> leads outside"
        for name in ("aria-labelledby", "aria-describedby", "for"):
            assert all(anchor in anchors for anchor in e.attributes.get(name, "").split())
    style = root.one("style").text + "".join(e.attributes.get("style", "") for e in root.all())
    assert "url(" not in style
    assert "@import" not in style
    return root
