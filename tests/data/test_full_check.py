"""fastsimclr doctor --data: its summary, files and exit codes, and a check that is interrupted."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from pictures import broken, jpeg, photo, photo_folder, write

from fastsimclr.data.check_results import FOLDER
from fastsimclr.doctor import main

ROOT = Path(__file__).resolve().parents[2]


def test_bad_images_are_listed_and_the_exit_code_is_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], cache_home: Path
) -> None:
    folder = photo_folder(tmp_path / "photos", 12)
    write(folder, {"a/big.jpg": jpeg(photo(300, 400)), "c/small.jpg": jpeg(photo(1, 2))})
    write(folder, {f"b/{name}": data for name, data in broken().items()})
    images, bad = 14 + len(broken()), len(broken())
    assert main(["--data", str(folder), "--list", str(tmp_path / "bad_images.txt")]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"data: {folder}, {images} images, 3 classes"
    assert lines[1].startswith(f"checked: {images} images in ")
    assert lines[2].startswith("height x width: smallest 1 x 2, median ")
    assert lines[2].endswith(", largest 300 x 400")
    assert lines[3] == f"bad: {bad} of {images} images cannot be used"
    listed = (tmp_path / "bad_images.txt").read_text().splitlines()
    assert [line.removeprefix("  ") for line in lines[4:9]] == listed[:5]
    assert len(listed) == bad
    assert lines[9] == f"  and {bad - 5} more; --list FILE writes all"
    (file,) = (cache_home / FOLDER).iterdir()
    assert lines[10] == f"results: {file}; runs on this data use them"

    assert main(["--data", str(folder), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert (found["images"], found["classes"], found["read"]) == (images, 3, 0)
    assert found["sizes"]["largest"] == [300, 400]
    assert [f"{image['name']}: {image['reason']}" for image in found["bad"]] == listed


def test_exit_codes_of_good_and_of_missing_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache = tmp_path / "cache"
    folder = photo_folder(tmp_path / "photos", 3)
    assert main([f"--data={folder}", f"--cache={cache}"]) == 0
    assert "\nbad: none\n" in capsys.readouterr().out
    assert (cache / FOLDER).is_dir()
    assert main([f"--data={folder}", f"--cache={cache}"]) == 0
    assert ", 3 before\n" in capsys.readouterr().out
    assert main([f"--data={tmp_path}/nowhere"]) == 2
    assert "nowhere: got nothing at that path" in capsys.readouterr().err
    np.save(tmp_path / "a.npy", np.zeros((4, 8, 9, 3), np.uint8))
    assert main([f"--data={tmp_path}/a.npy", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["images"], found["read"], found["results"]) == (4, 0, None)
    assert found["sizes"]["median"] == [8, 9]


def check(folder: Path, *launcher: str) -> list[str]:
    return [sys.executable, "-m", *launcher, "fastsimclr.doctor", "--data", str(folder)]


@pytest.mark.slow
def test_an_interrupted_check_is_resumed(tmp_path: Path) -> None:
    folder = write(tmp_path / "photos", {"0000.jpg": jpeg(photo(3000, 3000))})
    for n in range(1, 2000):
        os.link(folder / "0000.jpg", folder / f"{n:04}.jpg")
    process = subprocess.Popen(check(folder), cwd=ROOT, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    first_line = process.stderr.readline()  # after five seconds
    assert first_line.startswith("checking images: ")
    started = time.monotonic()
    process.send_signal(signal.SIGTERM)
    _, rest = process.communicate(timeout=60)
    assert time.monotonic() - started < 10
    assert process.returncode == 128 + signal.SIGTERM
    assert rest.splitlines()[-1] == "fastsimclr.doctor: stopped by SIGTERM; run the same command to start again"
    for file in folder.iterdir():  # the rest quickly
        if int(file.stem) >= 60:
            file.unlink()
    done = subprocess.run(check(folder), cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert re.search(r", [1-9][0-9]* before$", done.stdout.splitlines()[1]), done.stdout


@pytest.mark.slow
def test_ranks_of_torchrun_share_the_check(tmp_path: Path) -> None:
    folder = photo_folder(tmp_path / "photos", 30)
    launcher = ("torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    for before in ("", ", 30 before"):
        done = subprocess.run(
            check(folder, *launcher), cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        lines = done.stdout.splitlines()
        assert len(lines) == 5, "only rank 0 prints"
        assert lines[1].endswith(before) if before else lines[1].startswith("checked: 30 images")
