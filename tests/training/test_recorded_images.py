"""The record of a run's images, images.npz."""

from pathlib import Path

import numpy as np
from pictures import jpeg, photo, write

from fastsimclr import UserError
from fastsimclr.data.opening import open_source
from fastsimclr.distributed import SINGLE_PROCESS
from fastsimclr.run_folder import RunFolder
from fastsimclr.training.images import as_recorded, record_images


def test_damaged_record_is_one_line(tmp_path: Path) -> None:
    photos = write(tmp_path / "photos", {f"class{n % 2}/{n}.jpg": jpeg(photo(20, 20, seed=n)) for n in range(4)})
    source, run = open_source(str(photos)), RunFolder(tmp_path / "run")
    run.checkpoint.parent.mkdir(parents=True)
    run.config.touch()
    record_images(source, run)
    assert as_recorded(source, run.checkpoint, SINGLE_PROCESS) is source
    whole = run.images.read_bytes()
    random = np.random.default_rng(0)
    damaged = [whole[:count] for count in (0, 1, len(whole) // 2, len(whole) - 1)]
    for position in random.permutation(len(whole))[:50].tolist():
        damaged.append(whole[:position] + bytes([whole[position] ^ 1 << random.integers(8)]) + whole[position + 1 :])
    errors = []
    for content in damaged:
        run.images.write_bytes(content)
        try:  # a flipped bit of a time stamp does no harm
            assert as_recorded(source, run.checkpoint, SINGLE_PROCESS).digest() == source.digest()
        except UserError as error:
            errors.append(str(error))
    assert len(errors) > 10
    assert all(error.startswith(f"{run.images}: got a file that cannot be read (") for error in errors)
