"""fastsimclr shard: any source as tar shards, which open as the same images, labels and classes."""

import io
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from pictures import exif, jpeg, open_encoded, photo, photo_folder, write
from PIL import Image

from fastsimclr import Augmentation, open_views
from fastsimclr.data import open_source
from fastsimclr.data import writing as writing_module
from fastsimclr.data.sources import EncodedSource
from fastsimclr.data.tars import open_tars
from fastsimclr.data.writing import MANIFEST, write_shards
from fastsimclr.shard import main


def shards_of(folder: Path) -> list[str]:
    return sorted(str(path) for path in folder.glob("*.tar"))


def labels_and_names(source: EncodedSource) -> list[tuple[int, str]]:
    return [(label, source.class_name(label) if label >= 0 else "") for label in source.labels.tolist()]


@pytest.mark.parametrize("classes", [("a", "b"), ("0", "1", "10", "2"), ("7", "008")])
def test_a_folder_of_classes_keeps_bytes_labels_and_names(tmp_path: Path, classes: tuple[str, ...]) -> None:
    write(tmp_path / "photos", {f"{name}/{n}.JPG": b"%s%d" % (name.encode(), n) for name in classes for n in range(3)})
    assert main([str(tmp_path / "photos"), "--output", str(tmp_path / "out"), "--workers", "0"]) == 0
    before, after = open_encoded(tmp_path / "photos"), open_encoded(tmp_path / "out" / "*.tar")
    assert labels_and_names(after) == labels_and_names(before)
    assert list(after.classes) == list(before.classes)
    assert [after.read(n).tobytes() for n in range(len(after))] == [
        before.read(n).tobytes() for n in range(len(before))
    ]


def test_other_sources(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "flat", {"1.jpg": jpeg(photo(9, 9)), "2.PNG": b"damaged: copied as it is"})
    assert main([str(tmp_path / "flat"), "--output", str(tmp_path / "a"), "--workers", "0"]) == 0
    assert main([f"{tmp_path}/a/*.tar", "--output", str(tmp_path / "b"), "--workers", "0"]) == 0
    assert main(["digits", "--output", str(tmp_path / "c"), "--workers", "0"]) == 0
    assert f"{len(open_source('digits')):,} images of 10 classes in 1 shards" in capsys.readouterr().out
    flat, digits = open_encoded(tmp_path / "b" / "*.tar"), open_encoded(tmp_path / "c" / "*.tar")
    assert flat.labels.tolist() == [-1, -1]
    assert flat.read(1).tobytes() == b"damaged: copied as it is"
    original = open_source("digits")
    assert digits.labels.tolist() == original.labels.tolist()
    assert Image.open(io.BytesIO(digits.read(5).tobytes())).format == "PNG"
    arrays = open_source((np.arange(2 * 4 * 4 * 5, dtype=np.uint16).reshape(2, 4, 4, 5), np.array([0, -1])))
    write_shards(arrays, tmp_path / "d", resize=None, shard_mb=1, workers=0)
    stored = open_encoded(tmp_path / "d" / "*.tar")
    assert np.load(io.BytesIO(stored.read(1).tobytes())).tolist() == (np.arange(80) + 80).reshape(4, 4, 5).tolist()
    assert stored.labels.tolist() == [0, -1]


def test_resize(tmp_path: Path) -> None:
    small = jpeg(photo(40, 60))
    files = {
        "0.jpg": small,
        "1.jpg": jpeg(photo(80, 200), exif=exif(6)),
        "2.jpg": jpeg(photo(200, 200))[:-900],
        "3.jpg": b"no image",
    }
    output = io.BytesIO()
    Image.fromarray(photo(100, 90)).convert("RGBA").save(output, "PNG")
    files["4.png"] = output.getvalue()
    output = io.BytesIO()
    Image.fromarray(np.full((100, 90), 999, np.uint16)).save(output, "PNG")
    files["5.png"] = output.getvalue()
    write(tmp_path / "in", files)
    manifest = write_shards(open_source(str(tmp_path / "in")), tmp_path / "out", resize=40, shard_mb=1, workers=0)
    source = open_encoded(tmp_path / "out" / "*.tar")
    assert source.read(0).tobytes() == small
    turned, png = (Image.open(io.BytesIO(source.read(n).tobytes())) for n in (1, 2))
    assert (turned.format, turned.size, turned.getexif().get(274)) == ("JPEG", (40, 100), None)
    assert (png.format, png.size, png.mode) == ("PNG", (40, 44), "RGB")
    assert [name for name, _ in manifest.skipped] == ["2.jpg", "3.jpg", "5.png"]
    assert "expected 8 bits: leave out --resize" in manifest.skipped[2][1]


def test_verify_and_other_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photo_folder(tmp_path / "photos", 6)
    command = [str(tmp_path / "photos"), "--output", str(tmp_path / "out"), "--workers", "0"]
    verify = ["--output", str(tmp_path / "out"), "--verify"]
    assert main(verify) == 2
    assert main(command) == 0
    assert main(verify) == 0
    shard = tmp_path / "out" / "shard-000000.tar"
    data = bytearray(shard.read_bytes())
    data[5000] ^= 1
    shard.write_bytes(data)
    capsys.readouterr()
    assert main(verify) == 2
    assert f"{shard}: got SHA-256 " in capsys.readouterr().err
    shard.unlink()
    assert main(verify) == 2
    assert main(command) == 0, "writes the missing shard again"
    assert main(verify) == 0
    assert main([*command, "--resize", "50"]) == 2
    assert "has shards of other images or options, expected a new folder" in capsys.readouterr().err
    assert main([str(tmp_path / "photos"), "--output", str(tmp_path / "photos")]) == 2
    assert "which has files in it, expected a new folder" in capsys.readouterr().err
    (tmp_path / "out" / MANIFEST).write_text("{}")
    assert main(verify) == 2
    assert main(command + verify[2:]) == 2
    assert "got PATH and --verify, expected one" in capsys.readouterr().err


def test_the_index_beside_the_shards_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    photo_folder(tmp_path / "photos", 6)
    write_shards(open_source(str(tmp_path / "photos")), tmp_path / "out", resize=None, shard_mb=1, workers=0)
    read = open_tars(shards_of(tmp_path / "out"), tmp_path / "cache")
    monkeypatch.setattr("fastsimclr.data.tars.read_local_shards", None)  # would be called
    indexed = open_tars(shards_of(tmp_path / "out"), tmp_path / "cache")
    assert (indexed.digest(), indexed.classes) == (read.digest(), read.classes) == (read.digest(), ["a", "b", "c"])


@pytest.mark.slow
def test_killed_and_resumed_it_writes_the_same(tmp_path: Path) -> None:
    side = 700  # 3 images make a shard of 1 MB: 12 shards
    noise = np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8)
    files = {f"{'ab'[n % 2]}/{n:03}.jpg": jpeg(np.roll(noise, n, 0), quality=20) for n in range(36)}
    write(tmp_path / "photos", files)
    command = [sys.executable, "-m", "fastsimclr.shard", str(tmp_path / "photos"), "--shard_mb", "1", "--resize", "600"]
    subprocess.run([*command, "--output", str(tmp_path / "whole")], check=True, capture_output=True)
    whole = shards_of(tmp_path / "whole")
    assert len(whole) > 5
    run = subprocess.Popen([*command, "--output", str(tmp_path / "out")], stderr=subprocess.DEVNULL)
    while not (run.poll() is not None or len(shards_of(tmp_path / "out")) > 1):
        time.sleep(0.01)
    run.send_signal(signal.SIGKILL)
    run.wait()
    kept = json.loads((tmp_path / "out" / MANIFEST).read_text())
    assert not kept["complete"]
    times = {path: Path(path).stat().st_mtime_ns for path in shards_of(tmp_path / "out")}
    subprocess.run([*command, "--output", str(tmp_path / "out")], check=True, capture_output=True)
    for shard in kept["shards"].values():
        path = str(tmp_path / "out" / shard["name"])
        assert Path(path).stat().st_mtime_ns == times[path], "a complete shard is not written again"
    assert json.loads((tmp_path / "out" / MANIFEST).read_text()) == json.loads(
        (tmp_path / "whole" / MANIFEST).read_text()
    )
    assert [Path(a).read_bytes() for a in shards_of(tmp_path / "out")] == [Path(b).read_bytes() for b in whole]


@pytest.mark.slow
def test_two_ranks_of_two_workers_see_each_image_once_an_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing_module, "_SAMPLED", 2)
    photo_folder(tmp_path / "photos", 24)
    write_shards(open_source(str(tmp_path / "photos")), tmp_path / "out", resize=None, shard_mb=1, workers=2)
    for epoch in range(2):
        seen: list[int] = []
        for rank in range(2):
            views = open_views(
                f"{tmp_path}/out/*.tar",
                Augmentation(image_size=16),
                8,
                backend="torchvision",
                device="cpu",
                workers=2,
                rank=rank,
                world_size=2,
            )
            views.set_epoch(epoch)
            seen += [int(index) for batch in views for index in batch.index]
            views.close()
        assert sorted(seen) == list(range(24))
