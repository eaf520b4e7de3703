"""HTML is written so that whatever names hold, the page says just that."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kfac_flat.page.markup import Column, Markup, Section, details, dotted, element, page, table
from tests.page.reading import parsed

# What text in HTML can hold; of control characters only those of a line.
TEXTS = st.text(st.characters(exclude_categories=("Cs", "Cc")), max_size=30) | st.sampled_from(
    ["<script>alert(1)</script>", "a & b", "&amp;", "\"'", "</td></table>", "-->", "]]>", "&lt", "a.b.c", "..", "a:b"]
)


@given(TEXTS, TEXTS)
def test_text_and_attributes_are_read_back_as_they_were_given(text: str, attribute: str) -> None:
    root = parsed(element("p", text, element("b", text), title=attribute))
    paragraph = root.one("p")
    assert paragraph.text == text + text
    assert paragraph.attributes == {"title": attribute}
    assert [e.tag for e in root.all()] == ["p", "b"]


@given(TEXTS)
def test_names_may_be_broken_behind_dots_and_colons_and_are_not_changed(name: str) -> None:
    root = parsed(element("p", dotted(name)))
    assert root.text == name
    pieces = [part for part in root.one("p").content if isinstance(part, str)]
    assert all(piece[-1] in ".:" for piece in pieces[:-1])
    assert not any(character in piece[:-1] for piece in pieces for character in ".:")


@given(st.dictionaries(TEXTS, TEXTS, max_size=4), TEXTS)
def test_tables_are_read_back_cell_by_cell(cells: dict[str, str], title: str) -> None:
    written = table(title, [Column(title, "text"), Column("value")], [[name, value] for name, value in cells.items()])
    root = parsed(written)
    rows = [row.all("th") + row.all("td") for row in root.one("tbody").all("tr")]
    assert [[cell.text for cell in row] for row in rows] == [[name, value] for name, value in cells.items()]
    assert root.one("caption").text == title
    assert [h.text for h in root.all("th", scope="col")] == [title, "value"]
    assert [h.text for h in root.all("th", scope="row")] == list(cells)
    assert root.one("div").attributes["aria-label"] == title


@given(TEXTS, TEXTS)
def test_a_page_is_one_well_formed_document(title: str, text: str) -> None:
    sections = [Section(f"s{i}", text, details(text, element("p", text))) for i in range(2)]
    root = parsed(page(title, Markup(""), sections, text))
    assert root.one("title").text == title
    assert root.one("h1").text == title
    assert [h.text for h in root.all("h2")] == [text, text]
    assert [a.attributes["href"] for a in root.one("nav").all("a")] == ["#s0", "#s1"]
    policy = root.one("meta", http_equiv="Content-Security-Policy").attributes["content"].split("; ")
    assert policy[0] == "default-src 'none'"
    assert [e.tag for e in root.one("body").content if not isinstance(e, str)] == ["a", "header", "main", "footer"]
