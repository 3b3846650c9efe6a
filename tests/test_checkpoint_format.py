"""Checkpoints: whatever is wrong with a file or its contents is found and said in one line, and no code is executed."""

import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import make_state

from fastsimclr import UserError
from fastsimclr.checkpoint_format import CONTENTS, load_checkpoint, write_checkpoint


class Payload:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("executed",)


@pytest.fixture
def good(tmp_path: Path) -> Path:
    write_checkpoint(make_state(), tmp_path / "good.pt")
    return tmp_path / "good.pt"


@pytest.mark.parametrize("mmap", [False, True])
def test_round_trip(good: Path, mmap: bool) -> None:
    expected, loaded = make_state(), load_checkpoint(good, mmap=mmap)
    assert torch.equal(loaded["model"].pop("weight"), expected["model"].pop("weight"))
    momentum = [state["optimizer"]["state"].pop(0)["momentum_buffer"] for state in (loaded, expected)]
    assert torch.equal(*momentum)
    assert loaded == expected


def test_file_is_readable_by_torch_and_zip_tools(good: Path) -> None:
    assert torch.load(good, weights_only=True)["step"] == 7
    with zipfile.ZipFile(good) as archive:
        assert archive.testzip() is None
        assert archive.comment.startswith(b"fastsimclr ")


def test_every_bit_flip_and_truncation_is_found(tmp_path: Path) -> None:
    write_checkpoint(make_state(), tmp_path / "good.pt")
    data = (tmp_path / "good.pt").read_bytes()
    rng, file = np.random.default_rng(0), tmp_path / "bad.pt"
    end = range(8 * (len(data) - 60), 8 * len(data))  # the end of the directory and the checksum: each bit
    for bit in [*rng.integers(0, 8 * len(data), 200).tolist(), *end]:
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        file.write_bytes(damaged)
        with pytest.raises(UserError, match=r"bad\.pt: got a .*expected"):
            load_checkpoint(file)
    for size in [*rng.integers(0, len(data), 50).tolist(), *range(len(data) - 25, len(data))]:
        file.write_bytes(data[:size])
        with pytest.raises(UserError, match=r"bad\.pt: got a .*expected"):
            load_checkpoint(file)
    file.write_bytes(data + b"\0")
    with pytest.raises(UserError, match=r"bad\.pt: got a .*expected"):
        load_checkpoint(file)


def test_loading_another_file_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty.pt").write_bytes(b"")
    Path("text.pt").write_text("not a checkpoint")
    Path("code.pt").write_bytes(pickle.dumps(Payload(), protocol=2))
    Path("folder.pt").mkdir()
    torch.save(make_state(), "foreign.pt")
    for name in ("empty", "text", "code", "folder", "foreign", "missing"):
        with pytest.raises(UserError, match=rf"{name}\.pt: got .*expected") as raised:
            load_checkpoint(Path(f"{name}.pt"))
        assert "\n" not in str(raised.value)
    assert not Path("executed").exists()


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "format": ({"format": 1}, "format: got 1, expected 3"),
    "unknown key": ({"extra": 1}, "contents: got the unknown key 'extra'"),
    "negative step": ({"step": -1}, "step: got -1, expected an integer of at least 0"),
    "huge step": ({"step": 2**70}, "step: got 1180591620717411303424, expected"),
    "step as text": ({"step": "7"}, "step: got '7'"),
    "step true": ({"step": True}, "step: got True"),
    "batch size": ({"batch_size": 0}, "batch_size: got 0"),
    "architecture": ({"architecture": {"encoder": {"name": "resnet18"}}}, r"architecture\.encoder: got no width"),
    "no model": ({"model": {}}, "model: got a dict, expected tensors by name"),
    "numbers for tensors": ({"model": {"weight": 1.0}}, "model: got a dict, expected tensors by name"),
    "optimizer": ({"optimizer": {"state": [], "param_groups": []}}, r"optimizer\.state: got \[\]"),
    "groups": ({"optimizer": {"state": {}, "param_groups": [{}]}}, r"optimizer\.param_groups: got"),
    "scale": ({"grad_scaler": {"scale": 0.0}}, "grad_scaler: got a dict, expected a positive scale"),
    "scale nan": ({"grad_scaler": {"scale": float("nan")}}, "grad_scaler: got a dict, expected a positive scale"),
    "position": ({"data": {"images": 80, "seed": 0, "epoch": -1, "position": 0}}, r"data\.epoch: got -1"),
    "no position": ({"data": {"images": 80, "seed": 0, "epoch": 1}}, "data: got no position"),
    "skipped": ({"skipped_images": {"seen": 0, "bad": [(0, 1, 2)]}}, r"skipped_images\.bad: got \[\(0, 1, 2\)\]"),
    "callbacks": ({"callbacks": {"a": 1}}, "callbacks: got a dict"),
    "accuracy": ({"untrained_knn": 1.5}, "untrained_knn: got 1.5"),
    "record": ({"unfinished_epoch": {"epoch": 1}}, "unfinished_epoch: got a dict"),
    "config": ({"config": b"epochs: 2"}, "config: got b'epochs: 2', expected the YAML of a configuration"),
    "torn config": ({"config": "data: ["}, r"config: got 'data: \['"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_contents_are_named(tmp_path: Path, case: str) -> None:
    changes, said = WRONG[case]
    file = tmp_path / "wrong.pt"
    write_checkpoint(make_state(**changes), file)
    with pytest.raises(UserError, match=rf"wrong\.pt: {said}") as raised:
        load_checkpoint(file)
    assert "\n" not in str(raised.value)


def test_missing_keys_are_named(tmp_path: Path) -> None:
    for key in CONTENTS:
        state = make_state()
        del state[key]
        write_checkpoint(state, tmp_path / f"{key}.pt")
    for key in CONTENTS:
        with pytest.raises(UserError, match=f"contents: got no {key}, expected one"):
            load_checkpoint(tmp_path / f"{key}.pt")
