"""Attention within windows of at most 64 tokens, as Swin's, three orders.

The formulas are in `window_attention_kernels`.
"""

import torch
from torch import Tensor

from fastgn_kernels import reference
from fastgn_kernels.dispatch import (
    INTERPRETED,
    capability,
    define,
    differentiable,
    inlines,
    is_floating,
    no_forward_mode,
    no_third_derivative,
    runs_triton,
    wide,
)
from fastgn_kernels.window_attention_kernels import (
    launch_backward,
    launch_backward_backward,
    launch_forward,
)

LARGEST = 64
"""Tokens of a window, and channels of a head."""


def _outputs(qkv: Tensor) -> tuple[Tensor, Tensor]:
    """Room for something like qkv and something like o, laid out as linear layers want them."""
    _, windows, heads, tokens, dim = qkv.shape
    like_qkv = qkv.new_empty(windows, tokens, 3, heads, dim).permute(2, 0, 3, 1, 4)
    return like_qkv, qkv.new_empty(windows, tokens, heads, dim).transpose(1, 2)


def _kernel_runs(qkv: Tensor) -> bool:
    """Triton's products in float32 proper, and all on Volta, whose tensor cores it no longer knows,
    spill thousands of bytes of registers a thread: left to PyTorch's operators."""
    if not runs_triton(qkv) or INTERPRETED:
        return runs_triton(qkv)
    return qkv.dtype in (torch.float16, torch.bfloat16) and capability(qkv) >= 80


def _bias_output(qkv: Tensor, learned: Tensor | None) -> Tensor:
    """Room for the gradient of `learned`, the bias where its gradient is asked for; else empty:
    custom ops return tensors."""
    return qkv.new_empty(0) if learned is None else learned.new_empty(learned.shape)


def _forward(qkv: Tensor, bias: Tensor | None, mask: Tensor | None, scale: float) -> Tensor:
    if not _kernel_runs(qkv):
        return _forward_plain(qkv, bias, mask, scale)
    _, o = _outputs(qkv)
    if qkv.numel():
        launch_forward(qkv, bias, mask, scale, o)
    return o


def _softmax_plain(
    q: Tensor, k: Tensor, bias: Tensor | None, mask: Tensor | None, scale: float
) -> Tensor:
    s = scale * (q @ k.mT)
    if bias is not None:
        s = s + bias.to(s.dtype)
    if mask is not None:
        masks, mask = mask.shape[0], mask[:, None].to(s.dtype)
        s = (s.unflatten(0, (s.shape[0] // masks, masks)) + mask).flatten(0, 1)
    return s.softmax(-1)


def _forward_plain(qkv: Tensor, bias: Tensor | None, mask: Tensor | None, scale: float) -> Tensor:
    q, k, v = qkv.to(wide(qkv.dtype))
    return _outputs(qkv)[1].copy_(_softmax_plain(q, k, bias, mask, scale) @ v)


def _backward(
    go: Tensor, qkv: Tensor, more: Tensor | None, bias: Tensor | None, mask: Tensor | None,
    scale: float, weight_grads: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(gqkv + more, gbias); the last is empty without weight_grads."""
    learned = bias if weight_grads else None
    if not _kernel_runs(qkv):
        return _backward_plain(go, qkv, more, bias, mask, scale, learned)
    gqkv, gbias = _outputs(qkv)[0], _bias_output(qkv, learned)
    if not qkv.numel():
        return gqkv, gbias.zero_()
    total = launch_backward(go, qkv, more, bias, mask, scale, learned, gqkv)
    return gqkv, gbias if total is None else total


def _backward_plain(
    go: Tensor, qkv: Tensor, more: Tensor | None, bias: Tensor | None, mask: Tensor | None,
    scale: float, learned: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    q, k, v = qkv.to(wide(qkv.dtype))
    go = go.to(q.dtype)
    p = _softmax_plain(q, k, bias, mask, scale)
    gp = go @ v.mT
    gs = p * (gp - (p * gp).sum(-1, keepdim=True))
    gqkv = _outputs(qkv)[0]
    for into, value in zip(
        gqkv.unbind(), (scale * gs @ k, scale * gs.mT @ q, p.mT @ go), strict=True
    ):
        into.copy_(value)
    if more is not None:
        gqkv += more
    gbias = _bias_output(qkv, learned)
    return gqkv, gbias if learned is None else gbias.copy_(gs.sum(0))


def _backward_backward(
    vqkv: Tensor, vbias: Tensor | None, go: Tensor, qkv: Tensor, bias: Tensor | None,
    mask: Tensor | None, scale: float, weight_grads: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(ggo, gqkv, gbias); the last is empty without weight_grads."""
    learned = bias if weight_grads else None
    if not _kernel_runs(qkv):
        return _backward_backward_plain(vqkv, vbias, go, qkv, bias, mask, scale, learned)
    (gqkv, ggo), gbias = _outputs(qkv), _bias_output(qkv, learned)
    if not qkv.numel():
        return ggo, gqkv, gbias.zero_()
    total = launch_backward_backward(vqkv, vbias, go, qkv, bias, mask, scale, learned, ggo, gqkv)
    return ggo, gqkv, gbias if total is None else total


def _backward_backward_plain(
    vqkv: Tensor, vbias: Tensor | None, go: Tensor, qkv: Tensor, bias: Tensor | None,
    mask: Tensor | None, scale: float, learned: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    q, k, v = qkv.to(wide(qkv.dtype))
    vq, vk, vv = vqkv.to(q.dtype)
    go = go.to(q.dtype)
    p = _softmax_plain(q, k, bias, mask, scale)
    t = scale * (vq @ k.mT + q @ vk.mT)
    if vbias is not None:
        t = t + vbias.to(t.dtype)
    t = t - (p * t).sum(-1, keepdim=True)
    gp = go @ v.mT
    gp = gp - (p * gp).sum(-1, keepdim=True)
    pt, gs = p * t, p * gp
    u = gp * t + go @ vv.mT  # short of U by a constant a row, which drops out of Sb
    sb = p * (u - (p * u).sum(-1, keepdim=True))
    gqkv, ggo = _outputs(qkv)
    values = (scale * (sb @ k + gs @ vk), scale * (sb.mT @ q + gs.mT @ vq), pt.mT @ go)
    for into, value in zip(gqkv.unbind(), values, strict=True):
        into.copy_(value)
    gbias = _bias_output(qkv, learned)
    ggo.copy_(pt @ v + p @ vv)
    return ggo, gqkv, gbias if learned is None else gbias.copy_(sb.sum(0))


def _stand_in(qkv: Tensor) -> Tensor:
    """One element of memory in the shape of qkv. The backward depends on qkv through it, so that
    what the second derivative has for qkv comes to the last backward, whose kernel adds it to its
    own in passing, and not beside it: Inductor's sum took 15 passes over the width of a block, the
    last kernel takes 3."""
    return qkv.new_zeros(1).expand(qkv.shape)


@define("fastgn::window_attention")
def _window_attention(
    qkv: Tensor, bias: Tensor | None, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    return _forward(qkv, bias, mask, scale), _stand_in(qkv)


@define("fastgn::window_attention_bwd")
def _window_attention_bwd(
    go: Tensor, qkv: Tensor, stand_in: Tensor | None, more: Tensor | None, bias: Tensor | None,
    mask: Tensor | None, scale: float, weight_grads: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _backward(go, qkv, more, bias, mask, scale, weight_grads)


@define("fastgn::window_attention_bwd_bwd")
def _window_attention_bwd_bwd(
    vqkv: Tensor, vbias: Tensor | None, go: Tensor, qkv: Tensor, bias: Tensor | None,
    mask: Tensor | None, scale: float, weight_grads: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return _backward_backward(vqkv, vbias, go, qkv, bias, mask, scale, weight_grads)


@_window_attention.register_fake
def _(qkv: Tensor, bias: Tensor | None, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    return _outputs(qkv)[1], _stand_in(qkv)


@_window_attention_bwd.register_fake
def _(
    go: Tensor, qkv: Tensor, stand_in: Tensor | None, more: Tensor | None, bias: Tensor | None,
    mask: Tensor | None, scale: float, weight_grads: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _outputs(qkv)[0], _bias_output(qkv, bias if weight_grads else None)


@_window_attention_bwd_bwd.register_fake
def _(
    vqkv: Tensor, vbias: Tensor | None, go: Tensor, qkv: Tensor, bias: Tensor | None,
    mask: Tensor | None, scale: float, weight_grads: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    gqkv, ggo = _outputs(qkv)
    return ggo, gqkv, _bias_output(qkv, bias if weight_grads else None)


def _differentiate(
    options: tuple, saved: tuple, wanted: tuple[bool, ...], go: Tensor | None, more: Tensor | None
) -> tuple:
    qkv, bias, mask, stand_in = saved
    if go is None:
        return more, None, None, None
    if not torch.is_grad_enabled():
        stand_in = None  # the last backward
    gqkv, gbias = _window_attention_bwd(go, qkv, stand_in, more, bias, mask, options[-1], wanted[1])
    return gqkv, gbias if wanted[1] else None, None, None


def _differentiate_twice(
    options: tuple, saved: tuple, wanted: tuple[bool, ...],
    vqkv: Tensor | None, vbias: Tensor | None,
) -> tuple:  # fmt: skip
    go, qkv, bias, mask = saved
    filled = torch.zeros_like(qkv) if vqkv is None else vqkv
    scale, had_bias_grad = options[-2:]
    ggo, gqkv, gbias = _window_attention_bwd_bwd(
        filled, vbias if had_bias_grad else None, go, qkv, bias, mask, scale, wanted[4]
    )
    to_qkv = (None, gqkv) if wanted[2] else (gqkv, None)
    to_more, to_bias = vqkv if wanted[3] else None, gbias if wanted[4] else None
    return ggo, *to_qkv, to_more, to_bias, None, None, None


differentiable(
    _window_attention,
    "window_attention",
    save=lambda inputs, outputs: (*inputs[:3], outputs[1]),
    backward=_differentiate,
)
differentiable(
    _window_attention_bwd,
    "window_attention",
    save=lambda inputs, outputs: (*inputs[:2], *inputs[4:6]),
    backward=_differentiate_twice,
)
no_third_derivative(_window_attention_bwd_bwd, "window_attention")


def window_attention_qkvpacked(
    qkv: Tensor, bias: Tensor | None = None, mask: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """softmax(scale Q K^T + bias + mask) V in each window, one pass for each of three orders.

    qkv: (3, B, H, N, D) for B windows of N <= 64 tokens and H heads of D <= 64 channels; a linear
    layer's (B, N, 3 H D), seen as that through a view, is read and its gradient written without a
    copy. bias: (H, N, N), Swin's relative-position bias, with its gradient. mask: (W, N, N), added
    to window i as mask[i % W], without one; -inf bars a pair. scale: None for D ** -0.5.
    Returns (B, H, N, D), whose transpose(1, 2).flatten(2) is a view. Under autocast the products
    take its dtype, as F.scaled_dot_product_attention's. Source: Liu et al. 2021, arXiv 2103.14030.

    Stays one op in a compiled region where its kernels run. Raises ValueError on shapes that do not
    fit, TypeError on integers; a third derivative raises RuntimeError.
    """
    name = "window_attention"
    if qkv.dim() != 5 or qkv.shape[0] != 3:
        raise ValueError(f"{name}: qkv is {tuple(qkv.shape)}, should be (3, B, H, N, D)")
    _, windows, heads, tokens, dim = qkv.shape
    if not (0 < tokens <= LARGEST and 0 < dim <= LARGEST):
        raise ValueError(f"{name}: N = {tokens} and D = {dim} should be 1 to {LARGEST}")
    if bias is not None and bias.shape != (heads, tokens, tokens):
        raise ValueError(
            f"{name}: bias is {tuple(bias.shape)}, should be {(heads, tokens, tokens)}"
        )
    if mask is not None:
        if mask.dim() != 3 or mask.shape[1:] != (tokens, tokens) or not mask.shape[0]:
            raise ValueError(
                f"{name}: mask is {tuple(mask.shape)}, should be (W, {tokens}, {tokens})"
            )
        if windows % mask.shape[0]:
            raise ValueError(f"{name}: {windows} windows are no multiple of {mask.shape[0]} masks")
        if mask.requires_grad:
            raise ValueError(f"{name}: the mask has no gradient; add a learned one to the bias")
    is_floating(name, qkv=qkv, bias=bias, mask=mask)
    if torch.is_autocast_enabled(qkv.device.type) and qkv.dtype != torch.float64:
        qkv = qkv.to(torch.get_autocast_dtype(qkv.device.type))
    scale = dim**-0.5 if scale is None else scale
    if inlines() and not _kernel_runs(qkv):
        q, k, v = qkv.unbind()
        return reference.window_attention(q, k, v, bias, mask, scale)
    no_forward_mode(name, qkv, bias, mask)
    return _window_attention(qkv, bias, mask, scale)[0]


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """`window_attention_qkvpacked` of three (B, H, N, D) tensors, which it has to copy together."""
    if not q.shape == k.shape == v.shape:
        shapes = ", ".join(str(tuple(x.shape)) for x in (q, k, v))
        raise ValueError(f"window_attention: q, k, v are {shapes}, should be of one shape")
    return window_attention_qkvpacked(torch.stack((q, k, v)), bias, mask, scale)
