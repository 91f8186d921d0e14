"""`swap_modules`, which replaces modules of an existing network by fused ones.

It changes the class of a module to a subclass of its old class. The module remains the same object,
so its weights, buffers, state-dict keys, attributes and hooks stay. A module that is used in two
places remains one module, and optimizers and isinstance see no change.

timm's classes are found by name, so this package does not import timm.
"""

import functools
import types
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

from torch import nn

from fastgn_kernels.modules import (
    FusedActivation,
    FusedBiasGELU,
    FusedLayerNorm,
    FusedWindowAttention,
)
from fastgn_kernels.survey import survey
from fastgn_kernels.window_attention import LARGEST

FAMILIES = ("activation", "layer_norm", "window_attention")
"""Families of modules that `swap_modules` can replace."""


@functools.cache
def _in_place_of(replaced: Any, fused: Any) -> Any:
    """Returns the class that `swap_modules` gives to a module of class `replaced`.

    It is a subclass of `fused` and `replaced`. The forward method comes from `fused`, and
    isinstance(module, replaced) remains True.

    replaced: class such as nn.GELU. fused: class of modules.py, such as FusedActivation.
    """

    def __reduce__(self: nn.Module) -> Any:  # noqa: N807 - a method of the class below
        # Pickle finds a class by its name, so it cannot find a class that is made at run time.
        # Therefore pickle calls `_new`, which makes the class again.
        return _new, (replaced, fused), vars(self)

    # The method `plain` of the new class is a copy of the old forward.
    # The copied function is named "plain", too, because torch.jit identifies a method by this name.
    forward = replaced.forward
    plain = types.FunctionType(
        forward.__code__, forward.__globals__, "plain", forward.__defaults__, forward.__closure__
    )
    # keep the old __module__, because torch.fx does not trace modules whose class is in torch.nn
    names = {"__module__": replaced.__module__, "__reduce__": __reduce__, "plain": plain}
    return type(fused.__name__, (fused, replaced), names)


def _new(replaced: Any, fused: Any) -> nn.Module:
    """Returns a module without attributes, so that pickle can then restore them.

    Its class is the one that `_in_place_of` makes for the classes `replaced` and `fused`.
    """
    cls = _in_place_of(replaced, fused)
    return cls.__new__(cls)


class Swapped(NamedTuple):
    """Result of `swap_modules`: which modules of a network were replaced, and which were not.

    Print it to see a report.
    """

    counts: dict[str, int]
    """Kind of module -> number of modules of this kind that were replaced. A kind is the name of an
    activation, such as "gelu", or "layer_norm" or "window_attention"."""
    left: dict[str, str]
    """Name of each module that was not replaced although its class is known -> the reason."""
    missed: dict[str, str]
    """Name of each module of an unknown class that seems to compute what a fused op computes -> the
    reason why it cannot be replaced."""
    modules: int
    """Number of modules in the network."""

    def __str__(self) -> str:
        kinds = ", ".join(f"{n} {kind}" for kind, n in self.counts.items())
        lines = [f"{self.modules} modules, replaced: {kinds or 'none, the network is unchanged'}"]
        for what, reasons in (("not replaced", self.left), ("cannot be replaced", self.missed)):
            for reason, count in Counter(reasons.values()).items():
                first = next(name for name, r in reasons.items() if r == reason)
                more = f" and {count - 1} more" if count > 1 else ""
                lines.append(f"{what}: {first}{more}: {reason}")
        return "\n".join(lines)


class _RefusedError(Exception):
    """Raised if a module cannot be replaced by a fused one. The message says why."""


_New = tuple[str, type[nn.Module], dict[str, Any]]
"""How to replace a module: its kind in the report, its new class, and new values of its
attributes."""


def _activation(kind: str, parameter: float | None = None) -> _New:
    """Returns (kind, new class, new attributes), which say how to replace an activation module.

    kind: name of the activation, such as "gelu". parameter: parameter of the activation, such as
    the slope of leaky_relu. If None, PyTorch's default is used.
    """
    return kind, FusedActivation, {"kind": kind, "parameter": parameter}


def _softplus(module: Any) -> _New:
    """Returns (kind, new class, new attributes), which say how to replace an nn.Softplus.

    Raises _RefusedError if its threshold is not PyTorch's default.
    """
    if module.threshold != 20:
        raise _RefusedError(f"its threshold is {module.threshold:g}, not PyTorch's 20")
    return _activation("softplus", module.beta)


def _layer_norm(module: Any) -> _New:
    """Returns (kind, new class, new attributes), which say how to replace a LayerNorm.

    Raises _RefusedError if the module cannot be replaced.
    """
    if len(module.normalized_shape) != 1:
        raise _RefusedError(f"it normalises {len(module.normalized_shape)} dimensions at once")
    if getattr(module, "_fast_norm", False):
        raise _RefusedError("timm's fast norm computes in autocast's dtype")
    return "layer_norm", FusedLayerNorm, {}


def _window_attention(module: Any) -> _New:
    """Returns (kind, new class, new attributes), which say how to replace timm's WindowAttention.

    Raises _RefusedError if the module cannot be replaced.
    """
    if not isinstance(module.qkv, nn.Linear):
        raise _RefusedError(f"its qkv is a {type(module.qkv).__name__}, not a Linear")
    head_dim = module.qkv.out_features // (3 * module.num_heads)
    if module.window_area > LARGEST or head_dim > LARGEST:
        raise _RefusedError(
            f"its {module.window_area} tokens per window or {head_dim} channels per head are more "
            f"than {LARGEST}"
        )
    if getattr(module.attn_drop, "p", None) != 0:
        raise _RefusedError("it uses dropout on attention weights")
    # the fused op does not call these two submodules, so their hooks would not run
    for name in ("softmax", "attn_drop"):
        inner = vars(getattr(module, name))
        if any(hooks for key, hooks in inner.items() if key.endswith("_hooks")):
            raise _RefusedError(f"its {name} has hooks")
    return "window_attention", FusedWindowAttention, {}


_TORCH = "torch.nn.modules.activation."
_TIMM = "timm.layers.activations."

_KNOWN: dict[str, tuple[str, Callable[[Any], _New]]] = {
    f"{prefix}{name}": ("activation", new)
    for prefix, name, new in (
        (_TORCH, "GELU", lambda m: _activation("gelu" if m.approximate == "none" else "gelu_tanh")),
        (_TORCH, "SiLU", lambda m: _activation("silu")),
        (_TORCH, "Mish", lambda m: _activation("mish")),
        (_TORCH, "Softplus", _softplus),
        (_TORCH, "ELU", lambda m: _activation("elu", m.alpha)),
        (_TORCH, "Tanh", lambda m: _activation("tanh")),
        (_TORCH, "Sigmoid", lambda m: _activation("sigmoid")),
        (_TORCH, "ReLU", lambda m: _activation("relu")),
        (_TORCH, "LeakyReLU", lambda m: _activation("leaky_relu", m.negative_slope)),
        (_TIMM, "GELU", lambda m: _activation("gelu")),
        (_TIMM, "GELUTanh", lambda m: _activation("gelu_tanh")),
        (_TIMM, "QuickGELU", lambda m: _activation("quick_gelu")),
        (_TIMM, "Swish", lambda m: _activation("silu")),
        (_TIMM, "Tanh", lambda m: _activation("tanh")),
        (_TIMM, "Sigmoid", lambda m: _activation("sigmoid")),
    )
} | {
    "torch.nn.modules.normalization.LayerNorm": ("layer_norm", _layer_norm),
    "timm.layers.norm.LayerNorm": ("layer_norm", _layer_norm),
    "timm.models.swin_transformer.WindowAttention": ("window_attention", _window_attention),
}
"""Name of each class that can be replaced -> the family of the class, and a function. The function
takes a module of the class, and returns how to replace this module, as a `_New`.

timm's Mish is not among them, because it returns float32 under autocast."""

_BLOCK = (("norm1", "attn.qkv"), ("norm2", "mlp.fc1"))
_BEFORE_LINEAR: dict[str, Sequence[tuple[str, str]]] = {
    "timm.models.swin_transformer.SwinTransformerBlock": _BLOCK,
    "timm.models.swin_transformer.PatchMerging": (("norm", "reduction"),),
    "timm.models.vision_transformer.Block": _BLOCK,
}
"""Name of a class -> pairs of names of its submodules. The first of each pair is a LayerNorm. The
second is a linear layer, which is the only reader of the LayerNorm's output."""

_FUSED = (FusedActivation, FusedBiasGELU, FusedLayerNorm, FusedWindowAttention)


def _name(cls: type) -> str:
    """Returns the full name of a class, such as torch.nn.modules.activation.GELU."""
    return f"{cls.__module__}.{cls.__qualname__}"


def _norms_before_linear(model: nn.Module) -> set[nn.Module]:
    """Returns the LayerNorms of a network whose output is read only by an nn.Linear.

    They are found by their names, which `_BEFORE_LINEAR` lists for known classes. A LayerNorm with
    forward hooks is left out, because the hooks read its output, too.
    """
    found = set()
    for module in model.modules():
        for name, reader in _BEFORE_LINEAR.get(_name(type(module)), ()):
            try:
                norm, linear = module.get_submodule(name), module.get_submodule(reader)
            except AttributeError:
                continue
            if type(linear) is nn.Linear and not norm._forward_hooks:
                found.add(norm)
    return found


def swap_modules(model: nn.Module, only: Sequence[str] = FAMILIES) -> Swapped:
    """Replaces the modules of a network for which there is a fused op, in place.

    These are activations, LayerNorms over one dimension, and the window attention of timm's Swin.
    The model itself is replaced too if it is such a module. Call this before torch.compile. A
    second call finds nothing to replace.

    A module stays as it was if the fused op could not reproduce its result. A subclass of a known
    class stays too, because it may compute something else. Replaced activations ignore
    inplace=True. Under autocast, the LayerNorms before a linear layer in timm's Swin and ViT return
    autocast's dtype, see `FusedLayerNorm.before_linear`.

    Args:
        model: any network.
        only: names of the families to replace, each from `FAMILIES`.

    Returns:
        A report, which you can print. It says which modules were replaced, and which were not and
        why. It also names computations that cannot be replaced, such as activations that a forward
        method calls as functions.

    Raises:
        ValueError: if a family is unknown.
    """
    only = (only,) if isinstance(only, str) else tuple(only)
    for family in only:
        if family not in FAMILIES:
            raise ValueError(f"swap_modules: family {family!r} is not one of {', '.join(FAMILIES)}")
    counts: Counter[str] = Counter()
    left: dict[str, str] = {}
    before_linear = _norms_before_linear(model)
    for name, module in model.named_modules():
        names = [_name(cls) for cls in type(module).__mro__]
        known = next((n for n in names if n in _KNOWN), None)
        if known is None or _KNOWN[known][0] not in only or isinstance(module, _FUSED):
            continue
        try:
            if known != names[0]:
                raise _RefusedError(f"{names[0]} is a subclass of {known}")
            if "forward" in vars(module):
                raise _RefusedError("its forward method was replaced by another one")
            kind, cls, attributes = _KNOWN[known][1](module)
        except _RefusedError as reason:
            left[name or type(module).__name__] = str(reason)
            continue
        replaced, fused = cast(Any, type(module)), cast(Any, cls)
        module.__class__ = _in_place_of(replaced, fused)
        vars(module).update(attributes)
        if kind == "layer_norm" and module in before_linear:
            module.before_linear = True
        counts[kind] += 1

    def is_known(module: nn.Module) -> bool:
        known = any(_name(cls) in _KNOWN for cls in type(module).__mro__)
        return known or isinstance(module, _FUSED)

    missed = {
        name: reason for name, (family, reason) in survey(model, is_known).items() if family in only
    }
    return Swapped(dict(counts), left, missed, sum(1 for _ in model.modules()))
