"""nn.Modules that call the fused ops. `swap_modules` puts them into an existing network.

The fused ops cannot run under torch.fx and torch.jit, or on nested tensors. In these cases, a
module uses PyTorch's operators instead.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn

from fastgn_kernels import reference
from fastgn_kernels.activations import activation, gelu
from fastgn_kernels.layer_norm import layer_norm
from fastgn_kernels.maths import TABLE
from fastgn_kernels.window_attention import LARGEST, window_attention_qkvpacked


def needs_plain(x: Any) -> bool:
    """Returns whether `x` needs PyTorch's operators, because the fused ops do not support it.

    This is so for a proxy of torch.fx and for a nested tensor.
    """
    return isinstance(x, torch.fx.Proxy) or x.is_nested


class FusedActivation(nn.Module):
    """Applies an activation function to a tensor of any shape, with the fused op `activation`.

    kind: name of the activation, one of ``fastgn_kernels.ACTIVATIONS``. Raises ValueError if it is
    unknown. parameter: parameter of the activation, such as the slope of leaky_relu. If None,
    PyTorch's default is used.
    """

    kind: str
    """Name of the activation, one of ``fastgn_kernels.ACTIVATIONS``."""
    parameter: float | None
    """Parameter of the activation, such as the slope of leaky_relu. If None, PyTorch's default is
    used."""

    def __init__(self, kind: str, parameter: float | None = None):
        super().__init__()
        if kind not in TABLE:
            raise ValueError(f"FusedActivation: kind {kind!r} is not one of {', '.join(TABLE)}")
        self.kind = kind
        self.parameter = parameter

    def plain(self, x: Tensor) -> Tensor:
        """Computes the activation with PyTorch's operators."""
        if self.kind == "silu":  # torch.fx cannot trace the reference, which asks for the dtype
            return F.silu(x)
        return reference.activation(x, self.kind, parameter=self.parameter)

    def forward(self, x: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            return self.plain(x)
        else:  # this must be an else branch, because torch.jit would compile code after the if
            return self.plain(x) if needs_plain(x) else self.fused(x)

    def fused(self, x: Tensor) -> Tensor:
        """Computes the activation with the fused op."""
        if self.kind == "softplus" and x.is_cuda and torch.is_autocast_enabled("cuda"):
            # under autocast, F.softplus computes in float32, too
            x = x.to(torch.promote_types(x.dtype, torch.float32))
        return activation(x, self.kind, parameter=self.parameter)

    def extra_repr(self) -> str:
        return self.kind if self.parameter is None else f"{self.kind}, {self.parameter:g}"


class FusedGELU(FusedActivation):
    """Applies GELU with the fused op, in place of nn.GELU.

    approximate: "none" for the exact function with erf, or "tanh" for its approximation with tanh.
    Raises ValueError for any other value.
    """

    def __init__(self, approximate: str = "none"):
        if approximate not in ("none", "tanh"):
            raise ValueError(f"FusedGELU: approximate {approximate!r} should be 'none' or 'tanh'")
        super().__init__("gelu" if approximate == "none" else "gelu_tanh")


class FusedSiLU(FusedActivation):
    """Applies SiLU with the fused op, in place of nn.SiLU."""

    def __init__(self) -> None:
        super().__init__("silu")


class FusedBiasGELU(nn.Module):
    """Computes gelu(x + bias) with a learned bias, for an input x of shape (..., num_features).

    The kernel that computes the gradient of x also computes the gradient of the bias. Do not use
    this module for the bias of an nn.Linear, because the matrix product adds that bias at no cost.

    approximate: "none" for the exact GELU with erf, or "tanh" for its approximation with tanh.
    """

    def __init__(
        self,
        num_features: int,
        approximate: str = "none",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.approximate = approximate
        self.bias = nn.Parameter(torch.zeros(num_features, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return gelu(x, self.bias, self.approximate)

    def extra_repr(self) -> str:
        return f"{self.bias.numel()}, approximate={self.approximate!r}"


class FusedLayerNorm(nn.LayerNorm):
    """Normalises the last dimension with the fused op, in place of nn.LayerNorm with the same
    arguments.

    forward(x) returns the normalised x. forward(x, residual) returns the pair (normalised sum, sum)
    for the sum x + residual, as `layer_norm` does. Raises ValueError if normalized_shape has more
    than one dimension.
    """

    before_linear: bool = False
    """Whether only a linear layer reads the output of this LayerNorm.

    If so, the output under autocast has autocast's dtype instead of float32. The linear layer would
    round its input to that dtype anyway, so the linear layer's result does not change. The output
    and its gradient then take half the memory traffic."""

    def __init__(self, normalized_shape: int | Sequence[int], *args: Any, **kwargs: Any):
        super().__init__(normalized_shape, *args, **kwargs)
        if len(self.normalized_shape) != 1:
            raise ValueError(
                f"FusedLayerNorm: normalized_shape {self.normalized_shape} should be one dimension"
            )

    def plain(self, x: Tensor) -> Tensor:
        """Normalises x with PyTorch's operators."""
        return nn.LayerNorm.forward(self, x)

    # the result is not annotated, because torch.jit would then expect a pair from every call
    def forward(self, x: Tensor, residual: Tensor | None = None):
        if torch.jit.is_scripting():
            return self.plain(x)
        else:
            if not needs_plain(x):
                return self.fused(x, residual)
            total = x if residual is None else x + residual
            return self.plain(total) if residual is None else (self.plain(total), total)

    def fused(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """Returns the normalised x, computed by the fused op.

        If there is a residual, returns the pair (normalised sum, sum) for the sum x + residual.
        """
        # check the shape here, because the op cannot check it if the LayerNorm has no weight
        if x.shape[-1:] != self.normalized_shape:
            raise ValueError(
                f"FusedLayerNorm: x has shape {tuple(x.shape)}, its last dimension should be "
                f"{self.normalized_shape[0]}"
            )
        dtype, device = None, x.device.type
        if self.before_linear and x.dtype != torch.float64 and torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        return layer_norm(x, self.weight, self.bias, self.eps, residual, dtype)


class FusedWindowAttention(nn.Module):
    """Computes the attention of timm's ``WindowAttention``, which Swin uses, with the fused op.

    Only `swap_modules` makes such modules. They inherit their other methods from timm's class.
    forward(x, mask) takes x as (B, N, C) for B windows of N tokens. The mask is (W, N, N) for the W
    windows of an image, or None.
    """

    if TYPE_CHECKING:  # timm's class sets these attributes, and torch.jit must not see their types
        num_heads: int
        scale: float
        qkv: nn.Module
        proj: nn.Module
        proj_drop: nn.Module
        plain: Callable[..., Tensor]
        _get_rel_pos_bias: Callable[[], Tensor]

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        if torch.jit.is_scripting():
            return self.plain(x, mask)
        else:
            return self.plain(x, mask) if needs_plain(x) else self.fused(x, mask)

    def fused(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Computes the attention with the fused op."""
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        bias = self._get_rel_pos_bias().squeeze(0)
        out = window_attention_qkvpacked(qkv, bias, mask, self.scale)
        return self.proj_drop(self.proj(out.transpose(1, 2).flatten(2)))

    def set_window_size(self, window_size: int | tuple[int, int]) -> None:
        """Changes the window size, as the method of timm's class does.

        Raises ValueError if a window would have more tokens than the fused op supports.
        """
        height, width = (window_size,) * 2 if isinstance(window_size, int) else window_size
        if height * width > LARGEST:
            raise ValueError(
                f"FusedWindowAttention: a window of {height} x {width} has more than {LARGEST} "
                "tokens: set the size of the model's input before you call swap_modules"
            )
        super().set_window_size(window_size)  # type: ignore[misc]
