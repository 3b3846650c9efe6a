"""An encoder with a linear classifier on top, trained with labels: the classifier alone, or the whole network.

The paper's protocols (appendices B.5 and B.6): random crops and flips only, SGD with Nesterov momentum, and one cosine
schedule, updated every step. Encoders that train like transformers have AdamW instead. The classifier of the last epoch
is the result.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastsimclr.data import Source
from fastsimclr.data.augmentation import Augmentation
from fastsimclr.data.dataset import open_loader
from fastsimclr.data.loader import LoaderConfig
from fastsimclr.errors import UserError
from fastsimclr.models import Backbone, Encoder, synchronize_batch_norm
from fastsimclr.optim import LRSchedule, build_optimizer, excluded_from_decay
from fastsimclr.precision import Precision, autocast_to
from fastsimclr.pretrained import classifier_name, tensors
from fastsimclr.progress_bar import progress_bar


class Classifier(nn.Module):
    """An encoder and a linear layer: images (N, C, H, W) to logits (N, classes).

    frozen: keep the encoder in eval mode and without gradients, so that neither its parameters nor its BatchNorm
    statistics change.
    """

    def __init__(self, encoder: Encoder | Backbone, classes: int, *, frozen: bool) -> None:
        super().__init__()
        self.frozen = frozen
        self.encoder = encoder.requires_grad_(not frozen)
        self.fc = nn.Linear(encoder.out_features, classes)
        nn.init.normal_(self.fc.weight, std=0.01)
        nn.init.zeros_(self.fc.bias)
        self.out_features = classes
        self.train()

    def forward(self, images: Tensor) -> Tensor:
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            h = self.encoder(images)
        logits: Tensor = self.fc(h)
        return logits

    def train(self, mode: bool = True) -> "Classifier":
        super().train(mode)
        if self.frozen:
            self.encoder.eval()
        return self

    def library_state(self) -> dict[str, Tensor]:
        """A state dict for the model of the encoder's library with this number of classes.

        If the library's classifier is not one linear layer, as of a user's module or torchvision's MobileNetV3, the
        classifier is named "fc".
        """
        name = classifier_name(self.encoder)
        return tensors(self.encoder) | {f"{name}.{key}": value.cpu() for key, value in self.fc.state_dict().items()}


@dataclass(frozen=True)
class Schedule:
    """Hyperparameters of a classifier's training."""

    epochs: int
    lr: float
    batch_size: int
    optimizer: str = "sgd"
    """"sgd", with Nesterov momentum, or "adamw"."""
    weight_decay: float = 0.0
    momentum: float = 0.9
    warmup_epochs: float = 0.0


def train_classifier(
    classifier: Classifier,
    source: Source,
    augmentation: Augmentation,
    schedule: Schedule,
    config: LoaderConfig,
    precision: Precision,
    *,
    title: str,
) -> list[float]:
    """Train the classifier in place, leave it in eval mode, and return the mean loss of each epoch.

    config: the loader's configuration; its batch size is replaced by the schedule's.

    All ranks have the same weights, and the gradient is that of the mean loss over the global batch.
    Raises UserError if the loss is not finite.
    """
    device = config.world.device
    classifier.train().to(device, precision.dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
    model: Any = classifier
    if config.world.world_size > 1:
        if not classifier.frozen:
            synchronize_batch_norm(classifier, device)
        devices = [device] if device.type == "cuda" else None
        model = DistributedDataParallel(classifier, device_ids=devices)
    config = replace(
        config,
        batch_size=schedule.batch_size,
        min_local_batch=1 if classifier.frozen else 2,  # BatchNorm needs more than one image
        dtype=precision.view_dtype,
    )
    loader = open_loader(source, augmentation.without_color(), config)
    excluded = excluded_from_decay(classifier)
    optimizer = build_optimizer(
        schedule.optimizer,
        classifier.parameters(),
        schedule.lr,
        schedule.momentum,
        schedule.weight_decay,
        exclude=lambda parameter: parameter in excluded,
        nesterov=schedule.optimizer == "sgd",
    )
    scaler = precision.grad_scaler(device)
    steps_per_epoch = len(loader)
    rates = LRSchedule.over_epochs(schedule.lr, schedule.epochs, steps_per_epoch, schedule.warmup_epochs)
    bar = progress_bar(rates.total_steps, title, "step", visible=config.world.is_rank_zero)
    losses = []
    try:
        for epoch in range(schedule.epochs):
            loader.set_epoch(epoch)
            total, images = torch.zeros((), device=device, dtype=torch.float64), 0  # of this rank only
            for number, batch in enumerate(loader):
                rates.apply(optimizer, epoch * steps_per_epoch + number)
                view = batch.views[0] if precision.autocast else batch.views[0].to(precision.dtype)
                with autocast_to(device, precision.autocast):
                    logits = model(view)
                logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
                loss = F.cross_entropy(logits, batch.label, reduction="sum")
                # DDP averages over the ranks, whose local batches may differ by one image.
                global_batch_size = min(schedule.batch_size, len(source) - number * schedule.batch_size)
                scaler.scale(loss * (config.world.world_size / global_batch_size)).backward()
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad(set_to_none=True)
                total += loss.detach()
                images += len(batch.label)
                bar.update()
            sums = torch.stack([total, total.new_tensor(images)])
            if config.world.world_size > 1:
                dist.all_reduce(sums)
            losses.append(float(sums[0] / sums[1]))
            if not math.isfinite(losses[-1]):
                raise UserError(
                    f"--lr: got {schedule.lr:.4g}, and a loss of {losses[-1]} in epoch {epoch + 1}; expected a finite "
                    "loss: lower --lr"
                )
            if scaler.get_scale() < 1.0:
                raise UserError(
                    f"--precision: got fp16, and gradients that overflow even unscaled in epoch {epoch + 1}; "
                    f"expected finite gradients: use fp32, or an --lr below {schedule.lr:.4g}"
                )
            bar.set_postfix_str(f"epoch {epoch + 1}/{schedule.epochs}, loss {losses[-1]:.4f}")
    finally:
        bar.close()
        loader.close()
    classifier.eval()
    return losses
