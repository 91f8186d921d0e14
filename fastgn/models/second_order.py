"""Replaces operators in a network that cannot be differentiated twice.

At a zero vector, the first derivative of PyTorch's L2 norm is 0, but its second derivative is NaN.
F.normalize divides by this norm. The second derivative of Mish overflows for inputs from 89 on.
hardsigmoid and hardswish have no second derivative.

`find_operators` finds the modules that call such operators. `replace_operators` makes these modules
call replacements (twins), which have the same values and first derivatives.
"""

import functools
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


def widen(x: Tensor) -> Tensor:
    """Returns `x` in the dtype in which PyTorch computes activations, such as fp32 for bf16."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def hardsigmoid(input: Tensor, inplace: bool = False) -> Tensor:
    """Computes F.hardsigmoid, which has no second derivative, from operators that have one."""
    return (F.relu6(widen(input) + 3) / 6).to(input.dtype)


def hardswish(input: Tensor, inplace: bool = False) -> Tensor:
    """Computes F.hardswish from operators that have a second derivative."""
    x = widen(input)
    return (x * F.relu6(x + 3) / 6).to(input.dtype)


def mish(input: Tensor, inplace: bool = False) -> Tensor:
    """Computes F.mish with a second derivative that is finite everywhere.

    The threshold of softplus is 40. Above it, softplus equals its argument to the last bit of
    float64.
    """
    # the formula is copied from fastgn_kernels.reference, because that is a separate package
    x = widen(input)
    return (x * F.softplus(x, threshold=40).tanh()).to(input.dtype)


def normalize(
    input: Tensor, p: float = 2.0, dim: int = 1, eps: float = 1e-12, out: None = None
) -> Tensor:
    """Computes F.normalize with finite derivatives for vectors that are shorter than eps.

    For such vectors eps replaces the norm. The function is then linear, and its derivatives do not
    contain those of the norm.
    """
    norm = functools.partial(torch.Tensor.norm, p=p, dim=dim, keepdim=True)
    short = norm(input.detach()) < eps
    length = norm(torch.where(short, 1.0, input)).clamp_min(eps)
    return input / torch.where(short, eps, length)


def vector_norm(
    x: Tensor,
    ord: float = 2.0,
    dim: Any = None,
    keepdim: bool = False,
    *,
    dtype: torch.dtype | None = None,
    out: None = None,
) -> Tensor:
    """Computes torch.linalg.vector_norm. At a zero vector all derivatives of the norm are 0."""
    norm = functools.partial(torch.linalg.vector_norm, ord=ord, dim=dim, keepdim=True, dtype=dtype)
    length = norm(x.detach())
    zero = length < torch.finfo(length.dtype).tiny
    length = torch.where(zero, length, norm(torch.where(zero, 1.0, x)))
    if keepdim:
        return length
    return length.squeeze() if dim is None else length.squeeze(dim)


def norm(
    input: Tensor,
    p: float | str | None = "fro",
    dim: Any = None,
    keepdim: bool = False,
    dtype: torch.dtype | None = None,
    out: None = None,
) -> Tensor:
    """Computes torch.norm, with `vector_norm` for the L2 norm and PyTorch's operator for other
    norms."""
    if p not in ("fro", 2, None):
        return torch.norm(input, p, dim, keepdim, dtype=dtype)
    return vector_norm(input, 2.0, dim, keepdim, dtype=dtype)


TWINS: dict[Callable, Callable] = {
    F.hardsigmoid: hardsigmoid,
    F.hardswish: hardswish,
    F.mish: mish,
    F.normalize: normalize,
    torch.linalg.vector_norm: vector_norm,
    torch.norm: norm,
    torch.Tensor.norm: norm,
}
"""Operator -> the function that replaces it and can be differentiated twice (its twin)."""
PAIRS = tuple(TWINS.items())
"""The pairs (operator, twin) in TWINS as a tuple. torch.compile cannot look up a key in a dict if
the key is a method, such as torch.Tensor.norm."""


class Twins(TorchFunctionMode):
    """Context manager that replaces calls of operators that cannot be differentiated twice.

    TWINS lists these operators and the functions that are called instead.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # compare one by one, because torch.compile cannot look up a method as the key of a dict
        for operator, twin in PAIRS:
            if func is operator:
                func = twin
                break
        return func(*args, **(kwargs or {}))


class WithTwins:
    """Base class that `replace_operators` adds to the class of a module.

    Its forward calls operators that can be differentiated twice (the twins).
    """

    plain: Any
    """Class of the module before the replacement."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with Twins():
            return super().forward(*args, **kwargs)  # type: ignore[misc]

    def __reduce__(self) -> Any:
        # pickle would look for the class by its name, and a class made at run time cannot be found
        return _create_twin, (self.plain,), self.__dict__


class Hardsigmoid(nn.Hardsigmoid):
    """nn.Hardsigmoid with a second derivative. It is needed because `Twins` cannot replace calls of
    F.hardsigmoid under torch.compile."""

    def forward(self, input: Tensor) -> Tensor:
        return hardsigmoid(input)


class Hardswish(nn.Hardswish):
    """nn.Hardswish with a second derivative. It is needed because `Twins` cannot replace calls of
    F.hardswish under torch.compile."""

    def forward(self, input: Tensor) -> Tensor:
        return hardswish(input)


CLASSES: dict[type[nn.Module], type[nn.Module]] = {
    nn.Hardsigmoid: Hardsigmoid,
    nn.Hardswish: Hardswish,
}
"""Class of modules whose operators `Twins` cannot replace -> class that can be differentiated
twice."""


@functools.cache
def make_twin_class(plain: Any) -> Any:
    """Returns a subclass of a module's class whose forward can be differentiated twice.

    The forward calls the twins, which are the replacements of operators. The subclass has the same
    name as the module's class, `plain`.
    """
    if plain in CLASSES:
        return CLASSES[plain]
    names = {"plain": plain, "__module__": plain.__module__, "__qualname__": plain.__qualname__}
    return type(plain.__name__, (WithTwins, plain), names)


def _create_twin(plain: Any) -> nn.Module:
    """Returns an uninitialised module of the class that `make_twin_class` makes, for unpickling."""
    cls = make_twin_class(plain)
    return cls.__new__(cls)


class Finder(TorchFunctionMode):
    """Context manager that counts calls of operators that cannot be differentiated twice.

    The calls are counted for the innermost running module. TWINS lists the operators.
    """

    def __init__(self) -> None:
        super().__init__()
        self.running: list[nn.Module] = []
        self.found: dict[nn.Module, Counter[str]] = defaultdict(Counter)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in TWINS and self.running:
            self.found[self.running[-1]][func.__name__] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def find_operators(network: nn.Module) -> Iterator[Finder]:
    """Records where a network calls operators that cannot be differentiated twice.

    TWINS lists these operators. Only calls inside the with block are recorded. Operators that
    PyTorch calls inside another operator are not recorded.
    """
    finder = Finder()

    def enter(module: nn.Module, args: Any) -> None:
        finder.running.append(module)

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        finder.running.pop()

    hooks = []
    for module in network.modules():
        hooks.append(module.register_forward_pre_hook(enter))
        hooks.append(module.register_forward_hook(leave, always_call=True))
    try:
        with finder:
            yield finder
    finally:
        for hook in hooks:
            hook.remove()


def replace_operators(finder: Finder) -> dict[str, int]:
    """Makes the modules that a Finder has found call operators that can be differentiated twice.

    Returns {operator: number of calls}. The modules remain the same objects, with their weights,
    hooks and names.
    """
    total: Counter[str] = Counter()
    for module, calls in finder.found.items():
        if isinstance(module, WithTwins):  # already replaced
            continue
        plain: Any = type(module)
        module.__class__ = make_twin_class(plain)
        total += calls
    return dict(total)
