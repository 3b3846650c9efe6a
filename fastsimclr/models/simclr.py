"""The SimCLR model: an encoder and a projection head, which is used only during pre-training."""

from typing import Any

from torch import Tensor, nn

from fastsimclr.errors import UserError


def projector(in_features: int, hidden: int | None = None, out: int = 128, layers: int = 2) -> nn.Sequential:
    """Build the projection head: representations h (N, in_features) to projections z (N, out).

    It is an MLP with batch normalization after every linear layer and ReLU between them, as in google-research/simclr.

    in_features: features of the representations, encoder.out_features.
    hidden: features of the hidden layers; None uses in_features.
    out: features of the projections.
    layers: number of linear layers, 2 or 3.
    Raises ValueError for a number of features below 1, or for another number of layers.
    """
    hidden = in_features if hidden is None else hidden
    if layers not in (2, 3):
        raise UserError(f"layers: got {layers!r}, expected 2 or 3")
    if min(in_features, hidden, out) < 1:
        raise UserError(f"in_features, hidden, out: got {in_features}, {hidden}, {out}, expected at least 1")
    modules: list[nn.Module] = []
    features = in_features
    for _ in range(layers - 1):
        # No bias, as the batch normalization that follows has one.
        modules += [nn.Linear(features, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU(inplace=True)]
        features = hidden
    return nn.Sequential(*modules, nn.Linear(features, out, bias=False), nn.BatchNorm1d(out))


class SimCLR(nn.Module):
    """SimCLR model: images (N, 3, H, W) to projections z (N, out), computed as projector(encoder(images)).

    encoder: module from images to representations h (N, in_features). After pre-training, use `model.encoder` alone.
    projector: module from h to z (N, out), see `fastsimclr.projector`.
    """

    def __init__(self, encoder: nn.Module, projector: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.projector = projector

    def forward(self, images: Tensor, *, return_h: bool = False) -> Any:
        """Return z; with return_h, (z, h), where h is detached from the graph."""
        h = self.encoder(images)
        z = self.projector(h)
        return (z, h.detach()) if return_h else z
