"""Multinomial logistic regression on representations computed once: the linear classifier of an encoder, exactly.

    C · Σᵢ cross-entropy(W xᵢ + b, labelᵢ) + ½ ‖W‖²          x: the representations, standardised

is convex, so its minimum is one and LBFGS finds it: scikit-learn's LogisticRegression(C) on StandardScaler's output.
It runs on the features' device, and no more than a block of logits is ever held.
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
_BLOCK = 1 << 16  # rows whose logits are held
_ITERATIONS = 1000
# The largest entry of the mean loss's gradient that ends the search: of a C that is tried (scikit-learn's), and of the
# result. In float32 rounding may keep it from ever getting there: a loss that no longer falls ends it, too.
_GRADIENT_OF_TRIAL, _GRADIENT, _LOSS_CHANGE = 1e-4, 1e-6, 1e-10


class LinearClassifier(NamedTuple):
    """logits = features @ weight.T + bias, of the representations as the encoder gives them."""

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
    """The classifier that minimises the above.

    features: (N, D) of any float dtype; labels: (N,) int64; c: inverse strength of the regularisation.
    start: where to begin, such as another C's result. tolerance: the largest entry of the gradient to stop at.
    """
    mean, deviation = _standardization(features)
    parameters = features.new_zeros(classes, features.shape[1] + 1, dtype=torch.float64)
    if start is not None:
        parameters[:, :-1] = start.weight * deviation
        parameters[:, -1] = start.bias + start.weight.double() @ mean
    parameters.requires_grad_()
    weight_of_norm = 1 / (c * len(features))
    optimizer = torch.optim.LBFGS(
        [parameters],
        max_iter=_ITERATIONS,
        history_size=20,
        tolerance_grad=tolerance,
        tolerance_change=_LOSS_CHANGE,
        line_search_fn="strong_wolfe",
    )

    def closure() -> float:
        """Sets the gradient of the mean objective; block by block, in the features' precision, summed in float64."""
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
        gradient[:, :-1] += weight_of_norm * weight
        parameters.grad = gradient
        return float(loss / len(features) + 0.5 * weight_of_norm * weight.square().sum())

    optimizer.step(closure)
    with torch.no_grad():
        weight = parameters[:, :-1] / deviation
        return LinearClassifier(weight.float(), (parameters[:, -1] - weight @ mean).float())


def choose_c(
    features: Tensor, labels: Tensor, classes: int, rest: NDArray[np.int64], held_out: NDArray[np.int64]
) -> tuple[float, dict[float, float]]:
    """The C of CHOICES_OF_C whose classifier, fitted to the rows `rest`, is best on the rows `held_out`, the smallest
    of equals; and the accuracy of each that was tried. Beyond the best two more are tried: the weaker the
    regularisation, the longer a fit takes."""
    if len(held_out) == 0:
        raise UserError("--c: got auto, but --data.train has no class of five images to hold one out of; give a number")
    train, test = (torch.from_numpy(rows).to(features.device) for rows in (rest, held_out))
    accuracy: dict[float, float] = {}
    best, classifier = CHOICES_OF_C[0], None
    for place, c in enumerate(CHOICES_OF_C):  # the strongest first: each is a good start for the next
        classifier = fit(features[train], labels[train], classes, c, classifier, _GRADIENT_OF_TRIAL)
        right = rank(classifier, features[test])[:, 0] == labels[test]
        accuracy[c] = right.double().mean().item()
        best = max(accuracy, key=lambda each: accuracy[each])
        if place == CHOICES_OF_C.index(best) + 2:
            break
    return best, accuracy


def rank(classifier: LinearClassifier, features: Tensor) -> Tensor:
    """(N, up to 5) classes of each row, likeliest first."""
    blocks = features.split(_BLOCK)
    return torch.cat(
        [rank_classes(F.linear(block, classifier.weight.to(block.dtype), classifier.bias)) for block in blocks]
    )


def _standardization(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each column, float64; 1 of a column that is constant but for the rounding of
    float32, which would otherwise be blown up to the size of the others."""
    count = len(features)
    mean = sum((block.double().sum(0) for block in features.split(_BLOCK)), torch.zeros(())) / count
    squares = sum(((block.double() - mean).square().sum(0) for block in features.split(_BLOCK)), torch.zeros(()))
    deviation = (squares / count).sqrt()
    return mean, torch.where(deviation > _ROUNDING * mean.abs(), deviation, 1.0)


def _standardized(x: Tensor, mean: Tensor, deviation: Tensor) -> Tensor:
    return (x - mean.to(x.dtype)) / deviation.to(x.dtype)
