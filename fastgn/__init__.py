"""fastgn: gradient-norm regularisation at speed."""

from importlib.metadata import PackageNotFoundError, version

from fastgn.schedule import compile_double_backward

try:
    __version__ = version("fastgn")
except PackageNotFoundError:  # run from a source tree that was not installed
    __version__ = "0+unknown"

__all__ = ["compile_double_backward", "__version__"]
