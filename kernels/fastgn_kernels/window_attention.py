"""Attention within windows of at most 64 tokens, as in Swin, as custom ops.

The docstring of `window_attention_kernels` explains the names of the tensors (go, ggqkv, ...) and
has the formulas. There are three implementations of these formulas. `_choose_implementation`
chooses one of them.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fastgn_kernels import formulas, reference
from fastgn_kernels.dispatch import (
    INTERPRETED,
    capability,
    check_floating,
    compute_dtype,
    define_op,
    is_compiling,
    register_derivative,
    register_third_derivative,
    run_op,
    runs_triton,
)
from fastgn_kernels.window_attention_launch import (
    launch_backward,
    launch_backward_backward,
    launch_forward,
)
from fastgn_kernels.window_attention_products import (
    compute_backward,
    compute_backward_backward,
    compute_forward,
)

LARGEST = 64
"""Largest number of tokens per window, and of channels per head."""


def _allocate_outputs(qkv: Tensor) -> tuple[Tensor, Tensor]:
    """Returns two uninitialised tensors: one like qkv, and one for the output of the attention.

    Their shapes are (3, B, H, N, D) and (B, H, N, D). Both are laid out in memory so that linear
    layers can use them without a copy.
    """
    _, windows, heads, tokens, dim = qkv.shape
    like_qkv = qkv.new_empty(windows, tokens, 3, heads, dim).permute(2, 0, 3, 1, 4)
    return like_qkv, qkv.new_empty(windows, tokens, heads, dim).transpose(1, 2)


def _allocate_bias_grad(qkv: Tensor, learned: Tensor | None) -> Tensor:
    """Returns an uninitialised tensor for the gradient of the bias.

    learned: the bias of the attention if the gradient of the bias is wanted, otherwise None. If
    None, the returned tensor has no elements, because a custom op cannot return None.
    """
    return qkv.new_empty(0) if learned is None else learned.new_empty(learned.shape)


def _compute_probabilities(
    q: Tensor, k: Tensor, bias: Tensor | None, mask: Tensor | None, scale: float
) -> Tensor:
    """Returns the attention probabilities softmax(scale q k^T + bias + mask), with PyTorch's
    operators.

    q, k: queries and keys, (B, H, N, D) each.
    """
    scores = scale * (q @ k.mT)
    if bias is not None:
        scores = scores + bias.to(scores.dtype)
    if mask is not None:
        masks, mask = mask.shape[0], mask[:, None].to(scores.dtype)
        scores = (scores.unflatten(0, (scores.shape[0] // masks, masks)) + mask).flatten(0, 1)
    return scores.softmax(-1)


def _centre(x: Tensor, p: Tensor) -> Tensor:
    """Returns x - sum(p * x) over each row, where p are the probabilities that a softmax returned.

    Let x be the gradient of the loss with respect to p. Then p * result is the gradient with
    respect to the input of the softmax.
    """
    return x - (p * x).sum(-1, keepdim=True)


def _forward_plain(
    qkv: Tensor, bias: Tensor | None, mask: Tensor | None, scale: float, o: Tensor
) -> None:
    """Computes the attention with PyTorch's operators, and writes it into o.

    Arguments are those of `launch_forward`, which runs a Triton kernel instead.
    """
    q, k, v = qkv.to(compute_dtype(qkv.dtype))
    o.copy_(_compute_probabilities(q, k, bias, mask, scale) @ v)


def _backward_plain(
    go: Tensor, qkv: Tensor, extra: Tensor | None, bias: Tensor | None, mask: Tensor | None,
    scale: float, learned: Tensor | None, gqkv: Tensor,
) -> Tensor | None:  # fmt: skip
    """Computes the backward with PyTorch's operators, and writes the gradient of qkv into gqkv.

    Arguments and result are those of `launch_backward`, which runs a Triton kernel instead.
    """
    q, k, v = qkv.to(compute_dtype(qkv.dtype))
    go = go.to(q.dtype)
    p = _compute_probabilities(q, k, bias, mask, scale)
    gs = p * _centre(go @ v.mT, p)
    values = (scale * gs @ k, scale * gs.mT @ q, p.mT @ go)
    for into, value in zip(gqkv.unbind(), values, strict=True):
        into.copy_(value)
    if extra is not None:
        gqkv += extra
    return None if learned is None else gs.sum(0).to(learned.dtype)


def _backward_backward_plain(
    ggqkv: Tensor, ggbias: Tensor | None, go: Tensor, qkv: Tensor, bias: Tensor | None,
    mask: Tensor | None, scale: float, learned: Tensor | None, ggo: Tensor, gqkv: Tensor,
) -> Tensor | None:  # fmt: skip
    """Computes the second derivative of the attention with PyTorch's operators.

    Arguments and result are those of `launch_backward_backward`, which runs a Triton kernel
    instead.
    """
    q, k, v = qkv.to(compute_dtype(qkv.dtype))
    ggq, ggk, ggv = ggqkv.to(q.dtype)
    go = go.to(q.dtype)
    p = _compute_probabilities(q, k, bias, mask, scale)
    ds = scale * (ggq @ k.mT + q @ ggk.mT)
    if ggbias is not None:
        ds = ds + ggbias.to(ds.dtype)
    ds = _centre(ds, p)
    gp = _centre(go @ v.mT, p)
    dp, gs = p * ds, p * gp
    hs = p * _centre(gp * ds + go @ ggv.mT, p)
    values = (scale * (hs @ k + gs @ ggk), scale * (hs.mT @ q + gs.mT @ ggq), dp.mT @ go)
    for into, value in zip(gqkv.unbind(), values, strict=True):
        into.copy_(value)
    ggo.copy_(dp @ v + p @ ggv)
    return None if learned is None else hs.sum(0).to(learned.dtype)


class _Implementation(NamedTuple):
    """Three functions that compute the attention, its backward and the backward of its backward.

    The arguments and the results of these functions are the same in every implementation.
    """

    forward: Callable[..., None]
    backward: Callable[..., Tensor | None]
    backward_backward: Callable[..., Tensor | None]


IMPLEMENTATIONS = {
    "kernels": _Implementation(launch_forward, launch_backward, launch_backward_backward),
    "products": _Implementation(compute_forward, compute_backward, compute_backward_backward),
    "plain": _Implementation(_forward_plain, _backward_plain, _backward_backward_plain),
}
"""Name of an implementation -> its functions.

- "kernels": one Triton kernel computes the attention, and one computes each of its two derivatives.
- "products": cuBLAS computes the matrix products, and one Triton kernel does everything between.
- "plain": PyTorch's operators compute everything.
"""


def _choose_implementation(qkv: Tensor) -> str:
    """Returns the name of the implementation that computes the attention (see IMPLEMENTATIONS).

    "kernels" would be slow for float32 inputs, and on GPUs of a compute capability below 8.0. There
    Triton's matrix products spill thousands of bytes of registers per thread. "products" replaces
    it on these GPUs, but not for bfloat16, because they have no instructions for bfloat16.

    Compiled code calls the custom op only for "kernels". Otherwise it calls
    `reference.window_attention`, so that Inductor can fuse its operators and compute products that
    several derivatives need only once.
    """
    if not runs_triton(qkv):
        return "plain"
    if capability(qkv) < 80:
        return "plain" if qkv.dtype == torch.bfloat16 else "products"
    if INTERPRETED or qkv.dtype in (torch.float16, torch.bfloat16):
        return "kernels"
    return "plain"


def _find_functions(qkv: Tensor) -> _Implementation:
    """Returns the functions that compute the attention. They use no kernel if there are no
    windows."""
    return IMPLEMENTATIONS[_choose_implementation(qkv) if qkv.numel() else "plain"]


def _forward(qkv: Tensor, bias: Tensor | None, mask: Tensor | None, scale: float) -> Tensor:
    """Returns the output of the attention, (B, H, N, D)."""
    o = _allocate_outputs(qkv)[1]
    _find_functions(qkv).forward(qkv, bias, mask, scale, o)
    return o


def _backward(
    go: Tensor, qkv: Tensor, extra: Tensor | None, bias: Tensor | None, mask: Tensor | None,
    scale: float, weight_grads: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Returns the gradients of qkv and of the bias.

    - go: gradient of the loss with respect to the output of the attention.
    - extra: tensor to add to the gradient of qkv, or None.
    - weight_grads: whether the gradient of the bias is computed. If not, it is returned as a tensor
      without elements.
    """
    learned = bias if weight_grads else None
    gqkv, gbias = _allocate_outputs(qkv)[0], _allocate_bias_grad(qkv, learned)
    total = _find_functions(qkv).backward(go, qkv, extra, bias, mask, scale, learned, gqkv)
    return gqkv, gbias if total is None else total


def _backward_backward(
    ggqkv: Tensor, ggbias: Tensor | None, go: Tensor, qkv: Tensor, bias: Tensor | None,
    mask: Tensor | None, scale: float, weight_grads: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Computes the second derivative, and returns the gradients with respect to go, qkv and bias.

    - ggqkv, ggbias: gradients of the loss with respect to the results of the backward, which are
      the gradients of qkv and bias. If ggbias is None, it is zero.
    - go: gradient of the loss with respect to the output, from which the backward started.
    - weight_grads: whether the gradient of the bias is computed. If not, it is returned as a tensor
      without elements.
    """
    learned = bias if weight_grads else None
    (gqkv, ggo), gbias = _allocate_outputs(qkv), _allocate_bias_grad(qkv, learned)
    total = _find_functions(qkv).backward_backward(
        ggqkv, ggbias, go, qkv, bias, mask, scale, learned, ggo, gqkv
    )
    return ggo, gqkv, gbias if total is None else total


def _make_stand_in(qkv: Tensor) -> Tensor:
    """Returns a placeholder for qkv, with the shape of qkv but only one element of memory.

    If the loss contains a gradient penalty, the gradient of qkv is the sum of two terms. First, the
    backward of the backward op computes the penalty term. Then a call of the backward op computes
    the ordinary term. If Inductor added the two terms, this would take 15 passes over memory
    instead of 3.

    Therefore the kernel of that call adds them, and the placeholder serves to pass the penalty term
    to the call. The forward op returns the placeholder, and the backward op takes it as an input in
    place of qkv. So the penalty term becomes the gradient of the placeholder, which autograd passes
    to the call as `extra`.
    """
    return qkv.new_zeros(1).expand(qkv.shape)


@define_op("fastgn::window_attention")
def _window_attention(
    qkv: Tensor, bias: Tensor | None, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    return _forward(qkv, bias, mask, scale), _make_stand_in(qkv)


@define_op("fastgn::window_attention_bwd")
def _window_attention_bwd(
    go: Tensor, qkv: Tensor, stand_in: Tensor | None, extra: Tensor | None, bias: Tensor | None,
    mask: Tensor | None, scale: float, weight_grads: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _backward(go, qkv, extra, bias, mask, scale, weight_grads)


@define_op("fastgn::window_attention_bwd_bwd")
def _window_attention_bwd_bwd(
    ggqkv: Tensor, ggbias: Tensor | None, go: Tensor, qkv: Tensor, bias: Tensor | None,
    mask: Tensor | None, scale: float, weight_grads: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return _backward_backward(ggqkv, ggbias, go, qkv, bias, mask, scale, weight_grads)


@_window_attention.register_fake
def _(qkv: Tensor, bias: Tensor | None, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    return _allocate_outputs(qkv)[1], _make_stand_in(qkv)


@_window_attention_bwd.register_fake
def _(
    go: Tensor, qkv: Tensor, stand_in: Tensor | None, extra: Tensor | None, bias: Tensor | None,
    mask: Tensor | None, scale: float, weight_grads: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _allocate_outputs(qkv)[0], _allocate_bias_grad(qkv, bias if weight_grads else None)


@_window_attention_bwd_bwd.register_fake
def _(
    ggqkv: Tensor, ggbias: Tensor | None, go: Tensor, qkv: Tensor, bias: Tensor | None,
    mask: Tensor | None, scale: float, weight_grads: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    gqkv, ggo = _allocate_outputs(qkv)
    return ggo, gqkv, _allocate_bias_grad(qkv, bias if weight_grads else None)


def _differentiate(
    options: tuple, saved: tuple, wanted: tuple[bool, ...], go: Tensor | None, extra: Tensor | None
) -> tuple:
    """Returns the gradient of each input of the forward op, which takes (qkv, bias, mask, scale).

    go: gradient of the loss with respect to the output. extra: gradient with respect to the
    placeholder that `_make_stand_in` makes. None means zero. `dispatch.register_derivative`
    describes the other arguments.
    """
    qkv, bias, mask, stand_in = saved
    if go is None:
        return extra, None, None, None
    if not torch.is_grad_enabled():
        stand_in = None  # nothing differentiates this backward pass, so no placeholder is needed
    args = (go, qkv, stand_in, extra, bias, mask, options[-1], wanted[1])
    gqkv, gbias = run_op(_window_attention_bwd, formulas.window_attention_bwd, *args)
    return gqkv, gbias if wanted[1] else None, None, None


def _differentiate_backward(
    options: tuple, saved: tuple, wanted: tuple[bool, ...],
    ggqkv: Tensor | None, ggbias: Tensor | None,
) -> tuple:  # fmt: skip
    """Returns the gradients of the inputs of the backward op, in the order of these inputs.

    ggqkv, ggbias: gradients of the loss with respect to the outputs of the backward op, which are
    the gradients of qkv and bias. None means zero. `dispatch.register_derivative` describes the
    other arguments.
    """
    go, qkv, bias, mask = saved
    filled = torch.zeros_like(qkv) if ggqkv is None else ggqkv
    scale, had_bias_grad = options[-2:]
    args = (filled, ggbias if had_bias_grad else None, go, qkv, bias, mask, scale, wanted[4])
    second = formulas.window_attention_bwd_bwd
    ggo, gqkv, gbias = run_op(_window_attention_bwd_bwd, second, *args)
    to_qkv = (None, gqkv) if wanted[2] else (gqkv, None)
    to_extra, to_bias = ggqkv if wanted[3] else None, gbias if wanted[4] else None
    return ggo, *to_qkv, to_extra, to_bias, None, None, None


register_derivative(
    _window_attention,
    save=lambda inputs, outputs: (*inputs[:3], outputs[1]),
    backward=_differentiate,
)
register_derivative(
    _window_attention_bwd,
    save=lambda inputs, outputs: (*inputs[:2], *inputs[4:6]),
    backward=_differentiate_backward,
)
register_third_derivative(
    _window_attention_bwd_bwd, "window_attention", formulas.window_attention_bwd_bwd
)


def window_attention_qkvpacked(
    qkv: Tensor, bias: Tensor | None = None, mask: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """Returns softmax(scale Q K^T + bias + mask) V within each window.

    The value, the first derivative and the second derivative take one Triton kernel each. On GPUs
    of a compute capability below 8.0, this kernel runs between matrix products of cuBLAS.

    Under autocast the inputs are cast to autocast's dtype, as ``F.scaled_dot_product_attention``
    does. On GPUs of compute capability 8.0 and later, code compiled by torch.compile calls the same
    custom op if its kernels run. Otherwise it calls `reference.window_attention`.

    Source: Liu et al. 2021, arXiv 2103.14030.

    Args:
        qkv: (3, B, H, N, D), any floating-point dtype: queries, keys and values of B windows and H
            heads. A window has N tokens and a head has D channels, at most 64 each. If qkv is a
            view of a linear layer's output (B, N, 3 H D), the kernels for compute capability 8.0
            and later copy neither qkv nor its gradient.
        bias: (H, N, N), any floating-point dtype, for example Swin's relative position bias.
        mask: (W, N, N), any floating-point dtype. W must divide B. Window i uses mask[i % W].
            A value of -inf makes a query ignore a key. The mask gets no gradient.
        scale: number by which Q K^T is multiplied. None means D ** -0.5.

    Returns:
        (B, H, N, D) in the dtype of qkv. transpose(1, 2).flatten(2) of the result is a view, so a
        linear layer can use it without a copy.

    Raises:
        ValueError: if a shape does not fit, or if the mask requires a gradient.
        TypeError: if a tensor is not floating-point.
    """
    name = "window_attention"
    if qkv.dim() != 5 or qkv.shape[0] != 3:
        raise ValueError(f"{name}: qkv has shape {tuple(qkv.shape)}, should be (3, B, H, N, D)")
    _, windows, heads, tokens, dim = qkv.shape
    if not (0 < tokens <= LARGEST and 0 < dim <= LARGEST):
        raise ValueError(
            f"{name}: N = {tokens} tokens per window and D = {dim} channels per head "
            f"should be 1 to {LARGEST}"
        )
    if bias is not None and bias.shape != (heads, tokens, tokens):
        raise ValueError(
            f"{name}: bias has shape {tuple(bias.shape)}, should be {(heads, tokens, tokens)}"
        )
    if mask is not None:
        if mask.dim() != 3 or mask.shape[1:] != (tokens, tokens) or not mask.shape[0]:
            raise ValueError(
                f"{name}: mask has shape {tuple(mask.shape)}, should be (windows per image, "
                f"{tokens}, {tokens})"
            )
        if windows % mask.shape[0]:
            raise ValueError(
                f"{name}: the number of windows, {windows}, should be a multiple of the "
                f"{mask.shape[0]} masks"
            )
        if mask.requires_grad:
            raise ValueError(
                f"{name}: mask requires grad, but would get no gradient: "
                "detach the mask, or add it to bias"
            )
    check_floating(name, qkv=qkv, bias=bias, mask=mask)
    if torch.is_autocast_enabled(qkv.device.type) and qkv.dtype != torch.float64:
        qkv = qkv.to(torch.get_autocast_dtype(qkv.device.type))
    scale = dim**-0.5 if scale is None else scale
    if is_compiling() and _choose_implementation(qkv) != "kernels":
        q, k, v = qkv.unbind()
        return reference.window_attention(q, k, v, bias, mask, scale)
    return run_op(_window_attention, formulas.window_attention, qkv, bias, mask, scale)[0]


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Returns softmax(scale Q K^T + bias + mask) V within each window.

    q, k, v: queries, keys and values, (B, H, N, D) each, any floating-point dtype. They are copied
    into one tensor for `window_attention_qkvpacked`. That function describes the other arguments,
    the result and the errors.
    """
    if not q.shape == k.shape == v.shape:
        shapes = ", ".join(str(tuple(x.shape)) for x in (q, k, v))
        raise ValueError(f"window_attention: q, k, v have shapes {shapes}, should have one shape")
    return window_attention_qkvpacked(torch.stack((q, k, v)), bias, mask, scale)
