"""Random command lines and YAML files of every command end with exit code 0 or 2, in time, and never in a traceback."""

import contextlib
import io
import os
import re
import time
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from fastsimclr.cli import COMMANDS, main
from fastsimclr.evaluation.config import PROTOCOLS

EXAMPLES = 10_000 if os.environ.get("FAULTS") == "long" else 40
SECONDS = 20
NUMBERS = [
    "0",
    "1",
    "-1",
    "1.5",
    "1e400",
    "-1e400",
    ".inf",
    ".nan",
    "nan",
    "1_000",
    "0x10",
    "9" * 400,
    "1e-320",
    "2**3",
]
TEXTS = [
    "",
    "none",
    "null",
    "true",
    "auto",
    "[]",
    "[1]",
    "[1, 2]",
    "{}",
    "{a: 1}",
    "[",
    "!!python/name:os.system",
    "a: b",
]
PATHS = [
    "nowhere",
    "/",
    "/dev/null",
    "/proc/self/mem",
    "x" * 5000,
    "a\0b",
    "caf\udce9",
    "\n",
    "~",
    "s3:/",
    "*.tar",
    "-",
]
COMMAND_LINES = [[name] for name in COMMANDS if name != "evaluate"] + [["evaluate", name] for name in PROTOCOLS]
LAST = {  # options that end each command before it works on images; options that follow override earlier ones
    "train": ["--data.train=nowhere"],
    "evaluate": ["--checkpoint=nowhere"],
    "embed": ["--checkpoint=nowhere", "--data=nowhere"],
    "export": ["--checkpoint=nowhere", "--format=onnx", "--output=out"],
    "preview": ["--data=nowhere"],
    "shard": ["--output=out"],
    "report": ["nowhere"],
    "doctor": ["--data=nowhere"],
}
values = st.sampled_from(NUMBERS + TEXTS + PATHS) | st.floats().map(str) | st.integers().map(str) | st.text(max_size=8)


@cache
def options(*command: str) -> list[str]:
    """Return every option in the --help of a command."""
    with contextlib.redirect_stdout(io.StringIO()) as text:
        exit_code([*command, "--help"])
    return sorted(set(re.findall(r"--[a-z][\w.]*", text.getvalue())) - {"--help", "--print_config"})


def nested(option: str, value: Any) -> dict[str, Any]:
    """Return the YAML of an option: {"optim": {"lr": value}} of --optim.lr."""
    for name in reversed(option.removeprefix("--").split(".")):
        value = {name: value}
    return value  # type: ignore[no-any-return]


@pytest.mark.slow
@settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate],  # shrinking runs hundreds of commands
    suppress_health_check=list(HealthCheck),
)
@given(data=st.data())
def test_random_options_end_in_one_line(
    data: st.DataObject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    command = data.draw(st.sampled_from(COMMAND_LINES))
    names = st.sampled_from(options(*command))
    arguments = list(command)
    if data.draw(st.booleans()) and command[0] in ("train", "evaluate", "preview"):
        content = data.draw(
            st.builds(
                lambda name, value: yaml.safe_dump(nested(name, value)).encode(), names, st.floats() | st.integers()
            )
            | st.builds(
                lambda name, value: f"{name.removeprefix('--')}: {value}".encode("utf-8", "replace"), names, values
            )
            | values.map(lambda value: value.encode("utf-8", "surrogateescape") if value.isascii() else b"\xff")
            | st.binary(max_size=20)
        )
        Path("random.yaml").write_bytes(content)
        arguments.append("--config=random.yaml")
    for name in data.draw(st.lists(names, max_size=3)):
        value = data.draw(values)
        arguments += [f"{name}={value}"] if data.draw(st.booleans()) else [name, value]
    arguments += LAST[command[0]]
    start = time.monotonic()
    code = exit_code(arguments)
    assert time.monotonic() - start < SECONDS, arguments
    errors = capsys.readouterr().err
    assert code in (0, 2), arguments
    assert code == 0 or errors.count("\n") == 1, (arguments, errors)


def exit_code(arguments: list[str]) -> int:
    try:
        return main(arguments)
    except SystemExit as end:  # --help and --version
        return end.code if isinstance(end.code, int) else 1
