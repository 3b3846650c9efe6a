"""`fastsimclr COMMAND`: help, version and errors; heavy modules are imported only when needed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from weights import save_run

import fastsimclr
from fastsimclr import encoder
from fastsimclr.cli import COMMANDS, exit_code, main
from fastsimclr.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
HELP = [[name, "--help"] for name in COMMANDS] + [["evaluate", "knn", "--help"]]
OPTIONAL = ["matplotlib", "sklearn", "nvidia.dali", "jsonargparse"]
OPTIONAL += ["tensorboard", "torch.utils.tensorboard", "wandb", "mlflow"]


def modules_after(source: str) -> set[str]:
    """Run `source` in a new process and return the names of the modules it has imported."""
    source += "\nimport sys; print(*sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", source], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return set(done.stderr.split())


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_help_lists_every_command_on_one_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    for name, about in COMMANDS.items():
        assert [line.split(maxsplit=1) for line in lines if line.strip().startswith(f"{name} ")] == [[name, about]]
    assert all(len(line) <= 100 for line in lines)


def test_commands_lists_every_command_module() -> None:
    found = {file.stem for file in (ROOT / "fastsimclr").glob("*.py") if "    run_process(main)" in file.read_text()}
    assert found == {*COMMANDS, "cli"}


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"fastsimclr {fastsimclr.__version__}\n"


@pytest.mark.parametrize("command", ["trian", "--batch_size=3", "two\nlines"])
def test_unknown_command_is_one_line_error(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == f"fastsimclr: error: got {command!r}, expected one of {', '.join(COMMANDS)}\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_error_names_the_command(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, *(["knn"] if command == "evaluate" else []), "--palette"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"fastsimclr.{command}: error: ")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ["embed", "--checkpoint=nowhere", "--output={}"],
        ["export", "--checkpoint=nowhere", "--format=torchvision", "--output={}/out.pt"],
        ["preview", "--data=nowhere", "--output={}/out.png"],
        ["shard", "nowhere", "--output={}"],
        ["doctor", "--data=nowhere", "--list={}/list"],
    ],
)
def test_output_that_cannot_be_written_is_found_before_anything_is_opened(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert main([argument.format(tmp_path / "file") for argument in arguments]) == 2
    option = arguments[-1].split("=")[0]
    error = capsys.readouterr().err
    assert f"error: {option}: got {tmp_path}/file" in error
    assert f"which cannot be written ({tmp_path}/file is not a folder); choose another folder\n" in error


@pytest.mark.parametrize(
    ("rank", "local_rank", "on_all_ranks", "is_printed"),
    [("0", "0", True, True), ("2", "0", True, False), ("2", "0", False, True), ("3", "1", False, False)],
)
def test_rank_that_prints_an_error(
    rank: str,
    local_rank: str,
    on_all_ranks: bool,
    is_printed: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail() -> None:
        error = UserError(f"--output: got {'x' * 5000}")
        error.on_all_ranks = on_all_ranks
        raise error

    ranks = {"RANK": rank, "WORLD_SIZE": "4", "LOCAL_RANK": local_rank, "LOCAL_WORLD_SIZE": "2"}
    for name, value in ranks.items():
        monkeypatch.setenv(name, value)
    assert exit_code("train", fail) == 2
    short = f"fastsimclr.train: error: --output: got {'x' * 150}…{'x' * 149}\n"
    assert capsys.readouterr().err == (short if is_printed else "")


@pytest.mark.slow
def test_console_script_runs_each_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    options = ["--max_steps=2", "--knn_every=0", "--data.image_size=16", "--device=cpu", "--batch_size=64"]
    assert main(["train", *options, "--output=run"]) == 0
    assert main(["evaluate", "knn", "--checkpoint=run", "--k=20", "--device=cpu"]) == 0
    assert main(["embed", "--checkpoint=run", "--map=none", "--gallery=0", "--images=20", "--device=cpu"]) == 0
    save_run(Path("other"), encoder("resnet18"))
    assert main(["export", "--checkpoint=other", "--format=safetensors", "--output=exported"]) == 0
    assert main(["preview", "--images=1"]) == 0
    assert main(["report", "run", "--only_collect"]) == 0
    outputs = [
        "run/evaluate/knn.json",
        "run/embed/features.npy",
        "exported/model.safetensors",
        "preview.png",
        "run/report.html",
    ]
    assert all(Path(name).is_file() for name in outputs)
    capsys.readouterr()
    assert main(["doctor", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["fastsimclr"] == fastsimclr.__version__


def test_console_script_is_declared() -> None:
    assert 'fastsimclr = "fastsimclr.cli:script"' in (ROOT / "pyproject.toml").read_text()


@pytest.mark.parametrize("arguments", HELP, ids=" ".join)
def test_command_help_does_not_import_torch(arguments: list[str]) -> None:
    source = f"""
from fastsimclr.cli import main
try:
    main({arguments})
except SystemExit as end:
    assert end.code == 0
"""
    modules = modules_after(source)
    assert f"fastsimclr.{arguments[0]}" in modules
    assert not modules & {"torch", "numpy", "PIL", "matplotlib", "sklearn"}


def test_console_script_help_imports_no_command() -> None:
    modules = modules_after("from fastsimclr.cli import main; main(['--help'])")
    assert {name for name in modules if name.startswith("fastsimclr.")} == {
        f"fastsimclr.{name}" for name in ("_lazy", "cli", "errors", "stopping", "version")
    }
    assert not modules & {"torch", *OPTIONAL}


def test_importing_the_package_imports_no_heavy_dependency() -> None:
    assert not modules_after("import fastsimclr") & {"torch", "numpy", *OPTIONAL}


@pytest.mark.slow
def test_public_api_imports_no_optional_dependency() -> None:
    source = """
import torch
from PIL import Image
from tempfile import TemporaryDirectory
from fastsimclr import LARS, Augmentation, SimCLR, encoder, load_encoder, nt_xent, open_views, projector
model = SimCLR(encoder("resnet18", stem="small"), projector(512))
with TemporaryDirectory() as folder:
    for number in range(4):
        Image.new("RGB", (16, 16), (number, 0, 0)).save(f"{folder}/{number}.png")
    loader = open_views(folder, Augmentation(image_size=16), 4, device=torch.device("cpu"))
    batch = next(iter(loader))
    loader.close()
nt_xent(*(model(view) for view in batch.views)).backward()
LARS(model.parameters(), lr=0.1).step()
"""
    modules = modules_after(source)
    assert {"torch", "fastsimclr.loss", "fastsimclr.data.loader", "fastsimclr.pretrained"} <= modules
    assert not modules & set(OPTIONAL)
