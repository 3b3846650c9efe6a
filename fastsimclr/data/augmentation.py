"""The augmentation recipe: its operations, their ranges and their probabilities. Uses no framework and no pixels."""

from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from fastsimclr.errors import UserError
from fastsimclr.presets import preset_file
from fastsimclr.ranges import Finite, Fraction, NonNegative, Positive, Probability, Range, Side, check_fields

if TYPE_CHECKING:
    import torch
    from typing_extensions import Self  # typing's from Python 3.11

    from fastsimclr.data.view_module import ViewModule


@dataclass(frozen=True)
class Augmentation:
    """Augmentation recipe of the views of an image. The defaults are SimCLR's for ImageNet (arXiv 2002.05709, app. A).

    A view is cropped, resized to (image_size, image_size), flipped and rotated; then, in this order: color jitter,
    gain, grayscale, blur, solarize, normalize, channel drop. Saturation, hue and grayscale need RGB images. Raises
    UserError (a ValueError) for an option out of range, naming the option.
    """

    _prefix: ClassVar[str] = ""
    """Text before an option's name in errors."""

    image_size: Side = 224
    """Height and width of a view in pixels."""
    crop: Literal["random", "center"] = "random"
    """Crop: random (random area, aspect ratio and position) or center (the central square, for evaluation)."""
    scale: tuple[Fraction, Fraction] = (0.08, 1.0)
    """Range of a random crop's area, as a fraction of the image's area."""
    ratio: tuple[Positive, Positive] = (3 / 4, 4 / 3)
    """Range of a random crop's aspect ratio (width / height)."""
    center_fraction: Fraction = 0.875
    """Side of a center crop, as a fraction of the image's shorter side."""
    interpolation: Literal["bilinear", "bicubic"] = "bicubic"
    """Interpolation of the resize: bilinear or bicubic, always antialiased."""
    flip_prob: Probability = 0.5
    """Probability of a horizontal flip."""
    vertical_flip_prob: Probability = 0.0
    """Probability of a vertical flip, for images without an up, as of microscopes and satellites."""
    rotate90_prob: Probability = 0.0
    """Probability of a rotation by one, two or three quarter turns (0.75: all four orientations are equally likely)."""
    jitter_prob: Probability = 0.8
    """Probability of color jitter: brightness, contrast, saturation and hue, in random order."""
    brightness: NonNegative = 0.8
    """Brightness jitter b: the factor is sampled from U(max(0, 1 - b), 1 + b)."""
    contrast: NonNegative = 0.8
    """Contrast jitter c: the factor, about the view's mean gray level, is sampled from U(max(0, 1 - c), 1 + c)."""
    saturation: NonNegative = 0.8
    """Saturation jitter s: the factor is sampled from U(max(0, 1 - s), 1 + s)."""
    hue: Annotated[float, Range(0, 0.5)] = 0.2
    """Hue jitter h: the hue shift is sampled from U(-h, h), as a fraction of the color circle; 0 to 0.5."""
    gain: NonNegative = 0.0
    """Gain g: each channel is multiplied by its own factor from U(max(0, 1 - g), 1 + g)."""
    grayscale_prob: Probability = 0.2
    """Probability of converting the view to grayscale."""
    blur_prob: Probability = 0.5
    """Probability of Gaussian blur."""
    blur_sigma: tuple[Positive, Positive] = (0.1, 2.0)
    """Range of the blur's standard deviation, in pixels of the view; sampled from U(low, high)."""
    blur_kernel: Fraction = 0.1
    """Size of the blur kernel, as a fraction of image_size; rounded to an odd number of pixels."""
    solarize_prob: Probability = 0.0
    """Probability of solarize, which inverts levels of 128 and above (used by BYOL, arXiv 2006.07733)."""
    channel_drop_prob: Probability = 0.0
    """Probability of dropping a channel, chosen at random: it becomes its mean, which is 0 after normalization."""
    mean: tuple[Finite, ...] | Literal["auto"] = (0.485, 0.456, 0.406)
    """Mean of each channel in [0, 1], subtracted from the view; by default ImageNet's for red, green and blue. auto:
    measured on up to 1,000 images, as by default for images that do not have three channels."""
    std: tuple[Positive, ...] | Literal["auto"] = (0.229, 0.224, 0.225)
    """Standard deviation of each channel in [0, 1], by which the view is divided; auto as for the mean."""
    num_views: Annotated[int, Range(1, 64)] = 2
    """Number of views per image."""
    per_view: tuple[dict[str, Any], ...] = ()
    """Options that override these for each view, one dict per view. BYOL's pair is ({"blur_prob": 1.0},
    {"blur_prob": 0.1, "solarize_prob": 0.2}). Empty: all views use the same options."""

    def __post_init__(self) -> None:
        check_fields(self, self._prefix)
        for name in ("ratio", "blur_sigma", "scale"):
            low, high = getattr(self, name)
            self._expect(name, low <= high, "low <= high")
        if "auto" not in (self.mean, self.std):
            self._expect("mean", len(self.mean) == len(self.std), f"as many numbers as in std, {len(self.std)}")
        self._expect("std", len(self.std) > 0, "a number for each channel, or auto")
        expected = f"one dict for each of {self.num_views} views, or none"
        self._expect("per_view", len(self.per_view) in (0, self.num_views), expected)
        options = [f.name for f in fields(Augmentation) if f.name not in ("num_views", "per_view")]
        for overrides in self.per_view:
            self._expect("per_view", set(overrides) <= set(options), f"options of a view: {', '.join(options)}")
        if self.per_view:
            _ = self.recipes  # runs the checks of each view's options

    def _expect(self, name: str, holds: bool, expected: str) -> None:
        if not holds:
            raise UserError(f"{self._prefix}{name}: got {getattr(self, name)!r}, expected {expected}")

    @cached_property
    def recipes(self) -> tuple["Augmentation", ...]:
        """The recipe of each view: this one with the view's overrides from `per_view`, and num_views=1."""
        per_view = self.per_view or ({},) * self.num_views
        return tuple(
            replace(self, num_views=1, per_view=(), **{name: _to_tuple(value) for name, value in overrides.items()})
            for overrides in per_view
        )

    def for_evaluation(self) -> "Augmentation":
        """Return the recipe for evaluation: one view, a center crop, no other augmentation."""
        return replace(self.without_color(), crop="center", flip_prob=0.0, vertical_flip_prob=0.0, rotate90_prob=0.0)

    def without_color(self) -> "Augmentation":
        """Return the recipe for training a classifier: one view with these crops and flips only (SimCLR, app. B.6)."""
        return replace(
            self,
            num_views=1,
            per_view=(),
            jitter_prob=0.0,
            gain=0.0,
            grayscale_prob=0.0,
            blur_prob=0.0,
            solarize_prob=0.0,
            channel_drop_prob=0.0,
        )

    @property
    def statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """`mean` and `std`, neither of which may be "auto" (`with_statistics` of data/statistics.py measures them)."""
        if self.mean == "auto" or self.std == "auto":
            raise ValueError("mean: got auto, expected numbers: measure it with fastsimclr.data.statistics")
        return self.mean, self.std

    @property
    def channels(self) -> int:
        """The number of channels of the views, that of `mean`."""
        return len(self.statistics[0])

    def without_rgb(self) -> "Self":
        """Return the recipe without saturation, hue and grayscale, for images that are not RGB."""
        off: dict[str, Any] = {"saturation": 0.0, "hue": 0.0, "grayscale_prob": 0.0}
        per_view = tuple({name: value for name, value in view.items() if name not in off} for view in self.per_view)
        return replace(self, per_view=per_view, **off)

    def check_channels(self, channels: int) -> None:
        """Raise ValueError unless the recipe is for images of this number of channels.

        A `mean` or `std` of "auto" fits any number; so do the defaults, which are then measured.
        """
        of_images = "1 channel" if channels == 1 else f"{channels} channels"
        for recipe in self.recipes:
            is_default = (recipe.mean, recipe.std) == (Augmentation.mean, Augmentation.std)
            for name in ("mean", "std"):
                value = getattr(recipe, name)
                if not (value == "auto" or is_default or len(value) == channels):
                    raise ValueError(
                        f"{name}: got {len(value)} numbers for images of {of_images}, expected {channels}, or auto"
                    )
            for name in ("saturation", "hue", "grayscale_prob"):
                applies = getattr(recipe, name) > 0 and (name == "grayscale_prob" or recipe.jitter_prob > 0)
                if channels != 3 and applies:
                    raise ValueError(
                        f"{name}: got {getattr(recipe, name):g} for images of {of_images}, but it is for RGB; expected "
                        "--data.hue 0 --data.saturation 0 --data.grayscale_prob 0 (Augmentation.without_rgb())"
                    )

    def as_module(self, *, seed: int = 0, rank: int | None = None, dtype: "torch.dtype | None" = None) -> "ViewModule":
        """Return a module that augments batches of tensors, for any training loop: images (B, C, H, W) -> views.

        seed: seed of the random parameters.
        rank: rank that they are sampled for; None: that of torch.distributed, or 0.
        dtype: float dtype of the views; None: torch.float32.
        """
        import torch

        from fastsimclr.data.view_module import ViewModule  # not above: it imports this module

        return ViewModule(self, seed=seed, rank=rank, dtype=dtype or torch.float32)

    @staticmethod
    def preset(name: str) -> "Augmentation":
        """Return the recipe of a preset in configs/: "imagenet" (the defaults), "cifar10", ...

        Raises UserError for an unknown name.
        """
        import yaml  # here, so that the loss and the view kernels need only PyTorch and torchvision

        return Augmentation.from_options(yaml.safe_load(preset_file(name).read_text()).get("data", {}))

    @staticmethod
    def from_options(data: dict[str, Any]) -> "Augmentation":
        """Return the recipe given by section `data` of a run's configuration; its other options are ignored."""
        names = {f.name for f in fields(Augmentation)}
        return Augmentation(**{name: _to_tuple(value) for name, value in data.items() if name in names})

    @staticmethod
    def multi_crop(
        small: int = 6, small_size: int = 96, small_scale: tuple[float, float] = (0.05, 0.14), **recipe: Any
    ) -> "Augmentation":
        """Return SwAV's multi-crop recipe (arXiv 2006.09882): two large views and `small` views of a smaller area.

        small_size: side of a small view in pixels. small_scale: its range of area; that of large views is
            (small_scale[1], 1) by default.
        recipe: options of all views.
        """
        large: dict[str, Any] = {"scale": (small_scale[1], 1.0), **recipe}
        small_view = {"image_size": small_size, "scale": small_scale}
        return Augmentation(**large, num_views=2 + small, per_view=({}, {}, *[small_view] * small))


def _to_tuple(value: Any) -> Any:
    """Convert a list, as YAML has it, to a tuple."""
    return tuple(value) if isinstance(value, list) else value
