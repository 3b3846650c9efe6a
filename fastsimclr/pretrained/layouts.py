"""Checkpoint layouts: how each project names an encoder's tensors, and which of the tensors belong to the encoder.

The layout of a ResNet is recognized by names and shapes alone, and converted to torchvision's names. The tensors of any
other encoder are found by their names. The caller adds the file's name to errors.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from fastsimclr.data.augmentation import Augmentation
from fastsimclr.errors import UserError
from fastsimclr.models import ENCODERS, EncoderSpec

State = dict[str, Tensor]

# google-research/simclr trains on images in [0, 1], without mean and std (data_util.py).
GOOGLE_AUGMENTATION = Augmentation(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))


@dataclass(frozen=True)
class Weights:
    """An encoder's tensors by their names in its library, and properties of the encoder that no tensor holds."""

    state: State
    origin: str
    augmentation: Augmentation | None = None
    """The augmentation, if the layout determines it."""
    stem_padding: int | None = None
    """Padding of the first convolution, if not the stem's default (1 for 3x3, 3 for 7x7)."""
    stem_relu: bool = True
    """Whether a ReLU follows the first normalization."""


def find_weights(contents: Any) -> Weights:
    """Find a ResNet's tensors in a loaded checkpoint, trying all known containers and layouts.

    Raises UserError if there are none.
    """
    state = find_tensors(contents)
    if "net.0.0.weight" in state and any(name.startswith("net.1.blocks.0.") for name in state):
        return _simclr_v2(state)
    prefix = _prefix(state)
    if f"{prefix}layer1.0.conv1.weight" in state:
        return _named(state, prefix)
    return _sequential(state, prefix)


# Containers of the state dict

# In order: VISSL; Lightning, MoCo, tonylins and most others; SupContrast; SimCLRv2-Pytorch; and no container.
_CONTAINERS = (
    ("classy_state_dict", "base_model", "model", "trunk"),
    *(("state_dict",), ("model_state_dict",), ("model",), ("resnet",)),
    (),
)
_WRAPPERS = ("module", "_orig_mod")  # of DistributedDataParallel and torch.compile


def find_tensors(contents: Any) -> State:
    """Return the tensors of the first container that holds any, without the names of wrappers.

    Raises UserError if there are none.
    """
    for path in _CONTAINERS:
        found = contents
        for key in path:
            found = found.get(key) if isinstance(found, Mapping) else None
        if isinstance(found, Mapping):
            tensors = {str(name): value for name, value in found.items() if isinstance(value, Tensor)}
            if tensors:
                return {
                    ".".join(part for part in name.split(".") if part not in _WRAPPERS): value
                    for name, value in tensors.items()
                }
    what = f"a dict of {_some(contents)}" if isinstance(contents, Mapping) else f"a {type(contents).__name__}"
    raise UserError(f"got {what}, expected a state dict of tensors")


# The encoder within the state dict

_PREFERRED = ("", "backbone.", "encoder.", "encoder_q.", "base_encoder.")  # others are momentum copies
_FIRST_BLOCK = re.compile(r"(|.*\.)(?:layer1|(\d+))\.0\.conv1\.weight")
_HEADS = ("fc", "head", "heads", "head_dist", "linear", "classifier", "projector", "projection_head", "predictor")


def _prefix(state: State) -> str:
    """The prefix of the encoder's names."""
    found: dict[str, None] = {}
    for name in state:
        match = _FIRST_BLOCK.fullmatch(name)
        # In a Sequential, a number replaces layer1; the Sequential of a ResNet begins with the convolution.
        if match and (match[2] is None or f"{match[1]}0.weight" in state):
            found[match[1]] = None
    if not found:
        raise UserError(
            f"got tensors named {_some(state)}, expected a ResNet's (conv1.weight, layer1.0.conv1.weight, …), or the "
            "name of their encoder, such as timm/vit_tiny_patch16_224"
        )
    if len(found) == 1:
        return next(iter(found))
    for prefix in _PREFERRED:
        if prefix in found:
            return prefix
    raise UserError(f"got {len(found)} ResNets, under {_some(found)}; expected one: save its state_dict() alone")


def _below(state: State, prefix: str) -> State:
    """The tensors under `prefix` without heads, with `shortcut` (CIFAR's ResNets) renamed to `downsample`."""
    found = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    return {
        name.replace(".shortcut.", ".downsample."): value
        for name, value in found.items()
        if name.split(".")[0] not in _HEADS
    }


# The layouts


def _named(state: State, prefix: str) -> Weights:
    """Convert torchvision's names under a prefix. The prefix and the heads identify the project:

    "": torchvision, timm, and tonylins/simclr-converter (google-research's SimCLR; see `_converted_from_google`).
    backbone: solo-learn, lightly's benchmarks, sthalles/SimCLR. encoder: SupContrast, Spijkervet/SimCLR, and early
    solo-learn. encoder_q, base_encoder: MoCo and MoCo v3. _feature_blocks: VISSL's trunk. Another prefix is accepted
    if it is the only one.
    """
    weights = Weights(_below(state, prefix), f"a ResNet under {prefix[:-1]}" if prefix else "a ResNet's state dict")
    if prefix == "" and _converted_from_google(state):
        return replace(
            weights, origin="google-research's SimCLR by tonylins/simclr-converter", augmentation=GOOGLE_AUGMENTATION
        )
    if prefix.endswith("_feature_blocks."):
        return replace(weights, origin="VISSL")
    if prefix in ("encoder_q.", "base_encoder."):
        return replace(weights, origin="MoCo" if prefix == "encoder_q." else "MoCo v3")
    if prefix in ("backbone.", "encoder.") and {"classifier.weight", "classifier.bias"} <= set(state):
        # solo-learn trains a classifier alongside, and pads its 3x3 stem by two pixels (solo/methods/base.py).
        if _stem_side(weights.state) == 3:
            return replace(weights, origin="solo-learn, with its stem for CIFAR, padded by 2", stem_padding=2)
        return replace(weights, origin="solo-learn")
    if any(name.startswith("projection_head.") for name in state):
        return replace(weights, origin="lightly")
    return weights


def _converted_from_google(state: State) -> bool:
    """Whether tonylins' converter wrote this file.

    The names are torchvision's, and at width 1 also the shapes. But the downsample precedes the convolutions of a
    bottleneck, and num_batches_tracked is 0.
    """
    names = list(state)
    first = ["layer1.0.downsample.0.weight", "layer1.0.conv1.weight", "layer1.0.conv3.weight"]
    seen = [value for name, value in state.items() if name.endswith(".num_batches_tracked")]
    in_order = set(first) <= set(names) and [name for name in names if name in first] == first
    return in_order and len(seen) > 0 and not any(seen)


def _sequential(state: State, prefix: str) -> Weights:
    """nn.Sequential(*resnet.children()), numbered: lightly's backbone.*, leftthomas/SimCLR's f.*.

    The number of modules without tensors between bn1 (1) and layer1 identifies them: two are ReLU and max-pool, one is
    ReLU, and none is lightly's ResNetGenerator, whose ReLUs are in a forward() that the Sequential does not have.
    In a 3x3 stem, the max-pool is assumed to be the nn.Identity() that replaces it for small images.
    """
    state = _below(state, prefix)
    blocks = (re.match(r"(\d+)\.0\.conv1\.weight", name) for name in state)
    layers = sorted({int(match[1]) for match in blocks if match})
    between = layers[0] - 2
    if len(layers) != 4 or not 0 <= between <= 2:
        raise UserError(f"got a Sequential with blocks at {layers}, expected four layers of them after conv1 and bn1")
    names = {"0": "conv1", "1": "bn1"} | {str(number): f"layer{n}" for n, number in enumerate(layers, 1)}
    renamed = {}
    for name, value in state.items():
        number, _, rest = name.partition(".")
        renamed[f"{names.get(number, number)}.{rest}"] = value
    if between < 2 and _stem_side(renamed) == 7:
        raise UserError("got a ResNet with a 7x7 stem and no max-pool, expected both or neither")
    origin = "lightly" if prefix == "backbone." else f"a ResNet's Sequential under {prefix[:-1]}"
    return Weights(renamed, origin if prefix else "a ResNet's Sequential", stem_relu=between > 0)


_SIMCLR_V2 = [
    (re.compile(theirs), ours)
    for theirs, ours in (
        (r"net\.0\.0\.(\w+)", r"conv1.\1"),
        (r"net\.0\.1\.0\.(\w+)", r"bn1.\1"),
        (r"net\.(\d)\.blocks\.(\d+)\.projection\.shortcut\.(\w+)", r"layer\1.\2.downsample.0.\3"),
        (r"net\.(\d)\.blocks\.(\d+)\.projection\.bn\.0\.(\w+)", r"layer\1.\2.downsample.1.\3"),
        *(
            (rf"net\.(\d)\.blocks\.(\d+)\.net\.{theirs}\.(\w+)", rf"layer\1.\2.{ours}.\3")
            for theirs, ours in (
                *(("0", "conv1"), (r"1\.0", "bn1"), ("2", "conv2")),
                *((r"3\.0", "bn2"), ("4", "conv3"), (r"5\.0", "bn3")),
            )
        ),
    )
]


def _simclr_v2(state: State) -> Weights:
    """google-research's SimCLRv2 by Separius/SimCLRv2-Pytorch: {"resnet": net.*, fc.*, "head": the projection head}."""
    if any(".main_conv." in name for name in state):
        raise UserError(
            "got a SimCLRv2 encoder with selective kernels (sk1), expected one without: convert the checkpoint of sk0"
        )
    renamed = {}
    for name, value in state.items():
        if not name.startswith("fc."):
            matches = ((pattern.fullmatch(name), ours) for pattern, ours in _SIMCLR_V2)
            renamed[next((match.expand(ours) for match, ours in matches if match), name)] = value
    return Weights(renamed, "google-research's SimCLRv2 by Separius/SimCLRv2-Pytorch", augmentation=GOOGLE_AUGMENTATION)


# The architecture


_BLOCKS: dict[tuple[bool, tuple[int, ...]], str] = {
    (False, (1, 1, 1, 1)): "resnet10",
    (False, (2, 2, 2, 2)): "resnet18",
    (False, (3, 4, 6, 3)): "resnet34",
    (True, (3, 4, 6, 3)): "resnet50",
    (True, (3, 4, 23, 3)): "resnet101",
    (True, (3, 8, 36, 3)): "resnet152",
}
_STEMS = {7: ("imagenet", 224), 5: ("medium", 32), 3: ("small", 32)}
"""Stem and size of the images by the size of the first convolution. No other project's ResNet has a 5x5 one."""


def architecture_of(state: State) -> EncoderSpec:
    """Determine the architecture of a ResNet from its shapes. Raises UserError if it is not supported."""
    conv1, conv2 = (state.get(name) for name in ("conv1.weight", "layer1.0.conv2.weight"))
    if conv1 is None or conv1.ndim != 4 or conv2 is None or conv2.ndim != 4:
        raise UserError(f"got tensors named {_some(state)}, expected a ResNet's conv1.weight and layer1.0.conv2.weight")
    features, channels, side, _ = conv1.shape
    if side not in _STEMS or features % 64 or not features:
        raise UserError(
            f"got a ResNet whose first convolution is {side}x{side}, from {channels} to {features} channels; expected "
            "7x7, 5x5 or 3x3, to a multiple of 64 channels"
        )
    width, bottlenecks = features // 64, "layer1.0.conv3.weight" in state
    if conv2.shape[1] != conv2.shape[0]:
        groups = conv2.shape[0] // max(1, conv2.shape[1])
        raise UserError(
            f"got a ResNet whose convolutions have {groups} groups (a ResNeXt?), expected one without groups"
        )
    if conv2.shape[0] != features:
        raise UserError(
            f"got a ResNet whose first convolution has {features} channels and whose first block has {conv2.shape[0]} "
            "(a wide ResNet?), expected the same number: the width multiplies all layers of an encoder"
        )
    layers = tuple(len({n.split(".")[1] for n in state if n.startswith(f"layer{layer}.")}) for layer in (1, 2, 3, 4))
    name = _BLOCKS.get((bottlenecks, layers))
    if name is None:
        kind = "bottlenecks" if bottlenecks else "basic blocks"
        raise UserError(f"got a ResNet of {layers} {kind}, expected {', '.join(ENCODERS)}")
    return EncoderSpec(name, width, *_STEMS[side], channels)


def select(state: State, expected: Mapping[str, Tensor], what: str) -> State:
    """Return the tensors with the expected names, which may have a prefix. The tensors of heads are left out.

    Raises UserError, naming the first difference, unless the names are exactly the expected ones. num_batches_tracked
    may be missing, as in files from before PyTorch 0.4.1.
    what: the encoder, for the message.
    """
    found = without_prefix(state, expected)
    missing = [name for name in expected if name not in found and not name.endswith(".num_batches_tracked")]
    unexpected = [name for name in found if name not in expected]
    if missing or unexpected:
        difference = f"without {_some(missing)}" if missing else f"with unexpected {_some(unexpected)}"
        raise UserError(f"got tensors {difference}, expected those of {what}")
    return found


def without_prefix(state: State, expected: Mapping[str, Tensor]) -> State:
    """Return the tensors below the prefix of the first expected name, without those of heads."""
    first = next(iter(expected), "")
    prefixes = [name.removesuffix(first) for name in state if name == first or name.endswith(f".{first}")]
    prefix = min(prefixes, key=lambda p: _PREFERRED.index(p) if p in _PREFERRED else len(_PREFERRED), default="")
    found = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    return {name: value for name, value in found.items() if name in expected or name.split(".")[0] not in _HEADS}


def check_shapes(state: State, expected: Mapping[str, Tensor], what: str) -> None:
    """Raise UserError, naming the first difference, unless all shapes are the expected ones."""
    for name, value in expected.items():
        if name in state and state[name].shape != value.shape:
            raise UserError(f"got {name} of shape {tuple(state[name].shape)}, expected {tuple(value.shape)} of {what}")


def _stem_side(state: State) -> int | None:
    """The kernel size of the first convolution."""
    conv1 = state.get("conv1.weight")
    return conv1.shape[-1] if conv1 is not None and conv1.ndim == 4 else None


def _some(names: Iterable[Any]) -> str:
    """List the first names, for a message of one line."""
    listed = [" ".join(str(name).split())[:60] for name in names]
    return ", ".join(listed[:4]) + (f", … ({len(listed)} in all)" if len(listed) > 4 else "") or "nothing"
