"""fastsimclr: SimCLR pre-training of image encoders, and the NT-Xent loss on its own."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("fastsimclr")
except PackageNotFoundError:  # a checkout that nobody installed
    __version__ = "0+unknown"
