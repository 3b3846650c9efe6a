"""Parsing of command-line options and YAML files."""

from pathlib import Path

import pytest

from fastsimclr import Augmentation, UserError
from fastsimclr.config import Config, parse, to_yaml
from fastsimclr.presets import CONFIGS, preset_file


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
    ],
)
def test_error_is_one_line_that_names_the_option(option: str, words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        parse(["--data.train=x", option])
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)
