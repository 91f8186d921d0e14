"""Finds modules of a network that compute what a fused op does, but that cannot be replaced by it.

`swap_modules` replaces modules whose classes it knows. It cannot replace an activation or attention
that a forward method calls as a function, such as F.gelu. It also does not know most classes of
other libraries.

`survey` finds such modules. It reads the code and the name of each module's class, and does not run
the network.
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
"""Text that explains why a call of scaled_dot_product_attention is a problem, and what to do. It
ends the reason that `survey` gives for such a call."""

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
"""Function of PyTorch, such as F.gelu -> family that `survey` reports for a module that calls the
function, such as "activation"."""

LOOK_ALIKES = (
    ("window_attention", re.compile("attention", re.IGNORECASE)),
    ("layer_norm", re.compile("layer_?norm", re.IGNORECASE)),
    (
        "activation",
        re.compile(r"activation|gelu|silu|swish|mish|softplus|gate\b|[a-z]?elu\b", re.IGNORECASE),
    ),
)
"""Pairs (family, pattern), which tell from the name of a class what its modules compute. For
example, the class MyLayerNorm belongs to the family "layer_norm". If several patterns match, the
first one counts."""


def survey(model: nn.Module, known: Callable[[nn.Module], bool]) -> dict[str, tuple[str, str]]:
    """Finds the modules that seem to compute what a fused op computes, but that cannot be replaced
    by it.

    A module is found if its class calls a function such as F.gelu, or if it holds one as an
    attribute. It is also found if its class has a name such as MyLayerNorm.

    known: function that returns True for a module that `survey` skips, because its class is known.

    Returns a dict from the name of each such module to (family, reason). The family is
    "activation", "layer_norm" or "window_attention". The reason says why the module cannot be
    replaced.
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
    """Returns (family, reason) if a module seems to compute what a fused op computes, otherwise
    None.

    The family is "activation", "layer_norm" or "window_attention". The reason says why the fused op
    cannot replace the module.
    """
    cls: Any = type(module)
    if isinstance(module, nn.MultiheadAttention):
        return "window_attention", f"its attention is a function, {SDPA}"
    calls = [f for f in _called(cls) if f in FUNCTIONS] if cls.__module__[:8] != "torch.nn" else []
    # timm's attention calls scaled_dot_product_attention only if its attribute fused_attn is True
    if getattr(module, "fused_attn", True) is False:
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
    """Yields the functions that a module holds in its attributes.

    An attribute can be a function, a functools.partial of a function, or a list or tuple of these.
    """
    for name, value in vars(module).items():
        if name.startswith("_"):  # skip attributes such as _forward_hooks, which every module has
            continue
        for item in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(item, functools.partial):
                item = item.func
            if isinstance(item, (types.FunctionType, types.BuiltinFunctionType)):
                yield item


def _by_name(function: Any) -> bool:
    """Returns whether the name of a function contains the name of an activation.

    For example, the name shifted_softplus contains softplus.
    """
    return LOOK_ALIKES[-1][1].search(function.__name__.replace("_", " ")) is not None


@functools.cache
def _called(cls: type) -> tuple[Any, ...]:
    """Returns the functions, such as F.gelu, that a class uses and that a fused op could replace.

    The code of the class's methods is searched for them. If a method calls a helper function of its
    own Python module, the code of the helper is searched, too.
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
    """Yields the functions to which the code of `function` refers by a global name, such as
    F.gelu."""
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
