"""HTML that is escaped by construction: only what is Html already is taken as it is."""

import html
from collections.abc import Iterable
from typing import TypeAlias

VOID = {"br", "col", "img", "link", "meta"}


class Html(str):
    """Text that is HTML already."""

    __slots__ = ()


Child: TypeAlias = "str | int | Iterable[Child] | None"


def element(name: str, /, *children: Child, **attributes: object) -> Html:
    """An element: element("td", "a < b", class_="wide", data_name="x", hidden=True).

    None among the children, and attributes that are None or False, are left out; an underscore is a hyphen.
    """
    written = [name]
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        key = key.rstrip("_").replace("_", "-")
        written.append(key if value is True else f'{key}="{html.escape(str(value))}"')
    opened = f"<{' '.join(written)}>"
    return Html(opened if name in VOID else f"{opened}{join(children)}</{name}>")


def join(children: Iterable[Child]) -> Html:
    """Children one after another."""
    parts: list[str] = []
    for child in children:
        if isinstance(child, Html):
            parts.append(child)
        elif isinstance(child, str | int):
            parts.append(html.escape(str(child)))
        elif child is not None:
            parts.append(join(child))
    return Html("".join(parts))


def table(head: Iterable[Child], rows: Iterable[Iterable[Child]], *, label: str, class_: str | None = None) -> Html:
    """A table in a box of its own, in which it scrolls where it is wider than the page. label: what it is, for those
    who can't see it. A row's first cell is its head; a row may also be a <tr> already."""
    columns = element("thead", element("tr", [element("th", cell, scope="col") for cell in head]))
    body = element("tbody", [row if isinstance(row, Html) else _row(row) for row in rows])
    return scroll(element("table", columns, body, class_=class_), label)


def scroll(wide: Html, label: str) -> Html:
    """A box in which `wide` scrolls: by the keyboard too, which is why it can be focused and has a name."""
    return element("div", wide, class_="scroll", tabindex=0, role="region", aria_label=label)


def _row(cells: Iterable[Child]) -> Html:
    first, *others = cells
    return element("tr", element("th", first, scope="row"), [element("td", cell) for cell in others])
