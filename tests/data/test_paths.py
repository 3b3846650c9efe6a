"""Absolute paths of images in the record of a run."""

from pathlib import Path

import pytest

from fastsimclr.data.paths import absolute_path


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("photos", "HERE/photos"),
        ("../photos/", "UP/photos"),
        ("/data/photos", "/data/photos"),
        ("~/photos", "HOME/photos"),
        ("shards/train-{000..127}.tar", "HERE/shards/train-{000..127}.tar"),
        ("*.tar", "HERE/*.tar"),
        ("array.npy", "HERE/array.npy"),
        ("mydata.py:make", "HERE/mydata.py:make"),
        ("package.module:make", "package.module:make"),
        ("digits", "digits"),
        ("cifar10", "cifar10"),
        ("cifar10:data", "cifar10:HERE/data"),
        ("object:ndarray", "object:ndarray"),
        ("s3://bucket/train-{0..7}.tar", "s3://bucket/train-{0..7}.tar"),
    ],
)
def test_only_paths_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str, expected: str) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HOME", "/home/someone")
    for name, path in (("HERE", str(tmp_path / "here")), ("UP", str(tmp_path)), ("HOME", "/home/someone")):
        expected = expected.replace(name, path)
    assert absolute_path(given) == expected
