"""The augmentation recipe as data: what may happen to a view, and how often. No framework, no pixels."""

from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

from fastsimclr.presets import preset_file

INTERPOLATIONS = ("bilinear", "bicubic")
CROPS = ("random", "center")


@dataclass(frozen=True)
class Augmentation:
    """How views are drawn from an image. The defaults are the paper's for ImageNet (arXiv 2002.05709, appendix A)."""

    image_size: int = 224
    """Side of a view in pixels."""
    crop: str = "random"
    """random: a resized crop of random area and aspect ratio. center: the central square, for evaluation."""
    scale: tuple[float, float] = (0.08, 1.0)
    """Area of a random crop, as a fraction of the image's."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Aspect ratio (width / height) of a random crop."""
    center_fraction: float = 0.875
    """Side of a center crop, as a fraction of the image's shorter side."""
    interpolation: str = "bicubic"
    """Filter of the resize: bilinear or bicubic, always antialiased."""
    flip_prob: float = 0.5
    """Probability of a horizontal flip."""
    jitter_prob: float = 0.8
    """Probability of colour jitter: the four changes below, in random order."""
    brightness: float = 0.8
    """Brightness factor from U(1 - b, 1 + b), at least 0."""
    contrast: float = 0.8
    """Contrast factor from U(1 - c, 1 + c), at least 0, about the view's mean grey."""
    saturation: float = 0.8
    """Saturation factor from U(1 - s, 1 + s), at least 0."""
    hue: float = 0.2
    """Turn of the hue circle from U(-h, h); at most 0.5."""
    grayscale_prob: float = 0.2
    """Probability of greyscale."""
    blur_prob: float = 0.5
    """Probability of Gaussian blur."""
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    """Standard deviation of the blur in pixels of the view, from U(low, high)."""
    blur_kernel: float = 0.1
    """Side of the blur's window, as a fraction of the view's (made odd)."""
    solarize_prob: float = 0.0
    """Probability of solarisation, after the blur: levels from 128 up are inverted. BYOL's recipe has it."""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """Mean to subtract, of red, green and blue in [0, 1]."""
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    """Standard deviation to divide by, likewise."""
    num_views: int = 2
    """Views of each image."""
    per_view: tuple[dict[str, Any], ...] = ()
    """Options that differ between views, one dict for each view: ({"blur_prob": 1.0}, {"blur_prob": 0.1,
    "solarize_prob": 0.2}) is BYOL's pair. Empty: all views use the same options."""

    def __post_init__(self) -> None:
        for name in ("flip_prob", "jitter_prob", "grayscale_prob", "blur_prob", "solarize_prob"):
            self._expect(name, 0 <= getattr(self, name) <= 1, "a probability")
        for name in ("brightness", "contrast", "saturation"):
            self._expect(name, getattr(self, name) >= 0, "at least 0")
        for name in ("ratio", "blur_sigma", "scale"):
            low, high = getattr(self, name)
            self._expect(name, 0 < low <= high, "0 < low <= high")
        self._expect("scale", self.scale[1] <= 1, "at most 1")
        self._expect("hue", 0 <= self.hue <= 0.5, "from 0 to 0.5")
        self._expect("image_size", self.image_size >= 1, "at least 1")
        self._expect("num_views", self.num_views >= 1, "at least 1")
        self._expect("center_fraction", 0 < self.center_fraction <= 1, "above 0, at most 1")
        self._expect("blur_kernel", 0 < self.blur_kernel <= 1, "above 0, at most 1")
        self._expect("std", min(self.std) > 0, "positive")
        self._expect("interpolation", self.interpolation in INTERPOLATIONS, f"one of {', '.join(INTERPOLATIONS)}")
        self._expect("crop", self.crop in CROPS, f"one of {', '.join(CROPS)}")
        self._expect(
            "per_view", len(self.per_view) in (0, self.num_views), f"one for each of {self.num_views} views, or none"
        )
        own = {f.name: f.default for f in fields(Augmentation) if f.name not in ("num_views", "per_view")}
        for changes in self.per_view:
            self._expect("per_view", set(changes) <= set(own), f"options of a view: {', '.join(own)}")
            for name, value in changes.items():
                self._expect("per_view", _alike(value, own[name]), f"a value for {name} such as {own[name]}")
        if self.per_view:
            _ = self.recipes  # each is checked as a whole

    def _expect(self, name: str, holds: bool, expected: str) -> None:
        if not holds:
            raise ValueError(f"{name}: got {getattr(self, name)!r}, expected {expected}")

    @cached_property
    def recipes(self) -> tuple["Augmentation", ...]:
        """What each view is drawn by: this recipe with that view's own changes, for that view alone."""
        each = self.per_view or ({},) * self.num_views
        return tuple(
            replace(self, num_views=1, per_view=(), **{name: _tuple(value) for name, value in changes.items()})
            for changes in each
        )

    def for_evaluation(self) -> "Augmentation":
        """The same images seen for evaluation: one view, the central square, nothing else changed."""
        return replace(self.without_color(), crop="center", flip_prob=0.0)

    def without_color(self) -> "Augmentation":
        """One view with crops and flips as here, but no colours changed: what a classifier is trained on (B.6)."""
        return replace(
            self, num_views=1, per_view=(), jitter_prob=0.0, grayscale_prob=0.0, blur_prob=0.0, solarize_prob=0.0
        )

    @staticmethod
    def preset(name: str) -> "Augmentation":
        """The views of a preset of configs/: "imagenet" (these defaults), "cifar10" or "digits".

        Raises UserError if there is none of that name.
        """
        import yaml  # here, so that the loss and the view kernels need only PyTorch and torchvision

        return Augmentation.from_options(yaml.safe_load(preset_file(name).read_text()).get("data", {}))

    @staticmethod
    def from_options(data: dict[str, Any]) -> "Augmentation":
        """The views that the section `data` of a run's configuration asks for; its other options are left alone."""
        own = {f.name for f in fields(Augmentation)}
        return Augmentation(**{name: _tuple(value) for name, value in data.items() if name in own})

    @staticmethod
    def multi_crop(
        small: int = 6, small_size: int = 96, small_scale: tuple[float, float] = (0.05, 0.14), **recipe: Any
    ) -> "Augmentation":
        """Two views of the whole `recipe` and `small` small ones of less of the image (SwAV, arXiv 2006.09882)."""
        large: dict[str, Any] = {"scale": (small_scale[1], 1.0), **recipe}
        of_small = {"image_size": small_size, "scale": small_scale}
        return Augmentation(**large, num_views=2 + small, per_view=({}, {}, *[of_small] * small))


def _tuple(value: Any) -> Any:
    """YAML's list as the tuple that it stands for."""
    return tuple(value) if isinstance(value, list) else value


def _alike(value: Any, default: Any) -> bool:
    """Whether a value out of YAML is of the default's kind: a number, a text, or as many numbers."""
    if isinstance(default, tuple):
        return isinstance(value, list | tuple) and len(value) == len(default) and all(map(_alike, value, default))
    if isinstance(default, float):
        return isinstance(value, int | float) and not isinstance(value, bool)
    return type(value) is type(default)
