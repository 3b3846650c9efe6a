"""Our DALI loader with the colours (fastsimclr/data/photometric.py) in DALI's own graph, on the CPU or on the GPU.

It follows the recipe change by change, in uint8 between them as torchvision does. Everything is drawn outside and comes
in as values of each view, by which `if` sorts a batch (DALI's conditionals, which pipeline_def makes of it): 1.7 times
as fast on a CPU as changing all views, most of them by neutral factors.
"""

from typing import Any

import numpy as np
import nvidia.dali.fn as fn
import nvidia.dali.math as dmath
import nvidia.dali.types as types

from fastsimclr.data.augmentation import Augmentation
from fastsimclr.data.dali import DaliBackend
from fastsimclr.data.params import ViewParams
from fastsimclr.data.photometric import blur_window

BRIGHTNESS, CONTRAST, SATURATION, HUE, NONE = range(5)  # of a draw's order
TRUNCATE = -0.499 / 255  # a brightness_shift by which DALI, which rounds, comes to torchvision's whole levels

Inputs = dict[str, Any]  # by name: arrays (B, …); in the graph DALI's nodes, for a view each


class DaliColors(DaliBackend):
    """A front whose `crops` are whole views (B, S, S, 3), float32, by our draws."""

    def _view_inputs(self, params: ViewParams, recipe: Augmentation) -> Inputs:
        inputs = super()._view_inputs(params, recipe) | color_inputs(params, recipe)
        return {name: np.ascontiguousarray(values) for name, values in inputs.items()}

    def _build(self, **options: Any) -> Any:
        return super()._build(enable_conditionals=True, **options)

    def _view(self, images: Any, inputs: Inputs, recipe: Augmentation) -> Any:
        return finished(super()._view(images, inputs, recipe), inputs, recipe)


def color_inputs(params: ViewParams, recipe: Augmentation) -> Inputs:
    """What the graph of `recipe`, one view's, needs of the draws (B,): nothing for what is never done."""
    inputs: Inputs = _jitter_inputs(params) if recipe.jitter_prob > 0 else {}
    if recipe.grayscale_prob > 0:
        inputs["grayscale"] = params["grayscale"]
    if recipe.blur_prob > 0:
        sigma = params["sigma"]
        inputs |= {"blurred": sigma > 0, "sigma": sigma}
        # Beyond three sigma nothing is visible, and small sigmas' weights are denormal numbers, which are slow.
        inputs["window"] = np.minimum(2 * np.ceil(3 * sigma) + 1, blur_window(recipe)).astype(np.int32)
    if recipe.solarize_prob > 0:
        inputs["solarize"] = params["solarize"]
    return inputs


def finished(x: Any, inputs: Inputs, recipe: Augmentation) -> Any:
    """The graph: a view HWC, float32, normalised, from its crop HWC uint8."""
    if "before" in inputs:
        x = _jitter(x, inputs)
    if inputs.get("grayscale"):  # None, and left out of the graph, where the recipe has none
        x = fn.color_space_conversion(_luma(x), image_type=types.GRAY, output_type=types.RGB)
    if inputs.get("blurred"):
        x = fn.gaussian_blur(x, sigma=inputs["sigma"], window_size=inputs["window"])
    if inputs.get("solarize"):
        x = dmath.min(x, types.Constant(255, dtype=types.UINT8) - x)
    return fn.crop_mirror_normalize(
        x,
        mean=[255 * mean for mean in recipe.mean],
        std=[255 * std for std in recipe.std],
        dtype=types.FLOAT,
        output_layout="HWC",
    )


def _luma(x: Any) -> Any:
    return fn.color_space_conversion(x, image_type=types.RGB, output_type=types.GRAY)


def _jitter_inputs(params: ViewParams) -> Inputs:
    """before, after: (B, 3), which of brightness, contrast and saturation come before the hue and after it, then NONE.

    So the hue, of many operators, stands in the graph once. The other inputs are `_turn_hue`'s, and the factors.
    """
    jitter, order = params["jitter"], params["order"]
    change = np.where(jitter[:, None], order, NONE).astype(np.uint8)
    hue_at, step = np.argmax(order == HUE, axis=1)[:, None], np.arange(4)
    brightness, contrast, saturation, hue_shift = params["factors"].T
    thirds = np.rint(hue_shift * 3)
    rest = hue_shift * 6 - thirds * 2
    places = thirds[:, None] * 2 + np.where(rest < 0, -1, 1)[:, None] * np.arange(3)
    return {
        "before": np.where(step < hue_at, change, np.uint8(NONE))[:, :3],
        "after": np.where(step > hue_at, change, np.uint8(NONE))[:, 1:],
        "brightness": brightness,
        "contrast": contrast,
        "saturation": saturation,
        "turned": jitter & (hue_shift != 0),
        "places": (places % 3).astype(np.int32)[:, :, None],
        "sixths": np.abs(rest),
    }


def _jitter(x: Any, inputs: Inputs) -> Any:
    for slot in range(3):
        x = _change(x, inputs["before"][slot], inputs)
    if inputs["turned"]:
        x = _shift_hue(x, inputs["places"], inputs["sixths"])
    for slot in range(3):
        x = _change(x, inputs["after"][slot], inputs)
    return x


def _change(x: Any, change: Any, inputs: Inputs) -> Any:
    if change == BRIGHTNESS:
        x = fn.brightness(x, brightness=inputs["brightness"], brightness_shift=TRUNCATE)
    elif change == CONTRAST:
        # An argument lies on the CPU, a GPU operator's too: DALI waits for it there. On a CPU .cpu() does nothing.
        mean = fn.reductions.mean(_luma(x)).cpu()
        x = fn.brightness_contrast(x, contrast=inputs["contrast"], contrast_center=mean, brightness_shift=TRUNCATE)
    elif change == SATURATION:
        x = fn.saturation(x, saturation=inputs["saturation"])
    return x


def _shift_hue(x: Any, places: Any, sixths: Any) -> Any:
    """Turn the hue circle of HSV by whole thirds, by which channels change places, and α = `sixths`, 0 ≤ α ≤ 1, more.

    A pixel's channel x, of y and z the next on the circle in the turn's direction, with low ≤ x, y, z ≤ high, becomes
    clamp(x - y + (high - α (high - low) if y > z else low + α (high - low)), low, high).
    In uint8 throughout, by which no step leaves 0 … 255: floats take DALI one and a half times as long.

    places: where among RGBRG x, y and z begin.
    """
    planes = fn.transpose(x, perm=[2, 0, 1], transpose_layout=False)
    planes = fn.cat(planes, planes[:2], axis=0)
    x = fn.slice(planes, start=places[0], shape=[3], axes=[0])
    y = fn.slice(planes, start=places[1], shape=[3], axes=[0])
    z = fn.slice(planes, start=places[2], shape=[3], axes=[0])
    high, low = dmath.max(x, dmath.max(y, z)), dmath.min(x, dmath.min(y, z))
    part = fn.brightness(high - low, brightness=sixths)
    falling, rising = high - part, low + part
    target = rising + (y > z) * (falling - rising)  # modulo 256
    top = dmath.max(target, y)
    x = x + dmath.min(top - y, high - x) - dmath.min(top - target, x - low)
    return fn.transpose(x, perm=[1, 2, 0], transpose_layout=False)
