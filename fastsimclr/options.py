"""Parsing of options: the command line, YAML files and --help are generated from a dataclass's fields."""

import difflib
import re
from argparse import Action
from collections.abc import Iterator, Sequence
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from jsonargparse import ArgumentParser, DefaultHelpFormatter, Namespace, set_parsing_settings

from fastsimclr.errors import UserError
from fastsimclr.presets import preset_file, preset_names

Options = TypeVar("Options")


def parse_as(
    kind: type[Options],
    arguments: Sequence[str],
    program: str,
    about: str,
    *,
    preset: Path | None = None,
    defaults: dict[str, Any] | None = None,
) -> Options:
    """Parse the options of `python -m fastsimclr.{program}` into `kind`.

    kind: dataclass of the options. about: description shown by --help.
    preset: YAML file whose values replace the dataclass's defaults. defaults: the same as a dict, by option name
        ("data.image_size").
    Raises UserError for unknown options and invalid values.
    """
    parser = _parser(kind, program, about, preset)  # type: ignore[arg-type]  # a class is hashable
    try:
        namespace = parser.parse_args(_as_yaml(arguments, kind), namespace=Namespace(defaults or {}))
    except UserError:
        raise
    except Exception as error:  # of YAML or the file, of many types: a number, a date or a nesting that it cannot read
        raise UserError(f"options: got a value that cannot be read ({error}); see {parser.prog} --help") from error
    return _instantiate(kind, parser, namespace)


def from_dict(kind: type[Options], options: dict[str, Any], program: str) -> Options:
    """Return the dataclass `kind` with these options; sections are dicts. The other options have their defaults.

    Raises UserError, whose text has no "--" before an option, for unknown options and invalid values.
    """
    _check_names(options, kind)
    parser = _parser(kind, program, "")  # type: ignore[arg-type]
    try:
        return _instantiate(kind, parser, parser.parse_object(plain(options)))
    except UserError as error:
        raise UserError(str(error).removeprefix("--").removesuffix(f"; see {parser.prog} --help")) from error


def plain(value: Any) -> Any:
    """Convert tuples to lists, as YAML has no tuples."""
    if isinstance(value, dict):
        return {name: plain(item) for name, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value


class _HelpFormatter(DefaultHelpFormatter):
    def _expand_help(self, action: Action) -> str:
        """Show a range after its type: "int at least 1" for Annotated[int, at least 1]."""
        return re.sub(r"Annotated\[(\w+), (.*?)\]", r"\1 \2", super()._expand_help(action))


class _Parser(ArgumentParser):
    def error(self, message: str, ex: Exception | None = None) -> Any:
        """Raise UserError with jsonargparse's multi-line message as one line: the option, what was got and expected."""
        message = " ".join(message.split())
        invalid = re.match(r'Parser key "(.+?)": (.*?)(?:Given value type.*)?(?:Given|Got) value: (.*)', message)
        if invalid:
            option, reason, value = invalid.groups()
            expected = [
                kind or choices
                for kind, choices in re.findall(r"(?:<class '|Annotated\[)(\w+)|Literal\[(.*?)\]", reason)
            ]
            expected = list(dict.fromkeys("none" if kind == "NoneType" else kind for kind in expected))
            raise UserError(f"--{option}: got {value}, expected {' or '.join(expected)}")
        message = re.sub(r'Parser key "(.+?)":', r"--\1:", message)
        raise UserError(f"{message}; see {self.prog} --help")


def _check_names(options: dict[str, Any], kind: type[Any], section: str = "") -> None:
    """Raise UserError for a name that is not a field of the dataclass `kind`, and for a section that is not a dict."""
    known: dict[str, Any] = {f.name: f.default_factory for f in fields(kind)}
    for name, value in options.items():
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=3, cutoff=0.0)
            raise UserError(f"{section}{name}: got an unknown option, expected one such as {', '.join(nearest)}")
        if isinstance(known[name], type):  # the class of a section
            if not isinstance(value, dict):
                raise UserError(f"{name}: got {value!r}, expected a dict of its options")
            _check_names(value, known[name], f"{name}.")


@cache
def _parser(kind: type[Any], program: str, about: str, preset: Path | None = None) -> "_Parser":
    """Return the parser of the options `kind`, a dataclass."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = _Parser(
        prog=f"python -m fastsimclr.{program}",
        description=about,
        formatter_class=_HelpFormatter,
        default_config_files=[str(preset)] if preset else None,
    )
    parser.add_argument(
        "--config",
        action="config",
        help=f"YAML file of options, or a preset: {', '.join(preset_names())}. Options that follow it override it.",
    )
    parser.add_class_arguments(kind, nested_key=None)
    return parser


def _flags(kind: type[Any], prefix: str = "--") -> Iterator[str]:
    """Yield the options of the dataclass `kind` that are true or false; without a value they are true."""
    for f in fields(kind):
        if isinstance(f.default_factory, type):
            yield from _flags(f.default_factory, f"{prefix}{f.name}.")
        elif f.type is bool:
            yield f"{prefix}{f.name}"


def _as_yaml(arguments: Sequence[str], kind: type[Any]) -> list[str]:
    """Translate the arguments for jsonargparse: "none" to null, a bare flag to true, a preset to its file."""
    arguments, flags = list(arguments), set(_flags(kind))
    for position, argument in enumerate(arguments):
        option, _, value = argument.partition("=")
        if argument == "none" or (option.startswith("--") and value == "none"):
            arguments[position] = argument.removesuffix("none") + "null"
        if argument in flags and arguments[position + 1 : position + 2] not in (["true"], ["false"]):
            arguments[position] = f"{argument}=true"
        if option == "--config" and value:
            arguments[position] = f"--config={_config_file(value, kind)}"
        elif position > 0 and arguments[position - 1] == "--config":
            arguments[position] = str(_config_file(argument, kind))
    return arguments


def _config_file(value: str, kind: type[Any]) -> Path:
    """Return the file of --config. Raises UserError for a shape with which jsonargparse fails or that it ignores."""
    import yaml  # here, so that --help does not wait for it

    file = Path(value) if Path(value).is_file() else preset_file(value)
    try:
        options = yaml.safe_load(file.read_text(encoding="utf-8"))
    except Exception as error:  # as in parse_as
        raise UserError(f"--config: got {value}, which cannot be read ({error}); expected YAML in UTF-8") from error
    if not isinstance(options, dict):
        raise UserError(f"--config: got {value} without options, expected lines such as 'epochs: 100'")
    if "config" in options:
        raise UserError(f"--config: got {value} with the option config; expected options of the command only")
    for f in fields(kind):
        if f.name in options and isinstance(f.default_factory, type) and not isinstance(options[f.name], dict):
            raise UserError(f"--config: got {value} with {f.name}: {options[f.name]!r}, expected its options by name")
    return file


def _instantiate(kind: type[Options], parser: _Parser, namespace: Namespace) -> Options:
    values = parser.instantiate(namespace)
    return kind(**{f.name: values[f.name] for f in fields(kind)})  # type: ignore[arg-type]  # a dataclass
