"""The contender that changes colours in DALI's own graph, against the op of our loaders at the same draws."""

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
# Levels come out as they are: neither mean nor standard deviation.
LEVELS = Augmentation(image_size=48, mean=(0, 0, 0), std=(1 / 255,) * 3)
PLAIN = replace(LEVELS, jitter_prob=0, grayscale_prob=0, blur_prob=0)
JITTER = replace(PLAIN, jitter_prob=1, brightness=0, contrast=0, saturation=0, hue=0)
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(photo_folder(tmp_path_factory.mktemp("photos"), IMAGES))


def crops(
    source: Source, augmentation: Augmentation, kind: str, images: int = IMAGES, device: torch.device = CPU
) -> list[list[Tensor]]:
    """Batches of the first images' views (B, 3, H, W), at the same draws.

    kind: "dali", or "native": DALI's crops, then the oracle.
    """
    how = source, augmentation, device, BATCH, 1
    crop_backend = DaliBackend(*how) if kind == "native" else DaliColors(*how)
    requests = (BatchRequest(3, 0, np.arange(first, min(first + BATCH, images))) for first in range(0, images, BATCH))
    batches = []
    for made in crop_backend.crops(requests):
        if kind == "native":
            each = zip(made.crops, made.params, augmentation.recipes, strict=True)
            batches.append([photometric_in_pytorch(*of_view, torch.float32) for of_view in each])
        else:
            batches.append([view.permute(0, 3, 1, 2).clone() for view in made.crops])  # DALI reuses a GPU's memory
    crop_backend.close()
    return batches


def made(
    source: Source, augmentation: Augmentation, kind: str, images: int = IMAGES, device: torch.device = CPU
) -> Tensor:
    """(images x views, 3, H, W): those of `crops`."""
    return torch.cat([view for batch in crops(source, augmentation, kind, images, device) for view in batch]).cpu()


def off(source: Source, augmentation: Augmentation, images: int = IMAGES) -> Tensor:
    """(images x views,): the mean difference of each view's pixels from the oracle's, in levels of 255."""
    expected, got = (made(source, augmentation, kind, images) for kind in ("native", "dali"))
    return (got - expected).abs().mean((1, 2, 3))


# Beside the shared op


# Bounds of the mean over all views, and of the worst view's: 1.3 times what 600 views of flowers show at most.
CHANGES = [
    pytest.param(PLAIN, 0, 0, id="none"),
    pytest.param(replace(JITTER, brightness=0.8), 0.002, 0.05, id="brightness"),  # factors just below a whole level
    pytest.param(replace(JITTER, contrast=0.8), 0.25, 1.2, id="contrast"),
    pytest.param(replace(JITTER, saturation=0.8), 0.65, 1.3, id="saturation"),  # DALI rounds, torchvision truncates
    pytest.param(replace(JITTER, hue=0.5), 0.1, 0.25, id="hue"),
    pytest.param(replace(PLAIN, jitter_prob=1), 0.85, 2.4, id="jitter"),
    pytest.param(replace(PLAIN, grayscale_prob=1), 0.7, 1.3, id="grey"),  # as with saturation
    pytest.param(replace(PLAIN, blur_prob=1), 0.0001, 0.001, id="blur"),
    pytest.param(replace(PLAIN, solarize_prob=1), 0, 0, id="solarize"),
    pytest.param(LEVELS, 0.75, 3.1, id="whole recipe"),
]


@pytest.mark.parametrize(("augmentation", "mean", "worst"), CHANGES)
def test_split_operators_do_what_the_shared_op_does(
    photos: str, augmentation: Augmentation, mean: float, worst: float
) -> None:
    each = off(open_source(photos), augmentation)
    assert each.mean() <= mean
    assert each.max() <= worst


@pytest.mark.skipif(not FLOWERS.is_file(), reason="needs shared/data beside the repository")
@pytest.mark.parametrize(("augmentation", "mean", "worst"), [*CHANGES[4:6], CHANGES[-1]])
def test_so_they_do_on_real_photographs(augmentation: Augmentation, mean: float, worst: float) -> None:
    each = off(open_source(str(FLOWERS)), augmentation, 100)
    assert each.mean() <= mean
    assert each.max() <= worst


def test_every_order_of_the_changes_comes_into_the_graph() -> None:
    orders = np.array(list(itertools.permutations(range(4))), np.uint8)
    params = np.zeros(2 * len(orders), VIEW_PARAMS)
    params["order"] = np.concatenate([orders, orders])
    params["jitter"] = np.arange(len(params)) < len(orders)
    params["factors"] = 0.2
    inputs = color_inputs(params, LEVELS)
    for i in range(len(params)):
        steps = [*inputs["before"][i], *[HUE] * bool(inputs["turned"][i]), *inputs["after"][i]]
        expected = params["order"][i].tolist() if params["jitter"][i] else []
        assert [step for step in steps if step != NONE] == expected


def test_views_of_their_own_recipes_and_sizes(photos: str) -> None:
    changes = (
        {"blur_prob": 1.0, "mean": (0.0, 0.0, 0.0)},
        {"solarize_prob": 1.0, "jitter_prob": 0.0, "image_size": 40},
        {"grayscale_prob": 0.0},
    )
    augmentation = Augmentation(image_size=56, num_views=3, per_view=changes)
    source = open_source(photos)
    batches, expected = (crops(source, augmentation, kind) for kind in ("dali", "native"))
    for number, recipe in enumerate(augmentation.recipes):
        got, native = (torch.cat([batch[number] for batch in each]) for each in (batches, expected))
        assert got.shape == (IMAGES, 3, recipe.image_size, recipe.image_size)
        assert got.dtype == torch.float32
        std = 255 * torch.tensor(recipe.std).view(3, 1, 1)
        assert ((got - native) * std).abs().mean() <= 0.75


# On a GPU


@pytest.mark.skipif(torch.cuda.is_available(), reason="of machines without a GPU")
def test_the_graph_is_one_for_gpus_too(photos: str) -> None:
    # DALI looks for the GPU once it has the graph: an operator that knows no GPU, or an argument on it, comes first.
    augmentation = replace(LEVELS, solarize_prob=0.5)
    with pytest.raises(RuntimeError, match="while CUDA is not available"):
        DaliColors(open_source(photos), augmentation, torch.device("cuda"), BATCH, 1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", ["native", "dali"])
def test_a_gpu_shows_the_same_views(photos: str, kind: str) -> None:
    source, augmentation = open_source(photos), replace(LEVELS, solarize_prob=0.5)
    expected, got = (made(source, augmentation, kind, device=torch.device(name)) for name in ("cpu", "cuda"))
    assert (got - expected).abs().mean() <= 1.5  # another JPEG decoder
