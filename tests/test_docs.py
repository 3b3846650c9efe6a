"""The messages, options and public names in docs/ exist in the code."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import fastsimclr
from fastsimclr.cli import COMMANDS
from fastsimclr.config import parse
from fastsimclr.evaluation.config import PROTOCOLS

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
TROUBLESHOOTING = (DOCS / "troubleshooting.md").read_text()
REFERENCE = {page.name: page.read_text() for page in (DOCS / "reference").glob("*.md")}
OTHER_PROGRAMS = {"--nproc-per-node", "--max-restarts", "--ipc", "--shm-size", "--strict"}  # torchrun, docker, mkdocs
OTHER_PROGRAMS |= {"--nnodes", "--rdzv-backend", "--rdzv-endpoint", "--rdzv-id", "--rdzv-conf", "--log-dir"}
OTHER_PROGRAMS |= {"--nodes", "--ntasks", "--ntasks-per-node", "--gpus-per-node", "--cpus-per-task"}  # SLURM
OTHER_PROGRAMS |= {"--time", "--requeue", "--open-mode", "--signal", "--update"}  # SLURM, cp
COMMAND_LINES = [[name] for name in COMMANDS if name != "evaluate"] + [["evaluate", name] for name in PROTOCOLS]


def templates(source: str) -> list[str]:
    """The strings of a Python source, with "…" in place of the values of f-strings."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.JoinedStr):
            found.append("".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.append(node.value)
    return [re.sub("…+", "…", text) for text in found]


def quoted_messages(page: str) -> list[str]:
    """The lines of the code blocks titled fastsimclr; those of other programs have other titles."""
    blocks = re.findall(r'```text title="fastsimclr"\n(.*?)```', page, flags=re.DOTALL)
    return [line.strip() for block in blocks for line in block.splitlines() if line.strip()]


def is_quoted(message: str, template: str) -> bool:
    """Whether `message` is a part of `template`. It may abbreviate the text at its ends, and values, by "…"."""
    return re.search(".+".join(map(re.escape, message.strip("… ").split("…"))), template) is not None


def test_every_quoted_message_is_in_the_source() -> None:
    sources = [*(ROOT / "fastsimclr").rglob("*.py"), ROOT / "setup.py"]
    known = [template for file in sources for template in templates(file.read_text())]
    messages = quoted_messages(TROUBLESHOOTING)
    assert len(messages) >= 20
    missing = [message for message in messages if not any(is_quoted(message, template) for template in known)]
    assert not missing


def test_a_changed_message_is_noticed() -> None:
    (template, *_) = templates('f"{name}: got {len(data)}{unit} bytes, " f"expected {a:.2f} or more"')
    assert template == "…: got … bytes, expected … or more"
    assert is_quoted("… got … bytes, expected … or more", template)
    assert not is_quoted("got … bytes, expected at most …", template)


@pytest.fixture(scope="module")
def options() -> set[str]:
    """Every option of every command, from its --help."""
    found = {"--help", "--version"}
    for name, *protocol in COMMAND_LINES:
        command = [sys.executable, "-m", f"fastsimclr.{name}", *protocol, "--help"]
        text = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=120).stdout
        found.update(re.findall(r"--[a-z][\w.-]*", text))
    return found


@pytest.mark.parametrize("page", sorted(page.name for page in DOCS.glob("*.md")))
def test_every_option_in_the_docs_exists(page: str, options: set[str]) -> None:
    code = re.findall(r"```.*?```|`[^`]+`", (DOCS / page).read_text(), flags=re.DOTALL)
    named = {option.rstrip(".") for text in code for option in re.findall(r"(?<![\w-])--[a-z][\w.-]*", text)}
    assert not named - options - OTHER_PROGRAMS


@pytest.mark.parametrize("page", sorted(page.name for page in DOCS.glob("*.md")))
def test_shell_commands_in_the_docs_are_valid(page: str) -> None:
    for script in re.findall(r"```(?:ba)?sh[^\n]*\n(.*?)```", (DOCS / page).read_text(), flags=re.DOTALL):
        done = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, ""), script


def test_the_manifest_for_kubernetes_is_valid() -> None:
    (manifest,) = re.findall(r"```yaml[^\n]*\n(.*?)```", (DOCS / "cluster.md").read_text(), flags=re.DOTALL)
    job = yaml.safe_load(manifest)
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    pod = job["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["name"] == "pytorch", "the operator sets environment variables in this container only"
    assert [mount["name"] for mount in container["volumeMounts"]] == [volume["name"] for volume in pod["volumes"]]
    assert all(isinstance(variable["value"], str) for variable in container["env"])
    command = container["command"]
    config = parse(command[command.index("fastsimclr.train") + 1 :])
    mounts = {mount["mountPath"] for mount in container["volumeMounts"]}
    assert {str(Path(str(config.output)).parent), str(config.data.local_cache)} < mounts


def test_every_public_name_is_in_the_reference() -> None:
    documented = {name for text in REFERENCE.values() for name in re.findall(r"^::: fastsimclr\.(\S+)$", text, re.M)}
    assert not set(fastsimclr.__all__) - documented


def test_the_options_of_every_command_are_in_the_reference() -> None:
    placeholders = re.findall(r"^<!-- options of ([a-z ]+) -->$", REFERENCE["commands.md"], flags=re.M)
    assert sorted(placeholders) == sorted(map(" ".join, COMMAND_LINES))
