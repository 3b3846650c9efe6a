"""Online linear probe: a classifier of the representations, trained beside the encoder, which it does not change."""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from fastsimclr.distributed import World
from fastsimclr.training.step import step_if_finite

LR = 1e-3  # of Adam
_EPSILON = 1e-12  # added to the variance of h, which is normalized in kNN's representations


class OnlineProbe:
    """Linear classifier of representations h, trained with one update per step.

    Each h is standardized over its features: the classes do not depend on its length, and a learning rate suits all
    encoders. The weights start at zero, so that no random numbers are drawn. All ranks call the same methods together.
    """

    def __init__(self, features: int, classes: int, world: World) -> None:
        """features: F, the number of features of h."""
        self._world = world
        self._weight = torch.zeros(classes, features, device=world.device, requires_grad=True)
        self._bias = torch.zeros(classes, device=world.device, requires_grad=True)
        fused = world.device.type == "cuda"  # its kernels skip a step that is not finite without waiting for the GPU
        self._optimizer = torch.optim.Adam([self._weight, self._bias], lr=LR, fused=fused)

    def train_step(self, h: Tensor, labels: Tensor) -> Tensor:
        """Update the classifier with the labeled images of a batch, over all ranks.

        h: (B, F) of any float dtype, detached. labels: (B,) int64, -1 for unlabeled images.
        Returns the cross-entropy before the update, the mean over all labeled images, a 0-dim float32 tensor. If it is
        not finite, the classifier stays as it is.
        """
        loss = F.cross_entropy(self._logits(h), labels, ignore_index=-1, reduction="sum")
        self._optimizer.zero_grad()
        loss.backward()
        gradients = [p.grad for p in (self._weight, self._bias) if p.grad is not None]
        sums = nn.utils.parameters_to_vector([*gradients, loss.detach(), (labels >= 0).sum().to(loss)])
        if self._world.world_size > 1:
            dist.all_reduce(sums)
        means = sums / sums[-1].clamp(min=1)
        nn.utils.vector_to_parameters(means, gradients)
        step_if_finite(self._optimizer, means.isfinite().all())
        return means[-2]

    def classify(self, h: Tensor) -> Tensor:
        """Return the most likely class of each representation (Q, F), of any float dtype and length: (Q,) int64."""
        with torch.no_grad():
            return self._logits(h).argmax(dim=1)

    def _logits(self, h: Tensor) -> Tensor:
        return F.linear(F.layer_norm(h.float(), h.shape[1:], eps=_EPSILON), self._weight, self._bias)

    def state_dict(self) -> dict[str, Any]:
        state = self._optimizer.state_dict()["state"]
        return {"weight": self._weight.detach(), "bias": self._bias.detach(), "optimizer": state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state; if it is of another number of classes or features, start anew."""
        if state["weight"].shape != self._weight.shape:
            return
        with torch.no_grad():
            self._weight.copy_(state["weight"])
            self._bias.copy_(state["bias"])
        groups = self._optimizer.state_dict()["param_groups"]  # "fused" among them is a choice of this machine
        self._optimizer.load_state_dict({"state": state["optimizer"], "param_groups": groups})
