"""fastgn: gradient-norm regularisation at speed.

Names are imported when they are first used: ``import fastgn`` alone imports no torch.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastgn.step.double_backward import compile_double_backward

__all__ = ["__version__", "compile_double_backward"]


def __getattr__(name: str) -> Any:
    """Imports a public name of fastgn when it is first used (PEP 562).

    Raises AttributeError if the name is not public.
    """
    if name == "compile_double_backward":
        from fastgn.step.double_backward import compile_double_backward

        return compile_double_backward
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("fastgn")
        except PackageNotFoundError:  # fastgn is a source tree that was not installed
            return "0+unknown"
    raise AttributeError(f"module 'fastgn' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
