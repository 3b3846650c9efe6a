"""A Griffe extension that turns this package's docstrings into Markdown.

They are written to be read in an editor: a line `name: text` for a parameter, and indented formulas. In Markdown the
lines would run together.
"""

import re
from typing import Any

import griffe

ENTRY = re.compile(r"(\w+(?:, \w+)*): +(.*)")


class Docstrings(griffe.Extension):
    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None and obj.docstring.value:
            obj.docstring.value = to_markdown(obj.docstring.value)

    def on_class_members(self, *, cls: griffe.Class, **_: Any) -> None:
        """Describe the fields of a dataclass or named tuple in one table of the class's own docstring."""
        fields = [
            member
            for member in cls.members.values()
            if isinstance(member, griffe.Attribute) and member.annotation is not None and member.docstring is not None
        ]
        if fields and cls.docstring is not None:
            rows = [["field", "default", "description"], ["---"] * 3]
            rows += [[f"`{field.name}`", _default(field), _one_line(field)] for field in fields]
            if not any(field.value for field in fields):
                rows = [[name, text] for name, _, text in rows]
            cls.docstring.value += "\n\n" + "\n".join(f"| {' | '.join(row)} |" for row in rows)


def to_markdown(text: str) -> str:
    """Parameters become a list, and indented lines below ordinary ones a code block."""
    lines: list[str] = []
    state = "text"  # of the line before: text, entry or code
    for line in text.splitlines():
        indented = line.startswith("    ")
        if not line.strip():
            state = "text"
        elif indented and state == "text":
            lines.append("")
            state = "code"
        elif not indented:
            entry = ENTRY.fullmatch(line)
            continues = state == "entry" and line[0].islower()
            if (entry and state != "entry") or (not entry and state != "text" and not continues):
                lines.append("")
            if entry:
                names = ", ".join(f"`{name}`" for name in entry[1].split(", "))
                line = f"- {names}: {entry[2]}"
            state = "entry" if entry or continues else "text"
        lines.append(line)
    return "\n".join(lines)


def _default(field: griffe.Attribute) -> str:
    return f"`{field.value}`" if field.value is not None else ""


def _one_line(field: griffe.Attribute) -> str:
    assert field.docstring is not None
    return " ".join(field.docstring.value.split()).replace("|", r"\|")
