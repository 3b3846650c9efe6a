"""Color operations in DALI's graph, against the package's own with the same random parameters."""

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from pictures import photo_folder
from torch import Tensor

from benchmarks.dali_colors import HUE, NONE, DaliColors, color_inputs
from fastsimclr import Augmentation
from fastsimclr.data import Source, open_source
from fastsimclr.data.dali import DaliBackend
from fastsimclr.data.loader import BatchRequest
from fastsimclr.data.params import VIEW_PARAMS
from fastsimclr.data.photometric import photometric_in_pytorch

FLOWERS = Path(__file__).resolve().parents[3] / "shared" / "data" / "photos" / "flowers_300.tar"
IMAGES, BATCH = 23, 5  # four whole batches and one of three
CPU = torch.device("cpu")
# Views keep the scale 0 to 255: they are not normalized.
UNNORMALIZED = Augmentation(image_size=48, mean=(0, 0, 0), std=(1 / 255,) * 3)
PLAIN = replace(UNNORMALIZED, jitter_prob=0, grayscale_prob=0, blur_prob=0)
JITTER = replace(PLAIN, jitter_prob=1, brightness=0, contrast=0, saturation=0, hue=0)
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(photo_folder(tmp_path_factory.mktemp("photos"), IMAGES))


def view_batches(
    source: Source, augmentation: Augmentation, kind: str, images: int = IMAGES, device: torch.device = CPU
) -> list[list[Tensor]]:
    """Return the batches of views (B, 3, H, W) of the first images, with the same random parameters.

    kind: "dali" for colors in DALI's graph, or "pytorch" for DALI's crops with colors in PyTorch.
    """
    options = source, augmentation, device, BATCH, 1
    crop_backend = DaliBackend(*options) if kind == "pytorch" else DaliColors(*options)
    requests = (BatchRequest(3, 0, np.arange(first, min(first + BATCH, images))) for first in range(0, images, BATCH))
    batches = []
    for batch in crop_backend.crops(requests):
        if kind == "pytorch":
            views = zip(batch.crops, batch.params, augmentation.recipes, strict=True)
            batches.append([photometric_in_pytorch(*view, torch.float32) for view in views])
        else:
            batches.append([view.permute(0, 3, 1, 2).clone() for view in batch.crops])  # DALI reuses its GPU memory
    crop_backend.close()
    return batches


def all_views(
    source: Source, augmentation: Augmentation, kind: str, images: int = IMAGES, device: torch.device = CPU
) -> Tensor:
    """Return the views of `view_batches` as one tensor, (images x views, 3, H, W)."""
    return torch.cat(
        [view for batch in view_batches(source, augmentation, kind, images, device) for view in batch]
    ).cpu()


def pixel_errors(source: Source, augmentation: Augmentation, images: int = IMAGES) -> Tensor:
    """Return the mean pixel difference of each view on the scale 0 to 255, (images x views,)."""
    expected, got = (all_views(source, augmentation, kind, images) for kind in ("pytorch", "dali"))
    return (got - expected).abs().mean((1, 2, 3))


# Against the package's color operations


# Bounds of the mean over all views and of the worst view: 1.3 times the largest errors of 600 views of flowers.
OPERATIONS = [
    pytest.param(PLAIN, 0, 0, id="none"),
    pytest.param(replace(JITTER, brightness=0.8), 0.002, 0.05, id="brightness"),  # factors just below a whole level
    pytest.param(replace(JITTER, contrast=0.8), 0.25, 1.2, id="contrast"),
    pytest.param(replace(JITTER, saturation=0.8), 0.65, 1.3, id="saturation"),  # DALI rounds, torchvision truncates
    pytest.param(replace(JITTER, hue=0.5), 0.1, 0.25, id="hue"),
    pytest.param(replace(PLAIN, jitter_prob=1), 0.85, 2.4, id="jitter"),
    pytest.param(replace(PLAIN, grayscale_prob=1), 0.7, 1.3, id="grayscale"),  # as with saturation
    pytest.param(replace(PLAIN, blur_prob=1), 0.0001, 0.001, id="blur"),
    pytest.param(replace(PLAIN, solarize_prob=1), 0, 0, id="solarize"),
    pytest.param(UNNORMALIZED, 0.75, 3.1, id="whole recipe"),
]


@pytest.mark.parametrize(("augmentation", "mean", "worst"), OPERATIONS)
@pytest.mark.slow
def test_dali_matches_pytorch(photos: str, augmentation: Augmentation, mean: float, worst: float) -> None:
    errors = pixel_errors(open_source(photos), augmentation)
    assert errors.mean() <= mean
    assert errors.max() <= worst


@pytest.mark.skipif(not FLOWERS.is_file(), reason="needs ../shared/data")
@pytest.mark.parametrize(("augmentation", "mean", "worst"), [*OPERATIONS[4:6], OPERATIONS[-1]])
@pytest.mark.slow
def test_dali_matches_pytorch_on_real_photos(augmentation: Augmentation, mean: float, worst: float) -> None:
    errors = pixel_errors(open_source(str(FLOWERS)), augmentation, 100)
    assert errors.mean() <= mean
    assert errors.max() <= worst


def test_graph_inputs_keep_the_order_of_the_operations() -> None:
    orders = np.array(list(itertools.permutations(range(4))), np.uint8)
    params = np.zeros(2 * len(orders), VIEW_PARAMS)
    params["order"] = np.concatenate([orders, orders])
    params["jitter"] = np.arange(len(params)) < len(orders)
    params["factors"] = 0.2
    inputs = color_inputs(params, UNNORMALIZED)
    for i in range(len(params)):
        steps = [*inputs["before"][i], *[HUE] * bool(inputs["hue_shifted"][i]), *inputs["after"][i]]
        expected = params["order"][i].tolist() if params["jitter"][i] else []
        assert [step for step in steps if step != NONE] == expected


def test_views_with_different_augmentations_and_sizes(photos: str) -> None:
    changes = (
        {"blur_prob": 1.0, "mean": (0.0, 0.0, 0.0)},
        {"solarize_prob": 1.0, "jitter_prob": 0.0, "image_size": 40},
        {"grayscale_prob": 0.0},
    )
    augmentation = Augmentation(image_size=56, num_views=3, per_view=changes)
    source = open_source(photos)
    batches, expected = (view_batches(source, augmentation, kind) for kind in ("dali", "pytorch"))
    for view, recipe in enumerate(augmentation.recipes):
        got, wanted = (torch.cat([batch[view] for batch in each]) for each in (batches, expected))
        assert got.shape == (IMAGES, 3, recipe.image_size, recipe.image_size)
        assert got.dtype == torch.float32
        std = 255 * torch.tensor(recipe.std).view(3, 1, 1)
        assert ((got - wanted) * std).abs().mean() <= 0.75


# On a GPU


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_graph_is_valid_on_a_gpu(photos: str) -> None:
    # DALI looks for the GPU only after it has checked the graph, so unsupported operators or arguments fail earlier.
    augmentation = replace(UNNORMALIZED, solarize_prob=0.5)
    with pytest.raises(RuntimeError, match="while CUDA is not available"):
        DaliColors(open_source(photos), augmentation, torch.device("cuda"), BATCH, 1)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["pytorch", "dali"])
def test_gpu_matches_cpu(photos: str, kind: str) -> None:
    source, augmentation = open_source(photos), replace(UNNORMALIZED, solarize_prob=0.5)
    expected, got = (all_views(source, augmentation, kind, device=torch.device(name)) for name in ("cpu", "cuda"))
    assert (got - expected).abs().mean() <= 1.5  # the JPEG decoders differ
