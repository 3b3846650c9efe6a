"""python -m fastsimclr.export: what each format's users load is the encoder that went in."""

import json
import re
import subprocess
import sys
from dataclasses import replace
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
from weights import images, lived_in, outputs, save_run

import fastsimclr
from fastsimclr import Augmentation, encoder, load_encoder
from fastsimclr.export import FORMATS, main
from fastsimclr.models import Encoder
from fastsimclr.pretrained import export, open_pretrained

RECIPE = Augmentation(
    image_size=48, center_fraction=0.9, interpolation="bilinear", mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6)
)
OPTIONS = [
    *("--data.image_size=48", "--data.center_fraction=0.9", "--data.interpolation=bilinear"),
    *("--data.mean=[0.1,0.2,0.3]", "--data.std=[0.4,0.5,0.6]"),
]
NAMES = {"torchvision": "e.pt", "safetensors": "e.safetensors", "onnx": "e.onnx", "timm": "folder"}
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_of(name: str = "resnet18", width: int = 1, stem: str = "imagenet") -> Encoder:
    """An encoder, saved in a run's folder `run`."""
    model = lived_in(encoder(name, width, stem))
    save_run(Path("run"), model, *OPTIONS)
    return model


def exported(form: str, capsys: pytest.CaptureFixture[str], checkpoint: str = "run", *options: str) -> str:
    """The line of code that is said to load it."""
    output = NAMES[form]
    assert main(["--checkpoint", checkpoint, "--format", form, "--output", output, *options]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert captured.out.count("\n") == 1
    assert captured.out.startswith(f"{output}: ")
    found = re.search("`(.+)`", captured.out)
    assert found is not None
    return found[1]


def loaded_by(code: str, **names: Any) -> dict[str, Any]:
    """What the names stand for after the code has run."""
    known = {"torch": torch, "torchvision": torchvision, "timm": timm, "onnxruntime": onnxruntime} | names
    exec(code, known | {"fastsimclr": fastsimclr}, known)
    return known


def left() -> set[str]:
    return {str(path) for path in Path().rglob("*") if not str(path).startswith("run")}


@pytest.mark.parametrize("stem", ["imagenet", "small"])
@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_torchvision_loads_its_state_dict(name: str, stem: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = run_of(name, stem=stem)
    hint = exported("torchvision", capsys)
    theirs = loaded_by(hint)["model"]
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
    assert again.stem == stem
    assert torch.equal(outputs(again), outputs(model))


@pytest.mark.parametrize(("width", "stem"), [(1, "imagenet"), (2, "small")])
def test_safetensors_restore_all(width: int, stem: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = run_of("resnet18", width, stem)
    again = loaded_by(exported("safetensors", capsys))["encoder"]
    assert (again.name, again.width, again.stem) == ("resnet18", width, stem)
    assert torch.equal(outputs(again), outputs(model))
    first, second = open_pretrained("run"), open_pretrained("e.safetensors")
    assert second.augmentation == first.augmentation == RECIPE
    assert (second.origin, second.config) == (first.origin, first.config)
    with safetensors.safe_open("e.safetensors", "pt") as file:
        assert set(file.keys()) == set(model.state_dict())
        header = file.metadata()
    assert (header["format"], header["encoder"], header["width"]) == ("fastsimclr", "resnet18", str(width))
    assert json.loads(header["augmentation"])["mean"] == [0.1, 0.2, 0.3]


@pytest.mark.parametrize(("name", "width", "stem"), [("resnet18", 2, "small"), ("resnet50", 1, "imagenet")])
def test_onnxruntime_computes_the_same_whatever_the_sizes(
    name: str, width: int, stem: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = run_of(name, width, stem)
    hint = exported("onnx", capsys)
    assert left() == {"e.onnx"}
    for shape in ((1, 3, 48, 48), (7, 3, 48, 48), (2, 3, 33, 70)):
        h = loaded_by(hint, images=images(*shape).numpy())["h"]
        with torch.no_grad():
            expected = model(images(*shape))
        assert expected.std() > 0.01  # so that the tolerance means something
        torch.testing.assert_close(torch.from_numpy(h), expected, rtol=0, atol=1e-4)
    graph = onnx.load("e.onnx")
    onnx.checker.check_model(graph)
    assert [entry.version for entry in graph.opset_import if entry.domain == ""] == [export.OPSET]
    (read,), (written,) = graph.graph.input, graph.graph.output
    sizes = [dim.dim_param or dim.dim_value for dim in read.type.tensor_type.shape.dim]
    assert (read.name, written.name, sizes) == ("images", "representation", ["batch", 3, "height", "width"])
    said = {entry.key: entry.value for entry in graph.metadata_props}
    assert (said["encoder"], json.loads(said["image_size"])) == (name, 48)
    assert (json.loads(said["mean"]), json.loads(said["std"])) == (list(RECIPE.mean), list(RECIPE.std))


def test_a_graph_of_more_than_two_gigabytes_keeps_its_weights_beside_itself(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "LARGEST_PROTOBUF", 10 * 2**20)  # as if this one were
    model = run_of()
    hint = exported("onnx", capsys)
    assert left() == {"e.onnx", "e.onnx.data"}
    assert Path("e.onnx").stat().st_size < 2**20
    h = loaded_by(hint, images=images(2, 3, 64, 72).numpy())["h"]
    torch.testing.assert_close(torch.from_numpy(h), outputs(model), rtol=0, atol=1e-4)


def test_a_graph_that_computes_something_else_is_not_left_behind(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_of()
    original = torch.onnx.export

    def of_another(model: Encoder, *arguments: Any, **options: Any) -> Any:
        return original(lived_in(encoder("resnet18"), seed=1), *arguments, **options)

    monkeypatch.setattr(torch.onnx, "export", of_another)
    with pytest.raises(RuntimeError, match="onnxruntime differs from PyTorch by"):
        main(["--checkpoint=run", "--format=onnx", "--output=e.onnx"])
    assert left() == set()


@pytest.mark.parametrize("off", [2e-4, float("nan")])
def test_how_far_a_graph_may_be_off(off: float) -> None:
    model = lived_in(encoder("resnet18"))
    last = nn.Sequential(*list(model.children())[:-1], nn.Flatten())
    export.compare(model, lambda images: (last(images) + 5e-5).detach(), 32)
    with pytest.raises(RuntimeError, match="differs"):
        export.compare(model, lambda images: (last(images) + off).detach(), 32)


def test_an_encoder_whose_training_diverged_makes_no_graph(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = encoder("resnet18")
    model.bn1.bias.data[0] = float("nan")
    save_run(Path("run"), model)
    assert main(["--checkpoint=run", "--format=onnx", "--output=e.onnx"]) == 2
    assert "not finite" in capsys.readouterr().err
    assert left() == set()


def test_timm_creates_the_model_from_the_folder(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = run_of("resnet50")
    theirs = loaded_by(exported("timm", capsys))["model"]
    assert left() == {"folder", "folder/config.json", "folder/model.safetensors"}
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
def test_another_projects_checkpoint_is_exported_with_what_is_known_of_it(
    form: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs = lived_in(torchvision.models.resnet18(num_classes=10))
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


def save_solo_learns() -> nn.Module:
    """Its stem for CIFAR, padded by 2; in a file theirs.pth."""
    model = torchvision.models.resnet18()
    model.fc, model.maxpool = nn.Identity(), nn.Identity()
    model.conv1 = nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=2, bias=False)
    state = {f"backbone.{name}": value for name, value in lived_in(model).state_dict().items()}
    state |= {"classifier.weight": torch.zeros(1, 1), "classifier.bias": torch.zeros(1)}
    torch.save({"state_dict": state}, "theirs.pth")
    return model


def save_lightlys() -> nn.Module:
    """Its ResNetGenerator in a Sequential, which has no ReLU in the stem; in a file theirs.pth."""
    model = lived_in(encoder("resnet18", stem="small"))
    children = [child for name, child in model.named_children() if name not in ("relu", "maxpool", "fc")]
    backbone = nn.Sequential(*children)
    torch.save({f"backbone.{name}": value for name, value in backbone.state_dict().items()}, "theirs.pth")
    return backbone


@pytest.mark.parametrize("save", [save_solo_learns, save_lightlys])
def test_what_is_unusual_in_a_stem_survives_or_is_refused(
    save: Any, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = save()
    again = loaded_by(exported("safetensors", capsys, "theirs.pth"))["encoder"]
    assert torch.equal(outputs(again), outputs(model))
    h = loaded_by(exported("onnx", capsys, "e.safetensors"), images=images(2, 3, 64, 72).numpy())["h"]
    torch.testing.assert_close(torch.from_numpy(h), outputs(model), rtol=0, atol=1e-4)
    for form in ("torchvision", "timm"):
        assert main(["--checkpoint=theirs.pth", f"--format={form}", f"--output={NAMES[form]}"]) == 2
        assert f"--format: got {form} for" in capsys.readouterr().err


# The command line


def test_it_says_how_images_are_prepared(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_of()
    assert main(["--checkpoint=run/checkpoints/last.pt", "--format=torchvision", "--output=new/e.pth"]) == 0
    said = capsys.readouterr().out
    size = Path("new/e.pth").stat().st_size / 2**20
    for words in (
        "new/e.pth: resnet18 of run/checkpoints/last.pt (fastsimclr run, step 7) for torchvision",
        f", {size:.1f} MiB; ",
        "image_size 48, center_fraction 0.9, interpolation bilinear, mean (0.1, 0.2, 0.3), std (0.4, 0.5, 0.6)",
    ):
        assert words in said


def test_every_format_that_can_be_written_is_offered() -> None:
    assert tuple(export.FORMATS) == FORMATS


@pytest.mark.parametrize("form", NAMES)
def test_an_output_is_overwritten_only_by_force_and_never_half(
    form: str, here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run_of()
    output = Path(NAMES[form])
    old = output
    if form == "timm":
        output.mkdir()
        Path("folder/README.md").write_text("mine")
        old = output / "model.safetensors"
    old.write_text("dear")
    there = left()
    options = ["--checkpoint=run", f"--format={form}", f"--output={output}"]
    assert main(options) == 2
    assert "--force" in capsys.readouterr().err

    def die(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", die)
        patch.setattr(export, "save_file", die)
        patch.setattr(torch.onnx, "export", die)
        assert main([*options, "--force"]) == 2
    assert "cannot be written (No space left on device)" in capsys.readouterr().err
    assert old.read_text() == "dear"
    assert left() == there

    assert main([*options, "--force"]) == 0
    assert left() == there | ({"folder/config.json"} if form == "timm" else set())
    assert old.stat().st_size > 10 * 2**20
    if form == "timm":
        assert Path("folder/README.md").read_text() == "mine"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--format=torchvision", "--output=e.pt"], ["--checkpoint"]),
        (["--checkpoint=run", "--output=e.pt"], ["--format"]),
        (["--checkpoint=run", "--format=pickle", "--output=e.pt"], ["pickle", "safetensors"]),
        (["--checkpoint=run", "--format=torchvision", "--output=e.onnx"], ["e.onnx", ".pt or .pth"]),
        (["--checkpoint=run", "--format=safetensors", "--output=e"], ["ends in .safetensors"]),
        (["--checkpoint=run", "--format=onnx", "--output=e.pt"], ["ends in .onnx"]),
        (["--checkpoint=nowhere", "--format=onnx", "--output=e.onnx"], ["nowhere: got no such file"]),
        (["--checkpoint=run", "--format=torchvision", "--output=run/checkpoints/last.pt", "--force"], ["itself"]),
        (["--checkpoint=run/checkpoints", "--format=timm", "--output=e"], ["neither"]),
        (["--checkpoint=run", "--format=timm", "--output=run/config.yaml", "--force"], ["expected a folder"]),
        (["--checkpoint=run", "--format=torchvision", "--output=run/folder.pt", "--force"], ["expected a file"]),
        (["--checkpoint=run", "--format=torchvision", "--output=/dev/null/e.pt"], ["/dev/null/e.pt", "written"]),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    options: list[str], words: list[str], here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_of()
    Path("run/folder.pt").mkdir()
    content = Path("run/checkpoints/last.pt").read_bytes()
    assert main(options) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("fastsimclr.export: error: ")
    assert captured.err.count("\n") == 1
    for word in words:
        assert word in captured.err
    assert left() == set()
    assert Path("run/checkpoints/last.pt").read_bytes() == content


@pytest.mark.parametrize(
    ("form", "width", "stem", "words"),
    [
        ("torchvision", 2, "imagenet", "width 2, which torchvision does not have; expected safetensors or onnx"),
        ("timm", 2, "imagenet", "width 2, which timm does not have; expected safetensors or onnx"),
        ("timm", 1, "small", "small stem of resnet18, which timm does not have; expected safetensors or onnx"),
    ],
)
def test_an_encoder_that_a_format_has_no_model_of_is_sent_to_another(
    form: str, width: int, stem: str, words: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_of("resnet18", width, stem)
    assert main(["--checkpoint=run", f"--format={form}", f"--output={NAMES[form]}"]) == 2
    assert words in capsys.readouterr().err
    assert left() == set()


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_package_is_named_with_what_installs_it(
    package: str, here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run_of()
    monkeypatch.setitem(sys.modules, package, None)
    assert main(["--checkpoint=run", "--format=onnx", "--output=e.onnx"]) == 2
    said = capsys.readouterr().err
    assert f"{package} is not installed" in said
    assert "pip install 'fastsimclr[onnx]'" in said


def test_the_process_says_one_line_and_nothing_else(here: Path) -> None:
    """What the exporter and onnxruntime write past Python's streams too."""
    run_of()
    Path("evil.pt").write_bytes(b"cposix\nsystem\n(S'touch executed'\ntR.")
    for checkpoint, code, out, err in (("run", 0, 1, 0), ("evil.pt", 2, 0, 1)):
        command = [sys.executable, "-m", "fastsimclr.export", f"--checkpoint={checkpoint}", "--format=onnx"]
        done = subprocess.run([*command, "--output=e.onnx", "--force"], capture_output=True, text=True, timeout=300)
        assert (done.returncode, done.stdout.count("\n"), done.stderr.count("\n")) == (code, out, err), done
    assert "posix.system" in done.stderr
    assert not Path("executed").exists()


def test_a_run_with_several_sizes_of_views_keeps_them(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = replace(Augmentation(), num_views=2, per_view=({}, {"image_size": 96, "scale": [0.05, 0.14]}))
    save_run(Path("run"), encoder("resnet18"), '--data.per_view=[{}, {"image_size": 96, "scale": [0.05, 0.14]}]')
    exported("safetensors", capsys)
    augmentation = open_pretrained("e.safetensors").augmentation
    assert augmentation == recipe
    assert [of_view.image_size for of_view in augmentation.recipes] == [224, 96]
