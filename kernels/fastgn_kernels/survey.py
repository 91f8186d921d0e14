"""Finds the computations of a network that `swap_modules` cannot replace.

`swap_modules` replaces modules of known classes. It cannot replace activations and attention that a
forward method calls as functions, or classes of other libraries. `survey` finds these by reading
the code of each module's class. It does not run the network.
"""

import dis
import functools
import re
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

SDPA = (
    "which has no second derivative in its fused forms: "
    "run the forward inside torch.nn.attention.sdpa_kernel(SDPBackend.MATH)"
)
"""End of the reason that `survey` gives for a module that uses scaled_dot_product_attention."""

FUNCTIONS: dict[Any, str] = {
    F.scaled_dot_product_attention: "window_attention",
    F.multi_head_attention_forward: "window_attention",
    F.layer_norm: "layer_norm",
    torch.layer_norm: "layer_norm",
} | dict.fromkeys(
    (
        *(F.gelu, F.silu, F.mish, F.softplus, F.elu, F.elu_, F.relu, F.relu_, F.leaky_relu),
        *(F.leaky_relu_, F.tanh, F.sigmoid, torch.relu, torch.relu_, torch.tanh, torch.tanh_),
        *(torch.sigmoid, torch.sigmoid_),
    ),
    "activation",
)
"""Function of PyTorch -> name of the fused op that could replace its calls."""

LOOK_ALIKES = (
    ("window_attention", re.compile("attention", re.IGNORECASE)),
    ("layer_norm", re.compile("layer_?norm", re.IGNORECASE)),
    (
        "activation",
        re.compile(r"activation|gelu|silu|swish|mish|softplus|gate\b|[a-z]?elu\b", re.IGNORECASE),
    ),
)
"""Pairs of a family of modules, such as "layer_norm", and a pattern for names of classes. A class
belongs to the family of the first pattern that matches its name."""


def survey(model: nn.Module, known: Callable[[nn.Module], bool]) -> dict[str, tuple[str, str]]:
    """Finds the modules that seem to compute what a fused op does, but that cannot be replaced.

    Returns name of the module -> (family, reason). Such modules call or hold a function such as
    F.gelu, or their class has a name such as MyLayerNorm. The family is "activation", "layer_norm"
    or "window_attention". known: function that returns True for modules to skip.
    """
    found = {}
    for name, module in model.named_modules():
        if known(module):
            continue
        reason = _reason(module)
        if reason is not None:
            found[name or type(module).__name__] = reason
    return found


def _reason(module: nn.Module) -> tuple[str, str] | None:
    """Returns (family, reason) if a module seems to compute what a fused op does, otherwise None.

    The family is "activation", "layer_norm" or "window_attention". The reason says why the module
    cannot be replaced by the fused op.
    """
    cls: Any = type(module)
    if isinstance(module, nn.MultiheadAttention):
        return "window_attention", f"its attention is a function, {SDPA}"
    calls = [f for f in _called(cls) if f in FUNCTIONS] if cls.__module__[:8] != "torch.nn" else []
    if getattr(module, "fused_attn", True) is False:  # timm then uses matrix products
        calls = [f for f in calls if f is not F.scaled_dot_product_attention]
    held = [f for f in _held(module) if f in FUNCTIONS or _by_name(f)]
    for function, verb in [(f, "calls") for f in calls] + [(f, "holds") for f in held]:
        family = FUNCTIONS.get(function) or "activation"
        more = f", {SDPA}" if function is F.scaled_dot_product_attention else ""
        return family, f"it {verb} {function.__name__} as a function{more}"
    for family, pattern in LOOK_ALIKES:
        if pattern.search(cls.__name__):
            return family, f"swap_modules does not know {cls.__module__}.{cls.__qualname__}"
    return None


def _held(module: nn.Module) -> Iterator[Any]:
    """Yields the functions that are attributes of a module, alone or in a list or a partial."""
    for name, value in vars(module).items():
        if name.startswith("_"):  # for example _forward_hooks, which every module has
            continue
        for item in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(item, functools.partial):
                item = item.func
            if isinstance(item, (types.FunctionType, types.BuiltinFunctionType)):
                yield item


def _by_name(function: Any) -> bool:
    """Returns whether the name of a function contains the name of an activation.

    For example, shifted_softplus contains softplus.
    """
    return LOOK_ALIKES[-1][1].search(function.__name__.replace("_", " ")) is not None


@functools.cache
def _called(cls: type) -> tuple[Any, ...]:
    """Returns the functions that a fused op could replace and that a class's methods refer to.

    Helper functions in the same Python module as the method are searched, too.
    """
    found: dict[Any, None] = {}
    waiting: list[types.FunctionType] = []
    for base in cls.__mro__:
        if base.__module__.startswith(("torch.nn.", "builtins")):
            break
        waiting += [v for v in vars(base).values() if isinstance(v, types.FunctionType)]
    seen = set()
    while waiting:
        function = waiting.pop(0)
        if function in seen:
            continue
        seen.add(function)
        for value in _referred(function):
            if value in FUNCTIONS:
                found[value] = None
            elif isinstance(value, types.FunctionType) and value.__module__ == function.__module__:
                waiting.append(value)
    return tuple(found)


def _referred(function: types.FunctionType) -> Iterator[Any]:
    """Yields the functions that the code of `function` refers to by global names such as F.gelu."""
    value: Any = None
    for step in dis.get_instructions(function):
        if step.opname == "LOAD_GLOBAL":
            value = function.__globals__.get(str(step.argval))
        elif step.opname in ("LOAD_ATTR", "LOAD_METHOD") and isinstance(value, types.ModuleType):
            value = getattr(value, str(step.argval), None)
        elif step.opname not in ("CACHE", "EXTENDED_ARG", "PUSH_NULL"):
            value = None
        if isinstance(value, (types.FunctionType, types.BuiltinFunctionType)):
            yield value
