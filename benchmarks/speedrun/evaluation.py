"""The evaluation that all contenders share: kNN and logistic regression on the representations h."""

from pathlib import Path

import torch
from torch import nn

from benchmarks.speedrun.contenders import TRAIN, Contender
from fastsimclr import Augmentation
from fastsimclr.config import DataConfig
from fastsimclr.data import Source
from fastsimclr.data.loader import LoaderConfig
from fastsimclr.data.subsets import hold_out
from fastsimclr.distributed import World
from fastsimclr.errors import UserError
from fastsimclr.evaluation import linear
from fastsimclr.evaluation.features import Shard, embed
from fastsimclr.evaluation.knn import knn_ranking
from fastsimclr.evaluation.labeled import LabeledData, open_labeled
from fastsimclr.evaluation.protocols import HELD_OUT
from fastsimclr.models import as_encoder
from fastsimclr.precision import choose_precision
from fastsimclr.pretrained import open_checkpoint

NEIGHBORS = (20, 200)
BATCH_SIZE = 256


def single_process() -> World:
    return World(0, 1, torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def open_images(train: str, test: str | None) -> LabeledData:
    """Open and decode the labeled images. test: None for the held-out images of a built-in dataset."""
    data = open_labeled(DataConfig(train=train, val=test), 1.0, 0, single_process())
    if data.val is None:
        raise UserError("--test: got none, expected labeled images that are not among those of --train")
    return data


def load(contender: Contender, folder: Path) -> tuple[nn.Module, Augmentation]:
    """Return the encoder that a run has saved in `folder`, and the augmentation that it was trained with."""
    if contender.program == TRAIN:
        saved = open_checkpoint(str(folder), contender.option("model.encoder"))
        assert saved.augmentation is not None
        return saved.encoder, saved.augmentation
    from benchmarks.speedrun import lightly_loop

    backbone, augmentation = lightly_loop.load(folder)
    return as_encoder(backbone, image_size=augmentation.image_size, channels=3), augmentation


def evaluate(encoder: nn.Module, augmentation: Augmentation, data: LabeledData) -> dict[str, float]:
    """Return the top-1 accuracies on the test images, fractions: "knn20" and "knn200" with all training images as the
    bank, and "linear": logistic regression, whose regularization is selected on a fifth of the training images.
    """
    world = single_process()
    precision = choose_precision("auto", world.device)
    encoder = encoder.to(world.device, precision.dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]

    def embedded(source: Source | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        assert source is not None
        config = LoaderConfig(batch_size=BATCH_SIZE, world=world)
        rows = embed(encoder, source, augmentation, config, autocast=precision.autocast)
        return rows[0].to(world.device), rows[1].to(world.device), rows[2].to(world.device)

    images, features, labels = embedded(data.train)
    test_images, test_features, test_labels = embedded(data.val)

    def accuracy(ranking: torch.Tensor) -> float:
        return float((ranking[:, 0] == test_labels).double().mean())

    bank, queries = Shard.of(images, features), Shard.of(test_images, test_features)
    bank_labels = torch.from_numpy(data.train.labels).to(world.device)
    found = {f"knn{k}": accuracy(knn_ranking(bank, bank_labels, queries, k, world=world)) for k in NEIGHBORS}
    classes = len(data.classes)
    parts = hold_out(data.train.subset(images.cpu().numpy()), HELD_OUT, 0)
    c, _ = linear.choose_c(features, labels, classes, *parts)
    return found | {"linear": accuracy(linear.rank(linear.fit(features, labels, classes, c), test_features))}
