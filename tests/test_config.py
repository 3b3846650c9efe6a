"""Parsing of command-line options and YAML files."""

import math
import re
from collections.abc import Iterator
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import pytest

from fastsimclr import Augmentation, UserError
from fastsimclr.config import Config, DataConfig, LossConfig, ModelConfig, OptimConfig, parse, to_yaml
from fastsimclr.evaluation.config import PROTOCOLS
from fastsimclr.presets import CONFIGS, preset_file
from fastsimclr.ranges import Range


def test_default_data_is_the_digits_demonstration() -> None:
    config = parse([])
    assert config.data.train == "digits"
    assert config.data.image_size == 32
    assert parse(["--epochs=3"]).data.train == "digits"
    assert "train: digits" in to_yaml(config)


def test_defaults_match_the_paper() -> None:
    config = parse(["--data.train=photos"])
    assert config == Config(data=type(config.data)(train="photos"))
    assert config.data.augmentation() == Augmentation()
    assert (config.model.encoder, config.optim.name, config.loss.temperature) == ("resnet50", "auto", 0.1)


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.yaml")), ids=lambda file: file.stem)
def test_presets_load_by_name_and_by_path(file: Path) -> None:
    assert preset_file(file.stem).samefile(file)
    by_name, by_file = parse(["--config", file.stem]), parse([f"--config={file}"])
    assert by_name == by_file
    assert by_name != parse(["--data.train=x"])


def test_options_after_config_override_it_and_the_dump_round_trips(tmp_path: Path) -> None:
    config = parse(["--config=cifar10", "--batch_size=64", "--data.scale=[0.2,1]", "--micro_batch_size", "none"])
    assert (config.batch_size, config.data.scale, config.optim.lr) == (64, (0.2, 1.0), 1.0)
    assert config.micro_batch_size is None
    (tmp_path / "again.yaml").write_text(to_yaml(config))
    assert parse(["--config", str(tmp_path / "again.yaml")]) == config


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("--optim.lr=fast", ["--optim.lr: got fast", "float or 'auto'"]),
        ("--optim.lr=0", ["--optim.lr: got 0", "above 0"]),
        ("--batch_size=0", ["--batch_size: got 0", "at least 1"]),
        ("--keep_every=0", ["--keep_every: got 0", "at least 1"]),
        ("--log=tensorboard,comet", ["--log: got tensorboard,comet", "'comet'", "tensorboard, wandb, mlflow or none"]),
        ("--data.scale=[1,0.5]", ["--data.scale", "low <= high"]),
        ("--data.hue=0.7", ["--data.hue: got 0.7", "0.5"]),
        ("--lr=1", ["--lr", "--help"]),
        ("--optim.clip_grad=-1", ["--optim.clip_grad: got -1.0, expected a number above 0, or none"]),
        ("--optim.weight_decay=-1", ["--optim.weight_decay: got -1.0, expected at least 0, or auto"]),
        ("--optim.momentum=1.5", ["--optim.momentum: got 1.5, expected at least 0, below 1"]),
        ("--optim.warmup_epochs=-5", ["--optim.warmup_epochs: got -5.0, expected at least 0"]),
        ("--checkpoint_every=1e400", ["--checkpoint_every: got inf, expected a number above 0"]),
        ("--optim.lr=.nan", ["--optim.lr: got nan, expected a number above 0, or auto"]),
        ("--data.val=1.5", ["--data.val: got 1.5, expected a number between 0 and 1, or a string, or none"]),
        ("--data.channels=17", ["--data.channels: got 17, expected from 1 to 16, or none"]),
        ("--data.local_cache_gb=0", ["--data.local_cache_gb: got 0.0, expected a number above 0"]),
        ("--data.std=[0,1,1]", ["--data.std: got (0.0, 1.0, 1.0), expected numbers, each above 0, or auto"]),
        ("--data.crop=left", ["--data.crop: got left, expected 'random', 'center'"]),
    ],
)
def test_error_is_one_line_that_names_the_option(option: str, words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        parse(["--data.train=x", option])
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("config: cifar10", "with the option config"),
        ("data: 3", "with data: 3, expected its options by name"),
        ("optim:", "with optim: None, expected its options by name"),
        ("- seed", "without options, expected lines such as 'epochs: 100'"),
        ("", "without options"),
        ("seed: [", "which cannot be read"),
        ("seed: 2026-13-45", "which cannot be read .month must be in 1..12."),
        ("[" * 500, "which cannot be read .maximum recursion depth"),
        ("caf\udce9: 1", "which cannot be read .'utf-8' codec"),
    ],
)
def test_config_file_of_the_wrong_shape_is_refused(content: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "wrong.yaml"
    file.write_text(content, errors="surrogateescape")
    with pytest.raises(UserError, match=f"^--config: got {file},? {message}"):
        parse(["--config", str(file), "--data.train=x"])


def test_every_number_has_a_range() -> None:
    for kind in (Config, DataConfig, ModelConfig, LossConfig, OptimConfig, *PROTOCOLS.values()):
        for name, hint in get_type_hints(kind, include_extras=True).items():
            assert not {int, float} & set(leaves(hint)), f"{kind.__name__}.{name}: {hint} has no range"


def leaves(hint: Any) -> Iterator[Any]:
    """Yield the types in a type; Annotated as a whole."""
    if get_origin(hint) in (Union, UnionType, tuple):
        for argument in get_args(hint):
            yield from leaves(argument)
    else:
        yield hint


def test_values_at_the_ends_of_a_range() -> None:
    for range_, inside, outside in [
        (Range(1), [1, 10**400], [0, math.inf, math.nan]),
        (Range(0, 1, above=True), [1e-300, 1], [0, 1 + 1e-15, -math.inf]),
        (Range(0, 1, below=True), [0, 1 - 1e-15], [1, -1e-300]),
        (Range(), [-1e308, 0], [-math.inf, math.nan]),
    ]:
        assert all(value in range_ for value in inside)
        assert not any(value in range_ for value in outside)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"image_size": 32.0}, "image_size: got 32.0, expected an integer, from 1 to 16384"),
        ({"flip_prob": True}, "flip_prob: got True, expected from 0 to 1"),
        ({"scale": (0.5,)}, "scale: got (0.5,), expected 2 numbers, each above 0, at most 1"),
        ({"interpolation": "nearest"}, "interpolation: got 'nearest', expected one of bilinear, bicubic"),
        ({"per_view": ({"hue": "x"}, {})}, "hue: got 'x', expected from 0 to 0.5"),
    ],
)
def test_augmentation_is_checked_without_the_command_line(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Augmentation(**overrides)


def test_help_shows_ranges(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "(type: float at least 0, below 1, default: 0.9)" in text
    assert "(type: Union[float above 0, Literal['auto']], default: auto)" in text


def test_any_switch_may_be_bare() -> None:
    config = parse(["--data.train=x", "--data.drop_last", "--compile", "--model.sync_bn", "false"])
    assert (config.data.drop_last, config.compile, config.model.sync_bn) == (True, True, False)


@pytest.mark.parametrize("value", ["9" * 400, "2026-13-45", "[" * 500, "!!timestamp z"])
def test_value_that_cannot_be_read_is_refused(value: str) -> None:
    with pytest.raises(UserError, match="got"):
        parse(["--data.train=x", f"--optim.momentum={value}"])
