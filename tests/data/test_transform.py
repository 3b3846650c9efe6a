"""The preparation of a single image."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fastsimclr import Augmentation, open_views
from fastsimclr.data import open_source
from fastsimclr.data.pixel_options import PixelOptions
from fastsimclr.data.sources import ArraySource, decoded
from fastsimclr.data.transform import Transform
from tests.pictures import photo_folder

AUGMENTATION = Augmentation(image_size=24, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))


@pytest.mark.parametrize("options", [{}, {"interpolation": "bilinear", "center_fraction": 1.0}])
def test_it_prepares_images_as_evaluation_does(tmp_path: Path, options: dict[str, Any]) -> None:
    augmentation = replace(AUGMENTATION, **options)
    source = open_source(str(photo_folder(tmp_path / "photos", 6)))
    loader = open_views(source, augmentation.for_evaluation(), 6, backend="torchvision", workers=0, shuffle=False)
    expected = next(iter(loader)).views[0]
    transform = Transform.from_augmentation(augmentation)
    for index, view in enumerate(expected):
        image = decoded(source, index)
        torch.testing.assert_close(transform(image), view, rtol=0, atol=1e-5)
        torch.testing.assert_close(transform(Image.fromarray(image.permute(1, 2, 0).numpy())), view, rtol=0, atol=1e-5)
        names: dict[str, Any] = {"image": image}
        exec(transform.code(), names)
        torch.testing.assert_close(names["image"], transform(image), rtol=0, atol=0)


def test_it_prepares_other_images_as_evaluation_does() -> None:
    images = torch.randint(0, 4096, (3, 40, 37, 2), generator=torch.Generator().manual_seed(0)).to(torch.uint16)
    source = ArraySource("array", images, np.zeros(3, np.int64), ["a"])
    augmentation = Augmentation(image_size=24, mean=(0.1, 0.2), std=(0.4, 0.5)).for_evaluation()
    pixels = PixelOptions(value_range=(0, 4095))
    loader = open_views(source, augmentation, 3, backend="memory", shuffle=False, pixels=pixels)
    expected = next(iter(loader)).views[0]
    transform = Transform.from_augmentation(augmentation, source.pixels)
    for index, view in enumerate(expected):
        names: dict[str, Any] = {"image": decoded(source, index)}
        torch.testing.assert_close(transform(names["image"]), view, rtol=0, atol=1e-5)
        exec(transform.code(), names)
        torch.testing.assert_close(names["image"], view, rtol=0, atol=1e-5)
