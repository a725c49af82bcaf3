"""The version of Shoal, read once from the installed package."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("shoal")
except PackageNotFoundError:  # a source tree on the path without an install
    __version__ = "0.0.0+source"
