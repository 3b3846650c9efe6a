"""Checkpoints: written atomically, and loaded without executing code."""

import os
import pickle
from pathlib import Path

import pytest
import torch

from fastsimclr import UserError
from fastsimclr.run_folder import RunFolder, load_checkpoint


class Payload:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("executed",)


def test_save_and_load_round_trip(tmp_path: Path) -> None:
    state = {"model": {"w": torch.randn(3, dtype=torch.float64)}, "step": 7, "untrained_knn": None}
    RunFolder(tmp_path).save(state)
    loaded = load_checkpoint(RunFolder(tmp_path).checkpoint)
    assert torch.equal(loaded["model"]["w"], state["model"]["w"])  # type: ignore[index]
    assert loaded["step"] == 7


def test_failed_save_keeps_the_previous_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunFolder(tmp_path)
    run.save({"step": 1})

    def fail(state: object, stream: object) -> None:
        stream.write(b"half of it")  # type: ignore[attr-defined]
        raise OSError("the disk is full")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="disk is full"):
        run.save({"step": 2})
    assert load_checkpoint(run.checkpoint)["step"] == 1
    assert [file.name for file in run.checkpoint.parent.iterdir()] == ["last.pt"]


def test_loading_an_invalid_checkpoint_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    RunFolder(".").save({"step": 1, "w": torch.zeros(1000)})
    Path("short.pt").write_bytes(Path("checkpoints/last.pt").read_bytes()[:-500])
    Path("empty.pt").write_bytes(b"")
    Path("text.pt").write_text("not a checkpoint")
    Path("code.pt").write_bytes(pickle.dumps(Payload(), protocol=2))
    torch.save({"step": 1}, "foreign.pt")
    for name in ("short", "empty", "text", "code", "foreign", "missing"):
        with pytest.raises(UserError, match=rf"{name}\.pt: got .*expected"):
            load_checkpoint(Path(f"{name}.pt"))
    assert not Path("executed").exists()
