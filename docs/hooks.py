"""MkDocs hooks: tables of each command's options from its --help, and pages for linked source files."""

import os
import posixpath
import re
import subprocess
import sys
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r"\]\(((?:\.\./)+[^)#\s]+)")
HELP = re.compile(r"^<!-- options of ([a-z ]+) -->$", flags=re.MULTILINE)
LANGUAGES = {".py": "python", ".cu": "cuda", ".cuh": "cuda", ".cpp": "cpp", ".h": "cpp", ".yaml": "yaml"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add a page for each file outside docs/ that a page links to, so that the link works on the site too."""
    for page in list(files.documentation_pages()):
        for target in LINK.findall(page.content_string):
            path = _in_repository(page, target)
            source = f"source/{path}.md"
            if path is not None and (ROOT / path).is_file() and files.get_file_from_path(source) is None:
                text = (
                    f"---\nsearch:\n  exclude: true\nhide: [toc]\n---\n# {path}\n\n"
                    f"````{LANGUAGES.get(Path(path).suffix, 'text')}\n{(ROOT / path).read_text()}\n````\n"
                )
                files.append(File.generated(config, source, content=text, inclusion=InclusionLevel.NOT_IN_NAV))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Fill in the options of commands, and point links that leave docs/ to the pages of `on_files`."""

    def to_site(match: re.Match[str]) -> str:
        path = _in_repository(page.file, match[1])
        if path is None or not (ROOT / path).is_file():
            return match[0]
        return "](" + posixpath.relpath(f"source/{path}.md", posixpath.dirname(page.file.src_uri) or ".")

    return LINK.sub(to_site, HELP.sub(lambda match: options_table(match[1]), markdown))


def options_table(command: str) -> str:
    """The options of `python -m fastsimclr.COMMAND` as Markdown tables, one for each group of its --help."""
    environment = os.environ | {"COLUMNS": "1000", "PYTHONPATH": str(ROOT)}
    arguments = [sys.executable, "-m", *f"fastsimclr.{command}".split(), "--help"]
    done = subprocess.run(arguments, env=environment, cwd=ROOT, capture_output=True, text=True)
    options = re.sub(r"^usage: .*?\n\n", "", done.stdout, count=1, flags=re.DOTALL)
    lines: list[str] = []
    for line in options.splitlines():
        if heading := re.fullmatch(r"(\S.*):", line):
            lines += [
                "",
                f"**{heading[1]}**" if heading[1] != "options" else "",
                "",
                "| option | description |",
                "|---|---|",
            ]
        elif option := re.fullmatch(r"  ([-\w]\S*(?: ?[^ ]+)*?)(?:  +(.*))?", line):
            lines.append(f"| {_flag(option[1])} | {_cell(option[2] or '')} |")
        elif (more := re.fullmatch(r" {20,}(.*)", line)) and lines and lines[-1].startswith("| "):
            lines[-1] = f"{lines[-1].removesuffix('|').rstrip()} {_cell(more[1])} |"
    if done.returncode or not any(line.startswith("| `--") for line in lines):
        raise PluginError(f"{' '.join(arguments)}: no options in its output\n{done.stdout}{done.stderr}")
    table = "\n".join(line for line in lines if not line.startswith("| `-h`"))
    return re.sub(r"\(type: Literal\[.*?\], ", "(", table) + "\n"  # the choices are beside the option


def _flag(option: str) -> str:
    """`--format {a,b}` unchanged; `--data.workers WORKERS` without its placeholder, which repeats the name."""
    name, _, value = option.replace("-h, ", "-h ").replace("\b", "").partition(" ")
    if value.upper() == value and value.lower() == name.rpartition(".")[2].lstrip("-"):
        value = ""
    return f"`{name}`" + (f" `{value}`" if value else "")


def _cell(text: str) -> str:
    return text.replace("|", r"\|").replace("<", r"\<").replace("*", r"\*").replace("_", r"\_")


def _in_repository(page: File, target: str) -> str | None:
    """The path in the repository that a page's link leads to; None for a path inside docs/ or outside both."""
    path = PurePosixPath(posixpath.normpath(posixpath.join("docs", posixpath.dirname(page.src_uri), target)))
    return None if path.parts[0] in ("docs", "..") else str(path)
