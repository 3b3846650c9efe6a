"""Encoders started from published weights, files and runs; published files are put into the caches by hand."""

import time
import warnings
from pathlib import Path

import huggingface_hub
import pytest
import timm
import torch
import torchvision
from huggingface_hub.utils import close_session
from pictures import jpeg, photo, write
from safetensors.torch import save_file
from torch import nn
from torchvision.models import VisionTransformer
from weights import images, randomize_norms

from fastsimclr import UserError, encoder, load_encoder
from fastsimclr.models import as_encoder
from fastsimclr.pretrained import initialize
from fastsimclr.train import main

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Empty caches of torch.hub (in torch/) and the Hugging Face Hub (in hub/), and no network: a dead proxy."""
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "torch"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    close_session()  # it knows the old proxy
    return tmp_path


def torchvision_model(name: str = "resnet18") -> nn.Module:
    torch.manual_seed(0)
    return randomize_norms(torchvision.models.get_model(name))


def save(module: nn.Module, file: Path) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save(module.state_dict(), file)
    return file


def test_resnet_starts_with_torchvisions_exact_features(tmp_path: Path) -> None:
    theirs = torchvision_model()
    file = save(theirs, tmp_path / "resnet18.pt")
    theirs.fc = nn.Identity()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = encoder("resnet18", weights=file).eval()
    x = images(2, 3, 64, 64)
    assert torch.equal(ours(x), theirs(x))


TORCH_URL = "https://download.pytorch.org/models"
HUB_FOLDER = "hub/models--timm--test_vit.r160_in1k/snapshots/main"
PUBLISHED = {  # the file in the caches, and its address
    "resnet18": ("torch/checkpoints/resnet18-f37072fd.pth", f"{TORCH_URL}/resnet18-f37072fd.pth"),
    "torchvision/mobilenet_v3_small": (
        "torch/checkpoints/mobilenet_v3_small-047dcff4.pth",
        f"{TORCH_URL}/mobilenet_v3_small-047dcff4.pth",
    ),
    "timm/test_vit": (
        f"{HUB_FOLDER}/model.safetensors",
        "https://huggingface.co/timm/test_vit.r160_in1k/resolve/main/model.safetensors",
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_weights_that_cannot_be_downloaded_are_named_and_then_found(name: str, caches: Path) -> None:
    path, url = PUBLISHED[name]
    file = caches / path
    ours = encoder(name, stem="imagenet", image_size=160)
    started = time.monotonic()
    with pytest.raises(UserError, match="cannot be downloaded") as raised:
        initialize(ours, "imagenet")
    assert time.monotonic() - started < 5
    assert f"get {url} on another machine and put it at {file}" in str(raised.value)

    library, _, model = name.rpartition("/")
    file.parent.mkdir(parents=True, exist_ok=True)
    if library == "timm":
        theirs = timm.create_model(model)
        save_file(theirs.state_dict(), file)
        theirs.reset_classifier(0)
    else:
        theirs = torchvision_model(model)
        save(theirs, file)
        setattr(theirs, "fc" if model == "resnet18" else "classifier", nn.Identity())
    (line,) = initialize(ours, "imagenet")
    if name == "resnet18":
        assert line == "weights: 120 of 120 tensors from torchvision's ResNet18_Weights.IMAGENET1K_V1"
    x = images(2, 3, 160, 160)
    assert torch.equal(ours.eval()(x), theirs.eval()(x))


def test_damaged_published_file_is_named(caches: Path) -> None:
    for name, (path, _) in PUBLISHED.items():
        write(caches, {path: b"<html>"})
        with pytest.raises(UserError, match=Path(path).name):
            encoder(name, image_size=160, weights="imagenet")


def test_encoders_without_published_weights(caches: Path) -> None:
    with pytest.raises(UserError, match="timm/botnet50ts_256, which has no"):
        encoder("timm/botnet50ts_256", image_size=64, weights="imagenet")
    with pytest.raises(UserError, match="imagenet for a module of your own"):
        initialize(as_encoder(nn.Conv2d(3, 4, 1), image_size=8, channels=3), "imagenet")
    with pytest.raises(UserError, match="got imagenet for resnet10, which has no published weights; expected a file"):
        encoder("resnet10", weights="imagenet")


@pytest.mark.parametrize("channels", [1, 5])
@pytest.mark.parametrize("name", ["resnet18", "timm/test_vit"])
def test_first_layer_keeps_its_response_to_gray(name: str, channels: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    rgb = encoder(name, image_size=80)
    file = save(getattr(rgb, "module", rgb), tmp_path / "rgb.pt")
    ours = encoder(name, image_size=80, channels=channels)
    lines = initialize(ours, file)
    first = "conv1.weight" if name == "resnet18" else "patch_embed.proj.weight"
    assert lines[1:] == [f"weights: adapted: {first} from 3 to {channels} channels by their mean"]
    gray = images(2, 1, 80, 80)
    h = ours.eval()(gray.expand(-1, channels, -1, -1))
    torch.testing.assert_close(h, rgb.eval()(gray.expand(-1, 3, -1, -1)), rtol=1e-4, atol=1e-4)


def test_position_embeddings_are_resampled(caches: Path) -> None:
    torch.manual_seed(0)
    file = caches / PUBLISHED["timm/test_vit"][0]
    file.parent.mkdir(parents=True)
    theirs = timm.create_model("test_vit")
    save_file(theirs.state_dict(), file)
    published, ours = (encoder("timm/test_vit", image_size=64) for _ in range(2))
    (line,) = initialize(published, "imagenet")
    assert "adapted by timm from images of 160 to 64 pixels" in line
    assert initialize(ours, file)[1:] == ["weights: adapted: pos_embed resampled to images of 64 pixels"]
    for name, value in published.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value)

    sizes = {"patch_size": 8, "num_layers": 1, "num_heads": 2, "hidden_dim": 16, "mlp_dim": 32, "num_classes": 8}
    large, small = (VisionTransformer(image_size=size, **sizes) for size in (64, 32))
    ours = as_encoder(small, image_size=32, channels=3)
    lines = initialize(ours, save(large, caches / "vit.pt"))
    assert "weights: adapted: encoder.pos_embedding resampled to images of 32 pixels" in lines
    assert torch.equal(small.encoder.pos_embedding[:, 0], large.encoder.pos_embedding[:, 0])  # class token


def test_what_does_not_fit_is_listed(tmp_path: Path) -> None:
    file = save(torchvision_model(), tmp_path / "resnet18.pt")
    with pytest.warns(UserWarning, match=r"conv1.weight \(64, 3, 7, 7\) instead of \(64, 3, 3, 3\)") as warned:
        small = encoder("resnet18", stem="small", weights=file)
    assert len(warned) == 1
    assert torch.equal(small.layer1[0].conv1.weight, load_encoder(file).layer1[0].conv1.weight)

    module = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 2, 3))
    other = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Identity(), nn.Conv2d(8, 2, 3))
    lines = initialize(as_encoder(module, image_size=8, channels=3), save(other, tmp_path / "module.pt"))
    assert lines[1:] == [
        "weights: left out, not in the encoder: 3.weight, 3.bias",
        "weights: random, not in the weights: 2.weight, 2.bias",
    ]


def test_weights_of_another_encoder_are_refused(tmp_path: Path) -> None:
    file = save(torchvision_model(), tmp_path / "resnet18.pt")
    with pytest.raises(UserError, match="got weights of resnet18, expected those of resnet34"):
        encoder("resnet34", weights=file)
    with pytest.raises(UserError, match="0% of the values of resnet18 fit"):
        encoder("resnet18", 0.5, weights=file)
    with pytest.raises(UserError, match="0% of the values of timm/test_vit fit"):
        encoder("timm/test_vit", image_size=160, weights=file)
    with pytest.raises(UserError, match="got no such file"):
        encoder("resnet18", weights=tmp_path / "missing.pt")


@pytest.mark.slow
def test_a_run_starts_with_the_weights_and_resumes_without_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = write(tmp_path / "photos", {f"{number}.jpg": jpeg(photo(20, 20, seed=number)) for number in range(8)})
    file = save(torchvision_model(), tmp_path / "resnet18.pt")
    options = [f"--data.train={photos}", "--data.image_size=16", "--model.encoder=resnet18", "--model.stem=imagenet"]
    options += [f"--model.weights={file}", "--model.freeze_epochs=1", "--batch_size=4", "--device=cpu", "--epochs=2"]
    options += ["--precision=fp32", "--data.workers=0", f"--output={tmp_path / 'run'}"]
    assert main([*options, "--max_steps=1"]) == 0
    assert "weights: 120 of 120 tensors from a ResNet's state dict" in capsys.readouterr().out
    frozen, theirs = load_encoder(tmp_path / "run"), torchvision_model()
    theirs.fc = nn.Identity()
    assert torch.equal(frozen(images(2, 3, 64, 64)), theirs(images(2, 3, 64, 64)))
    file.unlink()
    assert main([*options, "--max_steps=2"]) == 0
    assert "weights:" not in capsys.readouterr().out
