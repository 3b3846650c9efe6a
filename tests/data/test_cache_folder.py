"""fastsimclr.data.cache_folder: where the user's cache lies, and how files in it are replaced."""

import os
from pathlib import Path

import pytest

from fastsimclr.data import cache_folder as module
from fastsimclr.data.cache_folder import cache_folder, write_to_cache


def test_option_then_xdg_then_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cache_folder(str(tmp_path / "given")) == tmp_path / "given"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "fastsimclr"
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for unset in ("", "relative/folder"):
        monkeypatch.setenv("XDG_CACHE_HOME", unset)
        assert cache_folder() == tmp_path / "home" / ".cache" / "fastsimclr"
    assert not list(tmp_path.iterdir())


def test_file_is_replaced_as_a_whole_and_its_folder_is_made(cache_home: Path) -> None:
    file = cache_home / "kind" / "a.txt"
    for text in ("first", "second"):
        assert write_to_cache(file, lambda partial, text=text: partial.write_text(text))
        assert file.read_text() == text

    def fail(partial: Path) -> None:
        partial.write_text("half")
        raise RuntimeError

    with pytest.raises(RuntimeError):
        write_to_cache(file, fail)
    assert [path.name for path in file.parent.iterdir()] == ["a.txt"]
    assert file.read_text() == "second"


def test_folder_that_cannot_be_written_is_noted_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_noted", set())
    blocked = tmp_path / "file"
    blocked.touch()
    assert not write_to_cache(blocked / "a", Path.touch)
    assert not write_to_cache(blocked / "b", Path.touch)
    assert capsys.readouterr().err.splitlines() == [
        f"{blocked}: cannot be written (File exists); nothing is cached there"
    ]
    assert os.listdir(tmp_path) == ["file"]
