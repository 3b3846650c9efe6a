"""References to objects of the user's own code."""

import sys
from pathlib import Path

import pytest

from fastsimclr.errors import UserError
from fastsimclr.imports import import_object, is_object_reference


@pytest.fixture(autouse=True)
def _restore_modules(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        del sys.modules[name]


@pytest.mark.parametrize("text", ["x.py:name", "a/b/x.py:name", "pkg.mod:name", "a.b.c:_name", "/abs/x.py:name"])
def test_reference(text: str) -> None:
    assert is_object_reference(text)


@pytest.mark.parametrize(
    "text",
    ["cifar10:ROOT", "stl10:/data/stl", "digits", "https://host/x.py:name", "s3://a.b:name", "C:data", r"C:\data.set",
     "x.py", "x.py:", "x.py:a.b", "x.py:1", "a/b.c:name", "timm/vit_tiny", "shards-{000..127}.tar"],
)  # fmt: skip
def test_no_reference(text: str) -> None:
    assert not is_object_reference(text)


def test_an_existing_path_is_no_reference() -> None:
    assert is_object_reference("photos.raw:selected")
    Path("photos.raw:selected").mkdir()
    assert not is_object_reference("photos.raw:selected")


def test_object_of_a_file_and_of_a_package() -> None:
    Path("folder").mkdir()
    Path("folder/my_things.py").write_text("class Thing: pass\nanswer = 42\n")
    Path("my_package").mkdir()
    Path("my_package/sub.py").write_text("from my_package import other\nanswer = other.answer + 1\n")
    Path("my_package/other.py").write_text("answer = 42\n")

    assert import_object("folder/my_things.py:answer") == 42
    assert import_object("my_package.sub:answer") == 43
    thing = import_object("folder/my_things.py:Thing")
    assert thing is import_object(f"{Path.cwd()}/folder/my_things.py:Thing")
    assert sys.modules[thing.__module__].Thing is thing  # importable, so that workers can unpickle it


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("nothing.py:name", "got nothing.py, expected an existing Python file"),
        ("no.such.module:name", "got module no.such.module, which is not found in"),
        ("things_one.py:make_dataste", "defines no 'make_dataste': did you mean make_dataset"),
        ("json.py:name", "got json.py, but json is also the name of"),
        ("broken_one.py:name", r"fails to import: NameError: name 'undefined' .*\(broken_one.py, line 2\)"),
        ("syntax_one.py:name", "fails to import: SyntaxError"),
        ("needs_one.py:name", "fails to import: ModuleNotFoundError: No module named 'missing_one'"),
        ("name", "expected FILE.py:NAME or PACKAGE.MODULE:NAME"),
    ],
)
def test_user_errors_in_one_line(reference: str, message: str) -> None:
    Path("things_one.py").write_text("def make_dataset(): ...\n")
    Path("json.py").write_text("name = 1\n")
    Path("broken_one.py").write_text("\nundefined\n")
    Path("syntax_one.py").write_text("def f(:\n")
    Path("needs_one.py").write_text("import missing_one\n")
    with pytest.raises(UserError, match=message) as raised:
        import_object(reference)
    assert "\n" not in str(raised.value)
