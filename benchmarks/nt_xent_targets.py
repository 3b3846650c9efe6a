"""What a step of bench_nt_xent.py should reach."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Target:
    """A goal for one step. devices: parts of names; views, width: the size, None for any from 2048 views on."""

    devices: tuple[str, ...]
    views: int | None
    width: int | None
    figure: str
    at_most: float | None = None
    at_least: float | None = None

    def applies(self, device: str, views: int, width: int) -> bool:
        right_views = views >= 2048 if self.views is None else views == self.views
        return any(each in device for each in self.devices) and right_views and self.width in (None, width)

    def verdict(self, got: float) -> str:
        if self.at_most is not None:
            return f"{self.figure} at most {self.at_most}: {'met' if got <= self.at_most else 'MISSED'} ({got:.3g})"
        assert self.at_least is not None
        return f"{self.figure} at least {self.at_least}: {'met' if got >= self.at_least else 'MISSED'} ({got:.3g})"


FASTER_THAN = "times faster than "
HOPPER, CPU = ("H100", "H200"), ("cpu",)
TARGETS = (
    # What mma.sync kernels reach at 75 to 85 % of the bounds of shared memory and tensor cores.
    Target(HOPPER, 8192, 128, "ms", at_most=0.155),
    Target(HOPPER, 32768, 128, "ms", at_most=2.1),
    Target(HOPPER, 131072, 256, "ms", at_most=90.0),
    Target(HOPPER, 8192, 128, FASTER_THAN + "dense", at_least=10.0),
    Target(HOPPER, None, None, FASTER_THAN + "anyone else", at_least=1.0),
    Target(CPU, 4096, 128, FASTER_THAN + "dense", at_least=3.0),
    Target(CPU, 4096, 128, FASTER_THAN + "dense, torch.compile", at_least=1.4),
    Target(CPU, 4096, 128, FASTER_THAN + "lightly", at_least=3.0),
    Target(CPU, 8192, 128, "peak MiB", at_most=64.0),
    Target(CPU, 8192, 128, "times its products at sgemm's rate", at_most=1.6),
)
