"""fastsimclr's DALI loader with the color operations (fastsimclr/data/photometric.py) in DALI's graph, on CPU or GPU.

It applies the operations one by one, with uint8 images between them, as torchvision does. All random parameters are
sampled outside the graph and passed in per view. DALI's conditionals (pipeline_def converts each `if`) apply an
operation only to the views that need it: 1.7 times as fast on a CPU as applying it to all views, with neutral factors
for most.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import nvidia.dali.fn as fn
import nvidia.dali.math as dmath
import nvidia.dali.types as types
from numpy.typing import NDArray

from fastsimclr.data.augmentation import Augmentation
from fastsimclr.data.dali import DaliBackend
from fastsimclr.data.params import ViewParams
from fastsimclr.data.photometric import blur_window

BRIGHTNESS, CONTRAST, SATURATION, HUE, NONE = range(5)  # operations, as in ViewParams' order
TRUNCATE = -0.499 / 255  # brightness_shift that makes DALI, which rounds, truncate as torchvision does

Inputs = dict[str, Any]  # by name: arrays (B, …); inside the graph, DALI nodes for one view


class DaliColors(DaliBackend):
    """A crop backend whose `crops` are complete views (B, S, S, 3), float32, from fastsimclr's random parameters."""

    def _view_inputs(self, params: ViewParams, boxes: NDArray[np.float32], recipe: Augmentation) -> Inputs:
        inputs = super()._view_inputs(params, boxes, recipe) | color_inputs(params, recipe)
        return {name: np.ascontiguousarray(values) for name, values in inputs.items()}

    def _build(self, graph: Callable[[], Any], **options: Any) -> Any:
        return super()._build(graph, enable_conditionals=True, **options)

    def _view(self, images: Any, inputs: Inputs, recipe: Augmentation) -> Any:
        return apply_colors(super()._view(images, inputs, recipe), inputs, recipe)


def color_inputs(params: ViewParams, recipe: Augmentation) -> Inputs:
    """Return the graph's inputs for one view of each image, from its params (B,).

    Operations that `recipe` never applies have no inputs.
    """
    inputs: Inputs = _jitter_inputs(params) if recipe.jitter_prob > 0 else {}
    if recipe.grayscale_prob > 0:
        inputs["grayscale"] = params["grayscale"]
    if recipe.blur_prob > 0:
        sigma = params["sigma"]
        inputs |= {"blurred": sigma > 0, "sigma": sigma}
        # Weights beyond three sigma are invisible, and for small sigmas they are denormal numbers, which are slow.
        inputs["window"] = np.minimum(2 * np.ceil(3 * sigma) + 1, blur_window(recipe)).astype(np.int32)
    if recipe.solarize_prob > 0:
        inputs["solarize"] = params["solarize"]
    return inputs


def apply_colors(x: Any, inputs: Inputs, recipe: Augmentation) -> Any:
    """Build the graph from a crop, HWC uint8, to the normalized view, HWC float32."""
    if "before" in inputs:
        x = _jitter(x, inputs)
    if inputs.get("grayscale"):  # without this input, the graph has no such operation
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
    """Return the inputs of `_jitter`.

    before, after: (B, 3), the operations among brightness, contrast and saturation to apply before and after the hue
    shift, or NONE. The hue shift, which takes many operators, is thus only once in the graph. The other inputs are the
    factors, and the arguments of `_shift_hue`.
    """
    jitter, order = params["jitter"], params["order"]
    operation = np.where(jitter[:, None], order, NONE).astype(np.uint8)
    hue_at, step = np.argmax(order == HUE, axis=1)[:, None], np.arange(4)
    brightness, contrast, saturation, hue_shift = params["factors"].T
    thirds = np.rint(hue_shift * 3)
    rest = hue_shift * 6 - thirds * 2
    places = thirds[:, None] * 2 + np.where(rest < 0, -1, 1)[:, None] * np.arange(3)
    return {
        "before": np.where(step < hue_at, operation, np.uint8(NONE))[:, :3],
        "after": np.where(step > hue_at, operation, np.uint8(NONE))[:, 1:],
        "brightness": brightness,
        "contrast": contrast,
        "saturation": saturation,
        "hue_shifted": jitter & (hue_shift != 0),
        "places": (places % 3).astype(np.int32)[:, :, None],
        "sixths": np.abs(rest),
    }


def _jitter(x: Any, inputs: Inputs) -> Any:
    for slot in range(3):
        x = _apply(x, inputs["before"][slot], inputs)
    if inputs["hue_shifted"]:
        x = _shift_hue(x, inputs["places"], inputs["sixths"])
    for slot in range(3):
        x = _apply(x, inputs["after"][slot], inputs)
    return x


def _apply(x: Any, operation: Any, inputs: Inputs) -> Any:
    if operation == BRIGHTNESS:
        x = fn.brightness(x, brightness=inputs["brightness"], brightness_shift=TRUNCATE)
    elif operation == CONTRAST:
        # Arguments are on the CPU, even for GPU operators; DALI waits for the copy. On a CPU, .cpu() is a no-op.
        mean = fn.reductions.mean(_luma(x)).cpu()
        x = fn.brightness_contrast(x, contrast=inputs["contrast"], contrast_center=mean, brightness_shift=TRUNCATE)
    elif operation == SATURATION:
        x = fn.saturation(x, saturation=inputs["saturation"])
    return x


def _shift_hue(x: Any, places: Any, sixths: Any) -> Any:
    """Shift the hue of HSV by whole thirds of the hue circle, which permute the channels, and by α sixths, 0 ≤ α ≤ 1.

    x is a channel of a pixel, y and z are the next channels in the direction of the shift, and low and high are the
    pixel's extremes. x becomes clamp(x - y + (high - α (high - low) if y > z else low + α (high - low)), low, high).
    All steps are in uint8, ordered so that none leaves 0 to 255; with floats DALI takes one and a half times as long.

    places: start of x, y and z in the channels RGBRG. sixths: α.
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
