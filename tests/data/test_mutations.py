"""Whatever the damage to a file, decoding it gives an image or a UserError; no process dies, hangs or fills memory."""

import subprocess
import sys

import mutations
import pytest


@pytest.mark.filterwarnings("ignore::Warning:PIL", "ignore::UserWarning:tifffile")
def test_damaged_files_give_an_image_or_a_user_error() -> None:
    decoded = sum(map(mutations.decode_damaged, range(200)))
    assert 20 <= decoded <= 180, "some are still images, some are not"


@pytest.mark.slow
def test_no_damaged_file_ends_the_process() -> None:
    program = [sys.executable, "-W", "ignore", mutations.__file__, "200", "2000"]
    ended = subprocess.run(program, stderr=subprocess.PIPE, text=True)
    numbers = [line for line in ended.stderr.splitlines() if line.isdigit()]
    name, _ = mutations.damaged(int(numbers[-1]))
    assert ended.returncode == 0, f"{ended.returncode}: file {numbers[-1]}, {name}\n{ended.stderr[-1000:]}"
