"""Which options a resumed run may change."""

from pathlib import Path
from typing import Any

import pytest
from checkpoints import make_state

from fastsimclr.checkpoint_format import Checkpoint
from fastsimclr.config import Config, to_yaml
from fastsimclr.distributed import SINGLE_PROCESS
from fastsimclr.errors import UserError
from fastsimclr.training.options_check import check_resumed

OPTIONS = {"data.train": "/a/photos", "data.val": "/a/val", "data.mean": "auto", "loss.temperature": 0.1, "epochs": 5}


@pytest.mark.parametrize(
    ("name", "value", "is_refused"),
    [
        ("data.train", "/b/photos", False),
        ("data.train", "/a/flowers", True),
        ("data.val", "/a/test", False),
        ("data.val", None, False),
        ("data.val", 0.1, True),
        ("data.mean", list(Config().data.mean), False),  # as the run recorded it
        ("data.mean", [0.1, 0.1, 0.1], True),
        ("loss.temperature", 0.2, True),
        ("epochs", 9, False),
        ("not_known_when_it_was_saved", 1, False),
    ],
)
def test_options_that_may_change(name: str, value: Any, is_refused: bool) -> None:
    state = make_state(options=OPTIONS, config=to_yaml(Config()), batch_size=Config().batch_size)
    checkpoint = Checkpoint(Path("last.pt"), state)
    arguments = OPTIONS | {name: value}, state["architecture"], SINGLE_PROCESS
    if is_refused:
        with pytest.raises(UserError, match=f"--{name} was .*, is .*--resume_changed"):
            check_resumed(checkpoint, Config(), *arguments)
    else:
        check_resumed(checkpoint, Config(), *arguments)
    check_resumed(checkpoint, Config(resume_changed=True), *arguments)
