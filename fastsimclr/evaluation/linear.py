"""Multinomial logistic regression on representations that are computed once.

    C · Σᵢ cross-entropy(W xᵢ + b, labelᵢ) + ½ ‖W‖²          x: the standardized representations

is convex, and LBFGS finds its minimum. Equivalent to scikit-learn's LogisticRegression(C) on StandardScaler's output.
It runs on the features' device and materializes only one block of logits at a time.
"""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from fastsimclr.errors import UserError
from fastsimclr.evaluation.scores import rank_classes

CHOICES_OF_C = tuple(10.0**exponent for exponent in range(-6, 3))
_ROUNDING = 16 * torch.finfo(torch.float32).eps
_BLOCK = 1 << 16  # rows per block of logits
_ITERATIONS = 1000
# LBFGS stops when the largest entry of the mean loss's gradient is below this: while C is selected (scikit-learn's
# default), and for the result. Rounding in float32 may keep the gradient above it, so a constant loss also stops it.
_GRADIENT_OF_TRIAL, _GRADIENT, _LOSS_CHANGE = 1e-4, 1e-6, 1e-10


class LinearClassifier(NamedTuple):
    """logits = features @ weight.T + bias, for features that are not standardized."""

    weight: Tensor  # (classes, D)
    bias: Tensor  # (classes,)


def fit(
    features: Tensor,
    labels: Tensor,
    classes: int,
    c: float,
    start: LinearClassifier | None = None,
    tolerance: float = _GRADIENT,
) -> LinearClassifier:
    """Fit the classifier that minimizes the objective of this module.

    features: (N, D), any float dtype; labels: (N,) int64; c: inverse regularization strength.
    start: initial value, such as the result of another C. tolerance: stop when no gradient entry is larger.
    """
    mean, deviation = _standardization(features)
    parameters = features.new_zeros(classes, features.shape[1] + 1, dtype=torch.float64)
    if start is not None:
        parameters[:, :-1] = start.weight * deviation
        parameters[:, -1] = start.bias + start.weight.double() @ mean
    parameters.requires_grad_()
    weight_decay = 1 / (c * len(features))
    optimizer = torch.optim.LBFGS(
        [parameters],
        max_iter=_ITERATIONS,
        history_size=20,
        tolerance_grad=tolerance,
        tolerance_change=_LOSS_CHANGE,
        line_search_fn="strong_wolfe",
    )

    def closure() -> float:
        """Return the mean objective and set its gradient, block by block; sums are in float64."""
        weight = parameters.detach()[:, :-1]
        gradient = torch.zeros_like(parameters)
        loss = torch.zeros((), dtype=torch.float64, device=features.device)
        for first in range(0, len(features), _BLOCK):
            x = _standardized(features[first : first + _BLOCK], mean, deviation)
            target = labels[first : first + _BLOCK]
            log_p = F.log_softmax(x @ weight.T.to(x.dtype) + parameters.detach()[:, -1].to(x.dtype), dim=1)
            loss += F.nll_loss(log_p, target, reduction="sum")
            error = log_p.exp_()
            error[torch.arange(len(x), device=x.device), target] -= 1
            gradient[:, :-1] += error.T @ x
            gradient[:, -1] += error.sum(0)
        gradient /= len(features)
        gradient[:, :-1] += weight_decay * weight
        parameters.grad = gradient
        return float(loss / len(features) + 0.5 * weight_decay * weight.square().sum())

    optimizer.step(closure)
    with torch.no_grad():
        weight = parameters[:, :-1] / deviation
        return LinearClassifier(weight.float(), (parameters[:, -1] - weight @ mean).float())


def choose_c(
    features: Tensor, labels: Tensor, classes: int, rest: NDArray[np.int64], held_out: NDArray[np.int64]
) -> tuple[float, dict[float, float]]:
    """Select the C of CHOICES_OF_C whose classifier, fitted on the rows `rest`, has the best accuracy on `held_out`.

    Ties go to the smallest C. The search stops two values after the best: weaker regularization takes longer to fit.
    Returns C, and the accuracy of each value tried.
    """
    if len(held_out) == 0:
        raise UserError("--c: got auto, but no class of --data.train has five images, to hold one out; give a number")
    train, test = (torch.from_numpy(rows).to(features.device) for rows in (rest, held_out))
    accuracy: dict[float, float] = {}
    best, classifier = CHOICES_OF_C[0], None
    for i, c in enumerate(CHOICES_OF_C):  # strongest regularization first: each result initializes the next fit
        classifier = fit(features[train], labels[train], classes, c, classifier, _GRADIENT_OF_TRIAL)
        correct = rank(classifier, features[test])[:, 0] == labels[test]
        accuracy[c] = correct.double().mean().item()
        best = max(accuracy, key=lambda each: accuracy[each])
        if i == CHOICES_OF_C.index(best) + 2:
            break
    return best, accuracy


def rank(classifier: LinearClassifier, features: Tensor) -> Tensor:
    """Return the (N, up to 5) most likely classes of each row, most likely first."""
    blocks = features.split(_BLOCK)
    return torch.cat(
        [rank_classes(F.linear(block, classifier.weight.to(block.dtype), classifier.bias)) for block in blocks]
    )


def _standardization(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each column, float64.

    The deviation of a column that is constant up to float32 rounding is set to 1, so that rounding is not amplified.
    """
    count = len(features)
    mean = sum((block.double().sum(0) for block in features.split(_BLOCK)), torch.zeros(())) / count
    squares = sum(((block.double() - mean).square().sum(0) for block in features.split(_BLOCK)), torch.zeros(()))
    deviation = (squares / count).sqrt()
    return mean, torch.where(deviation > _ROUNDING * mean.abs(), deviation, 1.0)


def _standardized(x: Tensor, mean: Tensor, deviation: Tensor) -> Tensor:
    return (x - mean.to(x.dtype)) / deviation.to(x.dtype)
