"""Operators that can be differentiated twice, in place of those that cannot, inside a network.

PyTorch's L2 norm has NaN as its second derivative at exactly 0, where its first is defined as 0; a
normalisation divides by that norm. Mish overflows from 89 on. hardsigmoid and hardswish have no
second derivative at all. `find_operators` sees which modules call such operators, and
`replace_operators` makes these modules call twins that have the same values and first derivatives.
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


def widened(x: Tensor) -> Tensor:
    """Returns `x` in the dtype that PyTorch's own activations compute in."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def hardsigmoid(input: Tensor, inplace: bool = False) -> Tensor:
    """Computes F.hardsigmoid, which has no second derivative, from operators that have one."""
    return (F.relu6(widened(input) + 3) / 6).to(input.dtype)


def hardswish(input: Tensor, inplace: bool = False) -> Tensor:
    """Computes F.hardswish from operators that have a second derivative."""
    x = widened(input)
    return (x * F.relu6(x + 3) / 6).to(input.dtype)


def mish(input: Tensor, inplace: bool = False) -> Tensor:
    """Computes F.mish with a second derivative that is finite everywhere.

    From 40 on softplus is linear to the last bit of float64.
    """
    # the formula of kernels/reference.py, written again because the packages are separate
    x = widened(input)
    return (x * F.softplus(x, threshold=40).tanh()).to(input.dtype)


def normalize(
    input: Tensor, p: float = 2.0, dim: int = 1, eps: float = 1e-12, out: None = None
) -> Tensor:
    """Computes F.normalize so that all derivatives are finite where a vector is shorter than eps.

    There the norm is clamped, so that the function is linear and no derivative needs the norm's.
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
    """Computes torch.linalg.vector_norm with 0 for all derivatives of the norm of a zero vector."""
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
    """Computes torch.norm as `vector_norm` does. Other norms than the L2 norm stay PyTorch's."""
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
"""Operator -> the twin that takes its place."""
PAIRS = tuple(TWINS.items())


class Twins(TorchFunctionMode):
    """Inside it, each operator of `TWINS` is its twin."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for operator, twin in PAIRS:  # torch.compile cannot look a method up in a dict
            if func is operator:
                func = twin
                break
        return func(*args, **(kwargs or {}))


class WithTwins:
    """Mixin that replace_operators adds as a base class."""

    plain: Any
    """The module's own class."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with Twins():
            return super().forward(*args, **kwargs)  # type: ignore[misc]

    def __reduce__(self) -> Any:
        # pickle finds a class by its name, and a subclass made at run time has none
        return _new, (self.plain,), self.__dict__


class Hardsigmoid(nn.Hardsigmoid):
    """nn.Hardsigmoid. torch.compile would not show F.hardsigmoid to `Twins`."""

    def forward(self, input: Tensor) -> Tensor:
        return hardsigmoid(input)


class Hardswish(nn.Hardswish):
    """nn.Hardswish. torch.compile would not show F.hardswish to `Twins`."""

    def forward(self, input: Tensor) -> Tensor:
        return hardswish(input)


CLASSES: dict[type[nn.Module], type[nn.Module]] = {
    nn.Hardsigmoid: Hardsigmoid,
    nn.Hardswish: Hardswish,
}


@functools.cache
def with_twins(plain: Any) -> Any:
    """Returns the class of a module whose operators are replaced; it keeps the name it had."""
    if plain in CLASSES:
        return CLASSES[plain]
    names = {"plain": plain, "__module__": plain.__module__, "__qualname__": plain.__qualname__}
    return type(plain.__name__, (WithTwins, plain), names)


def _new(plain: Any) -> nn.Module:
    cls = with_twins(plain)
    return cls.__new__(cls)


class Finder(TorchFunctionMode):
    """Counts the calls of operators of `TWINS`, by the innermost module that runs."""

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
    """Inside it, the Finder sees what `network` calls.

    Only an operator itself is seen, not those that it is made of.
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
    """Makes the modules that were found call the twins, in place. Returns how often, by operator.

    A module stays the object that it was, with its weights, hooks and names.
    """
    total: Counter[str] = Counter()
    for module, calls in finder.found.items():
        if isinstance(module, WithTwins):  # a twin is made of other operators
            continue
        plain: Any = type(module)
        module.__class__ = with_twins(plain)
        total += calls
    return dict(total)
