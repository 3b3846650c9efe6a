"""python -m fastsimclr.evaluate: accuracies against scikit-learn, weights that must not change, and user errors."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from pictures import SHARED_DATA, jpeg, photo, write
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torchvision.models import resnet18

from fastsimclr.data import Source, open_source
from fastsimclr.data.loader import LoaderConfig
from fastsimclr.evaluate import main
from fastsimclr.evaluation.features import embed
from fastsimclr.models import EncoderSpec
from fastsimclr.pretrained import open_pretrained
from fastsimclr.train import main as train

CIFAR10 = SHARED_DATA / "cifar10"
FAST = ["--precision=fp32", "--device=cpu"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run on digits of 16 pixels: better than random weights, far from perfect."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    options = [
        "--epochs=2",
        "--knn_every=0",
        "--model.width=1",
        "--data.image_size=16",
        "--device=cpu",
        "--precision=fp32",
    ]
    assert train([*options, f"--output={folder}"]) == 0
    return folder


def evaluate(tmp_path: Path, *arguments: str) -> dict[str, Any]:
    """Run an evaluation and return its JSON record."""
    assert main([*arguments, *FAST, f"--output={tmp_path}"]) == 0
    (file,) = tmp_path.glob("*.json")
    record: dict[str, Any] = json.loads(file.read_text())
    return record


def features(run: Path, source: Source) -> tuple[np.ndarray, np.ndarray]:
    """Return the representations in float64 and the labels."""
    opened = open_pretrained(run)
    assert opened.augmentation is not None
    _, values, labels = embed(
        opened.encoder, source, opened.augmentation, LoaderConfig(batch_size=256, backend="memory")
    )
    return values.double().numpy(), labels.numpy()


@pytest.fixture(scope="module")
def cifar10(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """1,500 and 500 images of CIFAR-10 in class folders."""
    if not (CIFAR10 / "test.tar").exists():
        pytest.skip("needs CIFAR-10 in shared/data next to the repository")
    folder = tmp_path_factory.mktemp("cifar10")
    source = open_source(str(CIFAR10 / "test.tar"))
    for number in range(2000):
        i = number * 5
        part = folder / ("train" if number % 4 else "val") / source.classes[source.labels[i]]
        part.mkdir(parents=True, exist_ok=True)
        (part / f"{i}.png").write_bytes(source.read(i).tobytes())  # type: ignore[attr-defined]
    return folder / "train", folder / "val"


class Features(NamedTuple):
    """Options that select data, and the representations of its images by the run's encoder."""

    options: list[str]
    bank: np.ndarray
    bank_labels: np.ndarray
    queries: np.ndarray
    labels: np.ndarray


@pytest.fixture(scope="module", params=["digits", "cifar10"])
def computed(request: pytest.FixtureRequest, run: Path) -> Features:
    if request.param == "digits":
        options, sources = [], (open_source("digits"), open_source("digits", split="val"))
    else:
        train, val = request.getfixturevalue("cifar10")
        options, sources = (
            [f"--data.train={train}", f"--data.val={val}"],
            (open_source(str(train)), open_source(str(val))),
        )
    return Features(options, *features(run, sources[0]), *features(run, sources[1]))


def as_stored(values: np.ndarray) -> np.ndarray:
    """Return representations as kNN keeps them: normalized, in float16."""
    return (values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.float32).astype(np.float16).astype(float)


@pytest.mark.parametrize(("k", "temperature"), [(1, None), (20, None), (20, 0.07), (200, 0.07)])
@pytest.mark.slow
def test_knn_matches_scikit_learn(
    tmp_path: Path, run: Path, computed: Features, k: int, temperature: float | None
) -> None:
    weights: Any = "uniform" if temperature is None else lambda distance: np.exp(-distance / temperature)
    # Distances of our own: metric="cosine" would normalize the rows again, which the rounding to float16 made unequal.
    theirs = KNeighborsClassifier(k, metric="precomputed", weights=weights)
    bank, queries = (as_stored(values) for values in (computed.bank, computed.queries))
    expected = theirs.fit(2 - bank @ bank.T, computed.bank_labels).score(2 - queries @ bank.T, computed.labels)
    word = "none" if temperature is None else str(temperature)
    record = evaluate(tmp_path, "knn", f"--checkpoint={run}", f"--k={k}", f"--temperature={word}", *computed.options)
    assert 0.1 < expected < 1
    assert record["top1"] == pytest.approx(expected, abs=1.01 / len(computed.labels))
    assert record["val"]["images"] == len(computed.labels)


@pytest.mark.parametrize("c", ["auto", "0.01", "1"])
@pytest.mark.slow
def test_logistic_regression_matches_scikit_learn(tmp_path: Path, run: Path, computed: Features, c: str) -> None:
    record = evaluate(tmp_path, "linear", "--solver=lbfgs", f"--c={c}", f"--checkpoint={run}", *computed.options)
    theirs = LogisticRegression(C=record["settings"]["c"], tol=1e-6, max_iter=5000)
    pipeline = make_pipeline(StandardScaler(), theirs).fit(computed.bank, computed.bank_labels)
    expected = pipeline.score(computed.queries, computed.labels)
    assert 0.15 < expected < 1
    assert record["top1"] == pytest.approx(expected, abs=1.01 / len(computed.labels))


@pytest.mark.slow
def test_regularization_is_chosen_without_the_validation_images(tmp_path: Path, run: Path) -> None:
    """Other validation images give the same C and held-out accuracies, which are measured on a fifth of each class of
    the training images."""
    first = evaluate(tmp_path / "a", "linear", "--solver=lbfgs", f"--checkpoint={run}")
    photos = tmp_path / "val"
    source = open_source("digits", split="val")
    for i in range(100):
        file = photos / source.classes[source.labels[i]] / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(source.images[i].numpy()).save(file)  # type: ignore[attr-defined]
    options = ("linear", "--solver=lbfgs", f"--checkpoint={run}", "--data.train=digits", f"--data.val={photos}")
    second = evaluate(tmp_path / "b", *options)
    assert first["val"]["images"] != second["val"]["images"]
    assert first["settings"] == second["settings"]
    accuracies = np.array(list(first["settings"]["held_out_accuracy"].values()))
    held_out = sum(int(0.2 * n) for n in np.bincount(open_source("digits").labels))
    assert np.allclose(accuracies * held_out, np.rint(accuracies * held_out))
    assert accuracies.max() > accuracies.min()


@pytest.mark.parametrize("solver", ["sgd", "lbfgs"])
@pytest.mark.slow
def test_linear_keeps_the_encoder_bit_identical(tmp_path: Path, run: Path, solver: str) -> None:
    """Neither parameters nor BatchNorm statistics change, and the saved classifier has the reported accuracy."""
    before = {k: v.clone() for k, v in open_pretrained(run).encoder.state_dict().items()}
    record = evaluate(tmp_path, "linear", f"--solver={solver}", "--epochs=2", "--lr=1", f"--checkpoint={run}")
    (file,) = tmp_path.glob("*.pt")
    state = torch.load(file, weights_only=True)
    assert {k for k in state if not k.startswith("fc.")} == set(before)
    assert all(torch.equal(state[name], value) for name, value in before.items())

    values, labels = features(run, open_source("digits", split="val"))
    logits = torch.from_numpy(values).float() @ state["fc.weight"].T + state["fc.bias"]
    assert (logits.argmax(1).numpy() == labels).mean() == pytest.approx(record["top1"], abs=1.01 / len(labels))


@pytest.mark.slow
def test_finetune_changes_all_weights_and_loads_in_torchvision(tmp_path: Path, run: Path) -> None:
    before = open_pretrained(run).encoder.state_dict()
    evaluate(tmp_path, "finetune", "--epochs=1", "--labels=0.2", "--lr=0.1", f"--checkpoint={run}")
    state = torch.load(tmp_path / "finetune-0.2.pt", weights_only=True)
    same = [name for name, value in before.items() if torch.equal(state[name], value)]
    assert same == []
    resnet18(num_classes=10).load_state_dict(state, strict=True)


@pytest.mark.slow
def test_supervised_starts_from_new_weights_of_the_same_shapes(tmp_path: Path, run: Path) -> None:
    """With a negligible learning rate, the saved weights are the initial ones, not the checkpoint's."""
    options = ["supervised", "--epochs=1", "--labels=0.2", "--lr=1e-12", "--weight_decay=0"]
    evaluate(tmp_path / "a", *options, f"--checkpoint={run}")
    state = torch.load(tmp_path / "a" / "supervised-0.2.pt", weights_only=True)
    trained = open_pretrained(run).encoder.state_dict()
    assert not torch.equal(state["conv1.weight"], trained["conv1.weight"])
    assert state["conv1.weight"].shape == trained["conv1.weight"].shape
    named = ["--encoder=resnet18", "--stem=imagenet", "--data.train=digits", "--data.image_size=16"]
    evaluate(tmp_path / "b", *options, *named)
    again = torch.load(tmp_path / "b" / "supervised-0.2.pt", weights_only=True)
    torch.testing.assert_close(again["conv1.weight"], state["conv1.weight"])  # the same seed


@pytest.mark.slow
def test_finetune_learns(tmp_path: Path, run: Path) -> None:
    record = evaluate(tmp_path, "finetune", "--epochs=5", f"--checkpoint={run}", "--lr=0.2")
    losses = record["settings"]["epoch_losses"]
    assert losses[-1] < 0.6 * losses[0]
    assert record["top1"] > 0.7
    assert record["top5"] >= record["top1"]
    confusion = np.array(record["confusion"])
    assert confusion.shape == (10, 10)
    assert confusion.sum() == 364
    assert confusion.trace() / 364 == pytest.approx(record["top1"])
    per_class = dict(zip(record["classes"], confusion.diagonal() / confusion.sum(1), strict=True))
    assert record["per_class"] == pytest.approx(per_class)


@pytest.mark.slow
def test_printed_line_and_json_record(tmp_path: Path, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = evaluate(tmp_path, "knn", f"--checkpoint={run}", "--k=20")
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    assert f"top-1 {record['top1']:.2%}, top-5 {record['top5']:.2%} on 364 images" in out
    assert record["encoder"] == asdict(EncoderSpec("resnet18", image_size=16)) | {"features": 512}
    assert record["settings"] == {"k": 20, "temperature": 0.07, "leave_one_out": False}
    assert record["options"]["data"]["image_size"] == 16  # from the checkpoint


@pytest.mark.slow
def test_results_are_written_to_the_run_and_not_overwritten(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["knn", f"--checkpoint={run / 'checkpoints' / 'last.pt'}", *FAST]
    assert main([*options, "--k=5"]) == 0
    file = run / "evaluate" / "knn.json"
    written = file.read_bytes()
    capsys.readouterr()
    assert main([*options, "--k=6"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "--force" in error
    assert file.read_bytes() == written
    assert main([*options, "--k=6", "--force"]) == 0
    assert json.loads(file.read_text())["settings"]["k"] == 6


@pytest.mark.slow
def test_classifier_without_a_record_is_not_overwritten(run: Path, tmp_path: Path) -> None:
    (tmp_path / "linear.pt").write_bytes(b"existing")
    assert main(["linear", f"--checkpoint={run}", f"--output={tmp_path}", "--epochs=1", *FAST]) == 2
    assert (tmp_path / "linear.pt").read_bytes() == b"existing"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """labeled/{a,b}, other/{a,c} and flat/ with a few photos each."""
    folder = tmp_path_factory.mktemp("folders")
    for part in ("labeled/a", "labeled/b", "other/a", "other/c", "flat"):
        write(folder / part, {f"{i}.jpg": jpeg(photo(40, 30, seed=i)) for i in range(3)})
    return folder


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "expected one of knn, linear, finetune, supervised"),
        (["knnn"], "got knnn"),
        (["knn"], "--checkpoint: got none"),
        (["knn", "--checkpoint=nowhere.pt"], "nowhere.pt"),
        (["knn", "--checkpoint=RUN", "--encoder=resnet50"], "run: got a resnet18, expected a resnet50"),
        (["supervised", "--data.train=digits"], "--encoder: got none"),
        (["supervised", "--encoder=vit", "--data.train=digits", "--output=OUT"], "vit"),
        (["knn", "--checkpoint=RUN", "--data.train=FOLDERS/flat"], "no labels"),
        (["knn", "--checkpoint=RUN", "--data.train=FOLDERS/labeled", "--data.val=FOLDERS/flat"], "no labels"),
        (["knn", "--checkpoint=RUN", "--data.train=FOLDERS/nothing"], "nothing at that path"),
        (["knn", "--checkpoint=RUN", "--data.train=FOLDERS/labeled", "--data.val=FOLDERS/other"], "b only in train"),
        (["knn", "--checkpoint=RUN", "--data.train=FOLDERS/labeled", "--k=6"], "more than the 5 images"),
        (["knn", "--checkpoint=RUN", "--k=0"], "--k: got 0"),
        (["knn", "--checkpoint=RUN", "--temperature=0"], "--temperature: got 0"),
        (["knn", "--checkpoint=RUN", "--epochs=3"], "--epochs"),
        (["linear", "--checkpoint=RUN", "--data.train=FOLDERS/labeled"], "--data.val: got none"),
        (["linear", "--checkpoint=RUN", "--labels=0"], "--labels: got 0"),
        (["linear", "--checkpoint=RUN", "--labels=1.5"], "--labels: got 1.5"),
        (["linear", "--checkpoint=RUN", "--labels=nowhere.txt"], "nowhere.txt"),
        (["linear", "--checkpoint=RUN", "--solver=svm"], "--solver"),
        (["linear", "--checkpoint=RUN", "--lr=-1"], "--lr: got -1"),
        (["finetune", "--checkpoint=RUN", "--labels=0.1", "--epochs=2", "--lr=1e30"], "--lr: got 1e+30"),
    ],
)
def test_user_error_is_one_line_with_exit_code_2(
    run: Path,
    folders: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    expected: str,
) -> None:
    paths = {"RUN": run, "FOLDERS": folders, "OUT": tmp_path}
    for word, path in paths.items():
        arguments = [argument.replace(word, str(path)) for argument in arguments]
    if arguments and not any(argument.startswith("--output") for argument in arguments):
        arguments.append(f"--output={tmp_path}")
    assert main([*arguments, *(FAST if arguments else [])]) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if "epoch" not in line or "error" in line]
    assert len(error) == 1, error
    assert error[0].startswith("fastsimclr.evaluate: error: ")
    assert expected in error[0]
    assert list(tmp_path.glob("*.json")) == []
