"""Frozen parts of the encoder, for a whole run or for its first epochs."""

from collections.abc import Collection

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastsimclr.errors import UserError
from fastsimclr.models import Backbone


class Freezing:
    """What of a model does not train, by epoch.

    A frozen parameter gets no gradient, so the optimizer skips it: no step, no weight decay, no momentum. A frozen
    batch normalization is in eval mode: it applies its running statistics and does not update them.
    """

    def __init__(self, model: nn.Module, names: str, epochs: int, *, frozen_bn: bool = False) -> None:
        """Freeze `names` for the whole run; `start_epoch` freezes the rest of the encoder.

        model: a SimCLR module. names: names of the encoder's modules or parameters, separated by commas; a module
        contains those whose names begin with its own and a dot. epochs: epochs for which the whole encoder is frozen.
        frozen_bn: freeze the running statistics of the whole encoder, but not the weights and biases beside them.
        Raises UserError for a name that the encoder does not have, and for frozen_bn without batch normalization.
        """
        encoder: nn.Module = model.encoder  # type: ignore[assignment]
        network = encoder.module if isinstance(encoder, Backbone) else encoder
        self.names = [name.strip() for name in names.split(",") if name.strip()]
        self.epochs = epochs
        _freeze(network, self.names)
        self._model = model
        # Parameters of a user's module that do not train stay so.
        self._trainable = [parameter for parameter in network.parameters() if parameter.requires_grad]
        self._norms = _norms(network, [""])
        self._frozen_norms = self._norms if frozen_bn else _norms(network, self.names)
        self._frozen_bn = frozen_bn
        if frozen_bn and not self._norms:
            raise UserError("--model.frozen_bn: got true for an encoder without batch normalization, expected false")
        self._is_whole: bool | None = None

    def start_epoch(self, epoch: int) -> bool:
        """Freeze and unfreeze for this epoch, counted from 0. Returns whether that changed which parameters train."""
        is_whole = epoch < self.epochs
        if is_whole == self._is_whole:
            return False
        self._is_whole = is_whole
        for parameter in self._trainable:
            parameter.requires_grad_(not is_whole)
        self._model.train()
        for norm in self._norms if is_whole else self._frozen_norms:
            norm.eval()
        return True

    def __str__(self) -> str:
        """Describe what is frozen; "" for nothing."""
        parts = list(self.names)
        if self._frozen_bn:
            parts.append("the running statistics of batch normalization")
        if self.epochs:
            parts.append(f"the whole encoder until the end of epoch {self.epochs}")
        return ", ".join(parts)


def _freeze(network: nn.Module, names: Collection[str]) -> None:
    """Freeze the parameters under these names. Raises UserError for a name without any."""
    found = set()
    for name, parameter in network.named_parameters():
        if prefixes := [prefix for prefix in names if _is_under(name, prefix)]:
            found.update(prefixes)
            parameter.requires_grad_(False)
    for name in names:
        if name not in found:
            top = dict.fromkeys(parameter.split(".")[0] for parameter, _ in network.named_parameters())
            raise UserError(f"--model.freeze: got {name!r}, expected names in the encoder: {', '.join(top)}, or below")


def _norms(network: nn.Module, names: Collection[str]) -> list[nn.Module]:
    """Return the batch normalizations under these names, and those whose parameters all are."""
    found: list[nn.Module] = []
    for name, module in network.named_modules():
        own = [f"{name}.{parameter}" for parameter, _ in module.named_parameters()] or [name]
        if isinstance(module, _BatchNorm) and all(any(_is_under(part, prefix) for prefix in names) for part in own):
            found.append(module)
    return found


def _is_under(name: str, prefix: str) -> bool:
    """Whether `name` is `prefix` or a part of it. "" contains all."""
    return not prefix or f"{name}.".startswith(f"{prefix}.")
