"""The version of the installed package."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("fastsimclr")
except PackageNotFoundError:  # a checkout that has not been installed
    __version__ = "0+unknown"
