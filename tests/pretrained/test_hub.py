"""Encoders on the Hugging Face Hub: a local cache laid out as huggingface_hub's, and the model card."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from weights import outputs, randomize_norms, save_run

from fastsimclr import UserError, encoder, load_encoder
from fastsimclr.export import main as export
from fastsimclr.models import Encoder

pytestmark = pytest.mark.usefixtures("one_thread")
HASH = "0123456789abcdef0123456789abcdef01234567"


def fill_cache(cache: Path) -> Encoder:
    """Export an encoder and store the folder as user/name in the cache; return the encoder."""
    model = randomize_norms(encoder("resnet18", stem="small"))
    save_run(Path("run"), model, "--data.image_size=32")
    assert export(["--checkpoint=run", "--format=safetensors", "--output=exported"]) == 0
    repository = cache / "hub" / "models--user--name"
    snapshot = repository / "snapshots" / HASH
    for folder in (snapshot, repository / "refs", repository / "blobs"):
        folder.mkdir(parents=True)
    (repository / "refs" / "main").write_text(HASH)
    (repository / "refs" / "v1.0").write_text(HASH)
    for number, file in enumerate(sorted(Path("exported").iterdir())):
        shutil.move(file, repository / "blobs" / str(number))
        (snapshot / file.name).symlink_to(Path("..", "..", "blobs", str(number)))
    assert isinstance(model, Encoder)
    return model


def offline(code: str, cache: Path) -> "subprocess.CompletedProcess[str]":
    """Run code in a process with this cache, because huggingface_hub reads its environment when it is imported."""
    environment = {"HF_HOME": str(cache), "HF_HUB_OFFLINE": "1", "PATH": "", "PYTHONPATH": ":".join(sys.path)}
    command = [sys.executable, "-c", f"import torch\nfrom fastsimclr import UserError, load_encoder\n{code}"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_encoder_is_loaded_from_the_cache_of_huggingface_hub(working_directory: Path) -> None:
    model = fill_cache(Path("cache"))
    done = offline(
        """
encoder = load_encoder("hf://user/name", "resnet18")
torch.save((encoder.state_dict(), encoder.transform.image_size), "loaded.pt")
assert set(load_encoder("hf://user/name@v1.0").state_dict()) == set(encoder.state_dict())
for reference in ("hf://user/name@v2.0", "hf://user/other"):
    try:
        load_encoder(reference)
    except UserError as error:
        print(error)
""",
        Path("cache").resolve(),
    )
    assert done.returncode == 0, done.stderr
    state, image_size = torch.load("loaded.pt", weights_only=True)
    assert image_size == 32
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    first, second = done.stdout.splitlines()
    for line, reference in ((first, "hf://user/name@v2.0"), (second, "hf://user/other")):
        assert line.startswith(f"{reference}: got a repository that is not in the cache, and no connection")


@pytest.mark.parametrize("reference", ["hf://name", "hf://user/name/file", "hf://user/name@", "hf://user/n ame"])
def test_invalid_reference_is_one_line(reference: str) -> None:
    with pytest.raises(UserError, match=f"got {reference}, expected hf://USER/NAME or hf://USER/NAME@REVISION"):
        load_encoder(reference)


def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match=r"hf://user/name: .*not installed; pip install 'fastsimclr\[hub\]'"):
        load_encoder("hf://user/name")


# The model card


def record(name: str, top1: float, step: int = 7, val: str | None = "/home/me/val") -> None:
    """Write a result as `evaluate` does."""
    Path("run/evaluate").mkdir(exist_ok=True)
    result = {"protocol": name, "origin": f"fastsimclr run, step {step}", "top1": top1, "train": {"path": "photos"}}
    Path(f"run/evaluate/{name}.json").write_text(json.dumps(result | {"val": {"path": val, "images": 500}}))


def test_model_card_has_only_the_figures_of_these_weights(working_directory: Path) -> None:
    save_run(Path("run"), encoder("resnet18"), "--data.train=/home/me/photos", "--batch_size=64")
    record("knn", 0.625)
    record("linear", 0.75, step=6)  # of other weights
    record("finetune", 0.875, val=None)
    record("supervised", 0.99)  # starts from new weights
    lines = [{"step": 6, "knn_accuracy": 0.111}, {"step": 7, "knn_accuracy": 0.5}, {"step": 7, "loss": 1.0}]
    Path("run/metrics.jsonl").write_text("".join(f"{json.dumps(line | {'epoch': 0})}\n" for line in lines))
    assert export(["--checkpoint=run", "--format=safetensors", "--output=folder"]) == 0
    assert sorted(file.name for file in Path("folder").iterdir()) == ["README.md", "config.json", "model.safetensors"]
    _, header, text = Path("folder/README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(header) == {
        "library_name": "fastsimclr",
        "pipeline_tag": "image-feature-extraction",
        "license": "unknown",
        "tags": ["simclr", "self-supervised", "contrastive-learning"],
    }
    for part in (
        "# resnet18\n",
        "SimCLR on photos (fastsimclr run, step 7)",
        "(N, 512)",
        "| batch_size | 64 |",
        "| kNN in training | photos | 50.00% |",
        "| knn | 500 images of val | 62.50% |",
        "| finetune | 500 images of photos, leave-one-out | 87.50% |",
    ):
        assert part in text, part
    for part in ("11.1", "75.0", "99.0", "/home/me"):
        assert part not in text
    assert "/home/me" not in Path("folder/config.json").read_text()


def test_model_card_without_a_run_has_no_recipe_and_no_results(working_directory: Path) -> None:
    save_run(Path("run"), encoder("resnet18"))
    torch.save(load_encoder("run").state_dict(), "weights.pt")
    assert export(["--checkpoint=weights.pt", "--format=safetensors", "--output=folder"]) == 0
    text = Path("folder/README.md").read_text()
    assert "without a recorded recipe" in text
    assert "## Recipe" not in text
    assert "## Results" not in text
    assert torch.equal(outputs(load_encoder("folder")), outputs(load_encoder("run")))
