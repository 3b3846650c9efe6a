"""SimCLR's model: an encoder, and the projection head that the loss needs and nobody uses afterwards."""

from typing import Any

from torch import Tensor, nn

from fastsimclr.errors import UserError


def projector(in_features: int, hidden: int | None = None, out: int = 128, layers: int = 2) -> nn.Sequential:
    """The projection head: h (N, in_features) to z (N, out), by `layers` linear layers with batch normalisation after
    each and ReLU between them, as in the paper's own code.

    hidden: features between the layers; None for in_features. Raises ValueError for sizes below 1 or layers not 2 or 3.
    """
    hidden = in_features if hidden is None else hidden
    if layers not in (2, 3):
        raise UserError(f"layers: got {layers!r}, expected 2 or 3")
    if min(in_features, hidden, out) < 1:
        raise UserError(f"in_features, hidden, out: got {in_features}, {hidden}, {out}, expected at least 1")
    modules: list[nn.Module] = []
    features = in_features
    for _ in range(layers - 1):
        # No bias where a batch normalisation follows, which has one of its own.
        modules += [nn.Linear(features, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU(inplace=True)]
        features = hidden
    return nn.Sequential(*modules, nn.Linear(features, out, bias=False), nn.BatchNorm1d(out))


class SimCLR(nn.Module):
    """encoder and projector in one: forward(images (N, 3, H, W)) -> z (N, out); `.encoder(images)` -> h."""

    def __init__(self, encoder: nn.Module, projector: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.projector = projector

    def forward(self, images: Tensor) -> Tensor:
        z: Any = self.projector(self.encoder(images))
        return z
