"""python -m fastsimclr.export: every format loads as the encoder that was export_to."""

import json
import re
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import safetensors
import timm
import torch
import torchvision
from torch import Tensor, nn
from weights import images, outputs, randomize_norms, save_run

import fastsimclr
from fastsimclr import Augmentation, encoder, load_encoder
from fastsimclr.export import FORMATS, main
from fastsimclr.models import Encoder
from fastsimclr.pretrained import export, onnx_graph, open_pretrained

RECIPE = Augmentation(
    image_size=48, center_fraction=0.9, interpolation="bilinear", mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6)
)
OPTIONS = [
    *("--data.image_size=48", "--data.center_fraction=0.9", "--data.interpolation=bilinear"),
    *("--data.mean=[0.1,0.2,0.3]", "--data.std=[0.4,0.5,0.6]"),
]
NAMES = {"torchvision": "e.pt", "safetensors": "e", "onnx": "e.onnx", "timm": "folder"}
pytestmark = pytest.mark.usefixtures("one_thread")


def save_encoder(name: str = "resnet18", width: int = 1, stem: str = "imagenet") -> Encoder:
    """Save a new encoder in the run folder `run` and return it."""
    model = randomize_norms(encoder(name, width, stem))
    save_run(Path("run"), model, *OPTIONS)
    return model


def export_to(form: str, capsys: pytest.CaptureFixture[str], checkpoint: str = "run", *options: str) -> str:
    """Export `checkpoint` and return the printed line of code that loads the file."""
    output = NAMES[form]
    assert main(["--checkpoint", checkpoint, "--format", form, "--output", output, *options]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    line, _, preparation = captured.out.partition("\n")
    assert line.startswith(f"{output}: ")
    assert preparation == "" or preparation.startswith("import torch\n")
    found = re.search("`(.+)`", captured.out)
    assert found is not None
    return found[1]


def execute(code: str, **names: Any) -> dict[str, Any]:
    """Run `code` with `names` defined, and return its variables."""
    variables = {"torch": torch, "torchvision": torchvision, "timm": timm, "onnxruntime": onnxruntime} | names
    exec(code, variables | {"fastsimclr": fastsimclr}, variables)
    return variables


def exported_files() -> set[str]:
    return {str(path) for path in Path().rglob("*") if not str(path).startswith("run")}


@pytest.mark.parametrize("stem", ["imagenet", "medium", "small"])
@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
@pytest.mark.slow
def test_torchvision_loads_the_state_dict(
    name: str, stem: str, working_directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = save_encoder(name, stem=stem)
    hint = export_to("torchvision", capsys)
    theirs = execute(hint)["model"]
    assert type(theirs) is torchvision.models.ResNet
    assert torch.equal(outputs(theirs.eval()), outputs(model))
    state = torch.load("e.pt", weights_only=True)
    assert type(state) is dict
    assert {type(value) for value in state.values()} == {Tensor}
    if stem == "imagenet":
        plain = torchvision.models.get_model(name)
        plain.fc = nn.Identity()
        plain.load_state_dict(state, strict=True)
    again = load_encoder("e.pt", name=name)
    assert again.spec.stem == stem
    assert torch.equal(outputs(again), outputs(model))


@pytest.mark.parametrize(("width", "stem"), [(1, "imagenet"), (1, "medium"), (2, "small")])
@pytest.mark.slow
def test_safetensors_restore_encoder_recipe_and_config(
    width: int, stem: str, working_directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = save_encoder("resnet18", width, stem)
    again = execute(export_to("safetensors", capsys))["encoder"]
    assert again.spec == model.spec
    assert torch.equal(outputs(again), outputs(model))
    first, second = open_pretrained("run"), open_pretrained("e")
    assert second.augmentation == first.augmentation == RECIPE
    assert (second.origin, second.config) == (first.origin, first.config)
    with safetensors.safe_open("e/model.safetensors", "pt") as file:
        assert set(file.keys()) == set(model.state_dict())
    config = json.loads(Path("e/config.json").read_text())
    assert (config["format"], config["encoder"]) == ("fastsimclr", asdict(model.spec))
    assert config["augmentation"]["mean"] == [0.1, 0.2, 0.3]


@pytest.mark.parametrize(("name", "width", "stem"), [("resnet18", 2, "small"), ("resnet50", 1, "imagenet")])
@pytest.mark.slow
def test_onnxruntime_computes_the_same_for_any_input_size(
    name: str, width: int, stem: str, working_directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = save_encoder(name, width, stem)
    hint = export_to("onnx", capsys)
    assert exported_files() == {"e.onnx"}
    for shape in ((1, 3, 48, 48), (7, 3, 48, 48), (2, 3, 33, 70)):
        h = execute(hint, images=images(*shape).numpy())["h"]
        with torch.no_grad():
            expected = model(images(*shape))
        assert expected.std() > 0.01  # well above the tolerance
        torch.testing.assert_close(torch.from_numpy(h), expected, rtol=0, atol=1e-4)
    graph = onnx.load("e.onnx")
    onnx.checker.check_model(graph)
    assert [entry.version for entry in graph.opset_import if entry.domain == ""] == [onnx_graph.OPSET]
    (read,), (written,) = graph.graph.input, graph.graph.output
    sizes = [dim.dim_param or dim.dim_value for dim in read.type.tensor_type.shape.dim]
    assert (read.name, written.name, sizes) == ("images", "representation", ["batch", 3, "height", "width"])
    said = {entry.key: entry.value for entry in graph.metadata_props}
    assert (said["encoder"], json.loads(said["image_size"])) == (name, 48)
    assert (json.loads(said["mean"]), json.loads(said["std"])) == (list(RECIPE.mean), list(RECIPE.std))


@pytest.mark.slow
def test_onnx_graph_above_2_gib_stores_its_weights_in_a_second_file(
    working_directory: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_graph, "LARGEST_PROTOBUF", 10 * 2**20)  # a lower limit instead of a larger encoder
    model = save_encoder()
    hint = export_to("onnx", capsys)
    assert exported_files() == {"e.onnx", "e.onnx.data"}
    assert Path("e.onnx").stat().st_size < 2**20
    h = execute(hint, images=images(2, 3, 64, 72).numpy())["h"]
    torch.testing.assert_close(torch.from_numpy(h), outputs(model), rtol=0, atol=1e-4)


@pytest.mark.slow
def test_wrong_onnx_graph_is_removed(working_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_encoder()
    original = torch.onnx.export

    def export_another(model: Encoder, *arguments: Any, **options: Any) -> Any:
        return original(randomize_norms(encoder("resnet18"), seed=1), *arguments, **options)

    monkeypatch.setattr(torch.onnx, "export", export_another)
    with pytest.raises(RuntimeError, match="onnxruntime differs from PyTorch by"):
        main(["--checkpoint=run", "--format=onnx", "--output=e.onnx"])
    assert exported_files() == set()


@pytest.mark.parametrize("off", [2e-4, float("nan")])
def test_tolerance_of_the_onnx_check(off: float) -> None:
    model = randomize_norms(encoder("resnet18"))
    last = nn.Sequential(*list(model.children())[:-1], nn.Flatten())
    onnx_graph.compare(model, lambda images: (last(images) + 5e-5).detach(), 32)
    with pytest.raises(RuntimeError, match="differs"):
        onnx_graph.compare(model, lambda images: (last(images) + off).detach(), 32)


@pytest.mark.slow
def test_encoder_with_nan_is_not_exported_to_onnx(working_directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = encoder("resnet18")
    model.bn1.bias.data[0] = float("nan")
    save_run(Path("run"), model)
    assert main(["--checkpoint=run", "--format=onnx", "--output=e.onnx"]) == 2
    assert "not finite" in capsys.readouterr().err
    assert exported_files() == set()


@pytest.mark.slow
def test_timm_creates_the_model_from_the_exported_folder(
    working_directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = save_encoder("resnet50")
    theirs = execute(export_to("timm", capsys))["model"]
    assert exported_files() == {"folder", "folder/config.json", "folder/model.safetensors"}
    torch.testing.assert_close(outputs(theirs.eval()), outputs(model))
    prepared = timm.data.resolve_model_data_config(theirs)
    assert tuple(prepared["input_size"]) == (3, 48, 48)
    assert (tuple(prepared["mean"]), tuple(prepared["std"])) == (RECIPE.mean, RECIPE.std)
    assert (prepared["interpolation"], prepared["crop_pct"]) == ("bilinear", 0.9)
    tuned = timm.create_model("local-dir:folder", pretrained=True, num_classes=7)
    assert tuned(torch.zeros(1, 3, 64, 64)).shape == (1, 7)
    torch.testing.assert_close(tuned.layer4[2].conv3.weight, model.layer4[2].conv3.weight)
    again = open_pretrained("folder", "resnet50")
    assert (again.augmentation, again.origin) == (RECIPE, "fastsimclr run, step 7")
    assert torch.equal(outputs(again.encoder), outputs(model))


@pytest.mark.parametrize("form", NAMES)
@pytest.mark.slow
def test_checkpoint_of_another_project_is_exported_without_a_recipe(
    form: str, working_directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs = randomize_norms(torchvision.models.resnet18(num_classes=10))
    torch.save({"state_dict": theirs.state_dict()}, "theirs.pth")
    assert main(["--checkpoint=theirs.pth", f"--format={form}", f"--output={NAMES[form]}"]) == 0
    said = capsys.readouterr().out
    assert "the checkpoint does not record how" in said
    assert "mean" not in said
    if form != "onnx":
        opened = open_pretrained(NAMES[form])
        assert opened.augmentation is None
        theirs.fc = nn.Identity()
        assert torch.equal(outputs(opened.encoder), outputs(theirs))


def save_as_solo_learn() -> nn.Module:
    """Save a checkpoint as solo-learn does, with its CIFAR stem padded by 2, to theirs.pth; return the module."""
    model = torchvision.models.resnet18()
    model.fc, model.maxpool = nn.Identity(), nn.Identity()
    model.conv1 = nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=2, bias=False)
    state = {f"backbone.{name}": value for name, value in randomize_norms(model).state_dict().items()}
    state |= {"classifier.weight": torch.zeros(1, 1), "classifier.bias": torch.zeros(1)}
    torch.save({"state_dict": state}, "theirs.pth")
    return model


def save_as_lightly() -> nn.Module:
    """Save lightly's ResNetGenerator in a Sequential, which has no ReLU in the stem, to theirs.pth; return it."""
    model = randomize_norms(encoder("resnet18", stem="small"))
    children = [child for name, child in model.named_children() if name not in ("relu", "maxpool", "fc")]
    backbone = nn.Sequential(*children)
    torch.save({f"backbone.{name}": value for name, value in backbone.state_dict().items()}, "theirs.pth")
    return backbone


@pytest.mark.parametrize("save", [save_as_solo_learn, save_as_lightly])
@pytest.mark.slow
def test_unusual_stem_is_kept_or_rejected(
    save: Any, working_directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = save()
    again = execute(export_to("safetensors", capsys, "theirs.pth"))["encoder"]
    assert torch.equal(outputs(again), outputs(model))
    h = execute(export_to("onnx", capsys, "e"), images=images(2, 3, 64, 72).numpy())["h"]
    torch.testing.assert_close(torch.from_numpy(h), outputs(model), rtol=0, atol=1e-4)
    for form in ("torchvision", "timm"):
        assert main(["--checkpoint=theirs.pth", f"--format={form}", f"--output={NAMES[form]}"]) == 2
        assert f"--format: got {form} for" in capsys.readouterr().err


# The command line


def test_prints_how_images_are_prepared(working_directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_encoder()
    assert main(["--checkpoint=run/checkpoints/last.pt", "--format=torchvision", "--output=new/e.pth"]) == 0
    said = capsys.readouterr().out
    size = Path("new/e.pth").stat().st_size / 2**20
    for words in (
        "new/e.pth: resnet18 of run/checkpoints/last.pt (fastsimclr run, step 7) for torchvision",
        f", {size:.1f} MiB; ",
        load_encoder("run").transform.code(),
    ):
        assert words in said


def test_command_line_offers_every_format() -> None:
    assert tuple(export.FORMATS) == FORMATS


@pytest.mark.parametrize("form", NAMES)
@pytest.mark.slow
def test_output_is_overwritten_only_with_force_and_atomically(
    form: str, working_directory: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    save_encoder()
    output = Path(NAMES[form])
    old = output
    if form in ("timm", "safetensors"):
        output.mkdir()
        (output / "mine.txt").write_text("mine")
        old = output / "model.safetensors"
    old.write_text("old")
    before = exported_files()
    options = ["--checkpoint=run", f"--format={form}", f"--output={output}"]
    assert main(options) == 2
    assert "--force" in capsys.readouterr().err

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space exported_files on device")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", fail)
        patch.setattr(export, "save_file", fail)
        patch.setattr(torch.onnx, "export", fail)
        assert main([*options, "--force"]) == 2
    assert "cannot be written (No space exported_files on device)" in capsys.readouterr().err
    assert old.read_text() == "old"
    assert exported_files() == before

    assert main([*options, "--force"]) == 0
    added = {"timm": {"folder/config.json"}, "safetensors": {"e/config.json", "e/README.md"}}
    assert exported_files() == before | added.get(form, set())
    assert old.stat().st_size > 10 * 2**20
    if old != output:
        assert (output / "mine.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--format=torchvision", "--output=e.pt"], ["--checkpoint"]),
        (["--checkpoint=run", "--output=e.pt"], ["--format"]),
        (["--checkpoint=run", "--format=pickle", "--output=e.pt"], ["pickle", "safetensors"]),
        (["--checkpoint=run", "--format=torchvision", "--output=e.onnx"], ["e.onnx", ".pt or .pth"]),
        (["--checkpoint=run", "--format=onnx", "--output=e.pt"], ["ends in .onnx"]),
        (["--checkpoint=nowhere", "--format=onnx", "--output=e.onnx"], ["nowhere: got no such file"]),
        (["--checkpoint=run", "--format=torchvision", "--output=run/checkpoints/last.pt", "--force"], ["itself"]),
        (["--checkpoint=run/checkpoints", "--format=timm", "--output=e"], ["neither"]),
        (["--checkpoint=run", "--format=timm", "--output=run/config.yaml", "--force"], ["expected a folder"]),
        (["--checkpoint=run", "--format=torchvision", "--output=run/folder.pt", "--force"], ["expected a file"]),
        (["--checkpoint=run", "--format=torchvision", "--output=/dev/null/e.pt"], ["/dev/null/e.pt", "written"]),
    ],
)
def test_user_error_is_one_line_with_exit_code_2(
    options: list[str], words: list[str], working_directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_encoder()
    Path("run/folder.pt").mkdir()
    content = Path("run/checkpoints/last.pt").read_bytes()
    assert main(options) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("fastsimclr.export: error: ")
    assert captured.err.count("\n") == 1
    for word in words:
        assert word in captured.err
    assert exported_files() == set()
    assert Path("run/checkpoints/last.pt").read_bytes() == content


@pytest.mark.parametrize(
    ("form", "encoder", "words"),
    [
        (
            "torchvision",
            ("resnet18", 2, "imagenet"),
            "width 2, for which torchvision has no equivalent; expected safetensors or onnx",
        ),
        (
            "timm",
            ("resnet18", 2, "imagenet"),
            "width 2, for which timm has no equivalent; expected safetensors or onnx",
        ),
        (
            "timm",
            ("resnet18", 1, "small"),
            "small stem, for which timm has no equivalent; expected torchvision, safetensors or onnx",
        ),
        (
            "torchvision",
            ("resnet10", 1, "imagenet"),
            "resnet10, for which torchvision has no equivalent; expected safetensors or onnx",
        ),
        (
            "timm",
            ("resnet10", 1, "imagenet"),
            "resnet10, for which timm has no equivalent; expected safetensors or onnx",
        ),
    ],
)
@pytest.mark.slow
def test_format_without_a_model_for_the_encoder_suggests_another(
    form: str, encoder: Any, words: str, working_directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_encoder(*encoder)
    assert main(["--checkpoint=run", f"--format={form}", f"--output={NAMES[form]}"]) == 2
    assert words in capsys.readouterr().err
    assert exported_files() == set()


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_missing_package_is_named_with_the_install_command(
    package: str, working_directory: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    save_encoder()
    monkeypatch.setitem(sys.modules, package, None)
    assert main(["--checkpoint=run", "--format=onnx", "--output=e.onnx"]) == 2
    said = capsys.readouterr().err
    assert f"{package} is not installed" in said
    assert "pip install 'fastsimclr[onnx]'" in said


@pytest.mark.slow
def test_process_prints_nothing_else(working_directory: Path) -> None:
    """Also suppresses what the exporter and onnxruntime write directly to the file descriptors."""
    save_encoder()
    Path("evil.pt").write_bytes(b"cposix\nsystem\n(S'touch executed'\ntR.")
    lines = 1 + len(load_encoder("run").transform.code().splitlines())
    for checkpoint, code, out, err in (("run", 0, lines, 0), ("evil.pt", 2, 0, 1)):
        command = [sys.executable, "-m", "fastsimclr.export", f"--checkpoint={checkpoint}", "--format=onnx"]
        done = subprocess.run([*command, "--output=e.onnx", "--force"], capture_output=True, text=True, timeout=300)
        assert (done.returncode, done.stdout.count("\n"), done.stderr.count("\n")) == (code, out, err), done
    assert "posix.system" in done.stderr
    assert not Path("executed").exists()


def test_views_of_several_sizes_are_kept(working_directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = replace(Augmentation(), num_views=2, per_view=({}, {"image_size": 96, "scale": [0.05, 0.14]}))
    save_run(Path("run"), encoder("resnet18"), '--data.per_view=[{}, {"image_size": 96, "scale": [0.05, 0.14]}]')
    export_to("safetensors", capsys)
    augmentation = open_pretrained("e").augmentation
    assert augmentation == recipe
    assert [view.image_size for view in augmentation.recipes] == [224, 96]
