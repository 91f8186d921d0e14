"""Layer normalisation over the last dimension, with an optional residual sum, as custom ops.

Names of tensors:

- gy, gx, gweight, gbias: gradients of the loss with respect to the output y, x, weight and bias.
- gsum: gradient of the loss with respect to the sum x + residual.
- ggx, ggweight, ggbias: gradients of the loss with respect to gx, gweight and gbias. The backward
  of the backward starts from them.
- ggy: gradient of the loss with respect to gy. The backward of the backward returns it.

`layer_norm_kernels` has the formulas.
"""

import torch
from torch import Tensor

from fastgn_kernels import formulas, reference
from fastgn_kernels.dispatch import (
    check_floating,
    compute_dtype,
    define_op,
    is_compiling,
    register_derivative,
    register_third_derivative,
    run_op,
    runs_triton,
)
from fastgn_kernels.layer_norm_kernels import (
    launch_backward,
    launch_backward_backward,
    launch_forward,
)

LARGEST = 4096
"""Largest number of columns for which the Triton kernels run. PyTorch's operators normalise wider
rows.

With 8192 columns, the kernel of the second derivative spilled 144 bytes of registers per thread. In
float64, which is only used to check results, it spills 80 bytes with 1024 columns, and more with
4096."""


def _kernel_runs(x: Tensor) -> bool:
    """Returns whether Triton kernels, instead of PyTorch's operators, normalise the rows of `x`."""
    return runs_triton(x) and 0 < x.shape[-1] <= LARGEST


def _forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Returns the normalised output in `dtype`, and the sum x + residual.

    If there is no residual, there is no sum, and the function returns the output twice.
    """
    y, total = _allocate_forward(x, residual, dtype)
    if not _kernel_runs(x):
        _forward_plain(x, residual, weight, bias, eps, y, total)
    elif x.numel():
        launch_forward(x, residual, weight, bias, eps, y, total)
    return y, total


def _forward_plain(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float, y: Tensor,
    total: Tensor,
) -> None:  # fmt: skip
    """Computes the normalisation with PyTorch's operators.

    Writes the normalised rows into y. If there is a residual, normalises x + residual and writes
    this sum into total. `launch_forward` does the same with a Triton kernel.
    """
    if residual is not None:
        x = total.copy_(x.to(compute_dtype(x.dtype)) + residual)
    x_hat, _ = _normalise(x, eps)
    y.copy_(x_hat * weight + bias)


def _normalise(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Returns the normalised rows x_hat of x, and 1 / standard deviation of each row.

    eps: number added to the variance before the square root.
    """
    x = x.to(compute_dtype(x.dtype))
    centred = x - x.mean(-1, keepdim=True)
    inv_std = (centred.square().mean(-1, keepdim=True) + eps).rsqrt()
    return centred * inv_std, inv_std


def _backward(
    gy: Tensor, gsum: Tensor | None, x: Tensor, weight: Tensor, eps: float, weight_grads: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of x, weight and bias.

    - gy: gradient of the loss with respect to the output.
    - gsum: gradient of the loss with respect to the sum x + residual. None means zero.
    - weight_grads: whether the gradients of weight and bias are computed. If not, they are returned
      as tensors without elements.
    """
    gx, gweight, gbias = _allocate_backward(x, weight, weight_grads)
    if not _kernel_runs(x):
        _backward_plain(gy, gsum, x, weight, eps, weight_grads, gx, gweight, gbias)
    elif not x.numel():
        gweight.zero_()
        gbias.zero_()
    else:
        sums = launch_backward(gy, gsum, x, weight, eps, weight_grads, gx)
        gweight, gbias = sums or (gweight, gbias)
    return gx, gweight, gbias


def _backward_plain(
    gy: Tensor, gsum: Tensor | None, x: Tensor, weight: Tensor, eps: float, weight_grads: bool,
    gx: Tensor, gweight: Tensor, gbias: Tensor,
) -> None:  # fmt: skip
    """Computes the backward with PyTorch's operators.

    gy and gsum are the gradients of the loss with respect to the output and the sum x + residual.
    The gradients of x, weight and bias are written into gx, gweight and gbias. `launch_backward`
    does the same with a Triton kernel.
    """
    x_hat, inv_std = _normalise(x, eps)
    gy = gy.to(x_hat.dtype)
    grad = inv_std * _project(gy * weight, x_hat)
    gx.copy_(grad if gsum is None else grad + gsum)
    if weight_grads:
        gweight.copy_(_sum_rows(gy * x_hat))
        gbias.copy_(_sum_rows(gy))


def _project(z: Tensor, x_hat: Tensor) -> Tensor:
    """Returns z without the mean of each row, and without its component along the row of x_hat."""
    return z - z.mean(-1, keepdim=True) - x_hat * (z * x_hat).mean(-1, keepdim=True)


def _sum_rows(z: Tensor) -> Tensor:
    """Returns the sum of z, which is (..., C), over all dimensions but the last one."""
    return z.flatten(0, -2).sum(0) if z.ndim > 1 else z


def _backward_backward(
    ggx: Tensor, ggweight: Tensor | None, ggbias: Tensor | None, gy: Tensor, x: Tensor,
    weight: Tensor, eps: float, weight_grads: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Computes the second derivative of layer normalisation.

    Returns the gradients with respect to gy, x and weight.

    - ggx, ggweight, ggbias: gradients of the loss with respect to the results of the backward,
      which are the gradients of x, weight and bias. If ggweight or ggbias is None, it is zero.
    - gy: gradient of the loss with respect to the output, from which the backward started.
    - weight_grads: whether the gradient of weight is computed. If not, it is returned as a tensor
      without elements.
    """
    ggy, gx, gweight = _allocate_backward_backward(gy, x, weight, weight_grads)
    arguments = (ggx, ggweight, ggbias, gy, x, weight, eps, weight_grads, ggy, gx)
    if not _kernel_runs(x):
        _backward_backward_plain(*arguments, gweight)
    elif not x.numel():
        gweight.zero_()
    else:
        total = launch_backward_backward(*arguments)
        gweight = gweight if total is None else total
    return ggy, gx, gweight


def _backward_backward_plain(
    ggx: Tensor, ggweight: Tensor | None, ggbias: Tensor | None, gy: Tensor, x: Tensor,
    weight: Tensor, eps: float, weight_grads: bool, ggy: Tensor, gx: Tensor, gweight: Tensor,
) -> None:  # fmt: skip
    """Computes the second derivative of layer normalisation with PyTorch's operators.

    ggx, ggweight and ggbias are gradients of the loss with respect to the results of the backward.
    The gradients with respect to gy, x and weight are written into ggy, gx and gweight.
    `launch_backward_backward` does the same with a Triton kernel.
    """
    x_hat, inv_std = _normalise(x, eps)
    ggx, gy = ggx.to(x_hat.dtype), gy.to(x_hat.dtype)
    g = gy * weight
    mean_g_x_hat = (g * x_hat).mean(-1, keepdim=True)
    mean_ggx_x_hat = (ggx * x_hat).mean(-1, keepdim=True)
    covariance = (ggx * g).mean(-1, keepdim=True) - mean_ggx_x_hat * mean_g_x_hat
    covariance = covariance - ggx.mean(-1, keepdim=True) * g.mean(-1, keepdim=True)
    tangent = inv_std * _project(ggx, x_hat)
    z = -inv_std * (mean_g_x_hat * ggx + mean_ggx_x_hat * g)
    to_gy = weight * tangent
    if ggweight is not None:
        to_gy = to_gy + ggweight * x_hat
        z = z + gy * ggweight
    if ggbias is not None:
        to_gy = to_gy + ggbias
    gx.copy_(inv_std * _project(z, x_hat) - inv_std.square() * x_hat * covariance)
    ggy.copy_(to_gy)
    if weight_grads:
        gweight.copy_(_sum_rows(tangent * gy))


def _allocate_forward(
    x: Tensor, residual: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Returns uninitialised tensors for the normalised output and the sum x + residual.

    If there is no residual, there is no sum, and the function returns the tensor for the output
    twice.
    """
    y = torch.empty(x.shape, dtype=dtype, device=x.device)
    return y, torch.empty(x.shape, dtype=x.dtype, device=x.device) if residual is not None else y


def _allocate_backward(
    x: Tensor, weight: Tensor, weight_grads: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns uninitialised tensors for the gradients of x, weight and bias.

    If weight_grads is False, the tensors for weight and bias have no elements.
    """
    gx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return (
        gx,
        _allocate_weight_grad(weight, weight_grads),
        _allocate_weight_grad(weight, weight_grads),
    )


def _allocate_backward_backward(
    gy: Tensor, x: Tensor, weight: Tensor, weight_grads: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns uninitialised tensors for the results of the second derivative.

    These are the gradients with respect to gy, x and weight, where gy is the gradient of the loss
    with respect to the output. If weight_grads is False, the tensor for weight has no elements.
    """
    ggy = torch.empty(x.shape, dtype=gy.dtype, device=x.device)
    gx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return ggy, gx, _allocate_weight_grad(weight, weight_grads)


def _allocate_weight_grad(weight: Tensor, weight_grads: bool) -> Tensor:
    """Returns an uninitialised tensor for the gradient of the weight or the bias.

    If weight_grads is False, the tensor has no elements, because a custom op cannot return None.
    """
    return torch.empty_like(weight) if weight_grads else weight.new_empty(0)


@define_op("fastgn::layer_norm")
def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    return _forward(x, None, weight, bias, eps, dtype)[0]


@define_op("fastgn::add_layer_norm")
def _add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    return _forward(x, residual, weight, bias, eps, dtype)


@define_op("fastgn::layer_norm_bwd")
def _layer_norm_bwd(
    gy: Tensor, gsum: Tensor | None, x: Tensor, weight: Tensor, eps: float, weight_grads: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return _backward(gy, gsum, x, weight, eps, weight_grads)


@define_op("fastgn::layer_norm_bwd_bwd")
def _layer_norm_bwd_bwd(
    ggx: Tensor, ggweight: Tensor | None, ggbias: Tensor | None, gy: Tensor, x: Tensor,
    weight: Tensor, eps: float, weight_grads: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return _backward_backward(ggx, ggweight, ggbias, gy, x, weight, eps, weight_grads)


@_layer_norm.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    return _allocate_forward(x, None, dtype)[0]


@_add_layer_norm.register_fake
def _(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    return _allocate_forward(x, residual, dtype)


@_layer_norm_bwd.register_fake
def _(
    gy: Tensor, gsum: Tensor | None, x: Tensor, weight: Tensor, eps: float, weight_grads: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return _allocate_backward(x, weight, weight_grads)


@_layer_norm_bwd_bwd.register_fake
def _(
    ggx: Tensor, ggweight: Tensor | None, ggbias: Tensor | None, gy: Tensor, x: Tensor,
    weight: Tensor, eps: float, weight_grads: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return _allocate_backward_backward(gy, x, weight, weight_grads)


def _differentiate(options: tuple, saved: tuple, wanted: tuple[bool, ...], gy: Tensor) -> tuple:
    """Returns the gradients of `_layer_norm`'s inputs x, weight, bias, and None for eps and dtype.

    gy: gradient of the loss with respect to the output. `dispatch.register_derivative` describes
    the other arguments.
    """
    gx, gweight, gbias = _call_backward(options, saved, any(wanted[1:]), gy, None)
    return gx, gweight, gbias, None, None


def _differentiate_sum(
    options: tuple, saved: tuple, wanted: tuple[bool, ...], gy: Tensor | None, gsum: Tensor | None
) -> tuple:
    """Returns the gradient of each input of the op `_add_layer_norm`, which normalises x +
    residual.

    gy, gsum: gradients of the loss with respect to the op's two outputs, the normalised rows and
    the sum. None means zero. `dispatch.register_derivative` describes the other arguments.
    """
    if gy is None:
        return gsum, gsum, None, None, None, None
    gx, gweight, gbias = _call_backward(options, saved, any(wanted[2:]), gy, gsum)
    return gx, gx, gweight, gbias, None, None


def _call_backward(
    options: tuple, saved: tuple, weight_grads: bool, gy: Tensor, gsum: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Calls the backward op, and returns the gradients of x, weight and bias.

    - options: eps and the dtype of the output.
    - saved: the tensors (x, weight). If there is a residual, x is the sum x + residual.
    - weight_grads: whether the gradients of weight and bias are computed. If not, they are None.
    - gy, gsum: gradients of the loss with respect to the output and to the sum x + residual.
    """
    x, weight = saved
    args = (gsum, x, weight, options[0], weight_grads)
    gx, gweight, gbias = run_op(_layer_norm_bwd, formulas.layer_norm_bwd, gy, *args)
    return (gx, gweight, gbias) if weight_grads else (gx, None, None)


def _differentiate_backward(
    options: tuple, saved: tuple, wanted: tuple[bool, ...],
    ggx: Tensor | None, ggweight: Tensor | None, ggbias: Tensor | None,
) -> tuple:  # fmt: skip
    """Returns the gradients of the backward op's inputs gy, gsum, x and weight.

    The tuple ends with None for the number eps, and None for the flag weight_grads. gsum is the
    gradient of the loss with respect to the sum x + residual.

    ggx, ggweight, ggbias: gradients of the loss with respect to the outputs of the backward op.
    None means zero. `dispatch.register_derivative` describes the other arguments.
    """
    gy, gsum, x, weight = saved
    eps, had_weight_grads = options[-2:]
    if not had_weight_grads:
        ggweight = ggbias = None
    filled = torch.zeros_like(x) if ggx is None else ggx
    args = (filled, ggweight, ggbias, gy, x, weight, eps, wanted[3])
    ggy, gx, gweight = run_op(_layer_norm_bwd_bwd, formulas.layer_norm_bwd_bwd, *args)
    return ggy, ggx if gsum is not None else None, gx, gweight if wanted[3] else None, None, None


register_derivative(
    _layer_norm,
    save=lambda inputs, y: (inputs[0], inputs[1]),
    backward=_differentiate,
)
register_derivative(
    _add_layer_norm,
    save=lambda inputs, outputs: (outputs[1], inputs[2]),
    backward=_differentiate_sum,
)
register_derivative(
    _layer_norm_bwd,
    save=lambda inputs, outputs: inputs[:4],
    backward=_differentiate_backward,
)
register_third_derivative(_layer_norm_bwd_bwd, "layer_norm", formulas.layer_norm_bwd_bwd)


def layer_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Normalises the last dimension, as ``F.layer_norm`` does.

    The value, the first derivative and the second derivative take one kernel each. Means and
    variances are computed in float32, or in float64 for float64 inputs. If a row has more than 4096
    elements, PyTorch's operators normalise it. Code compiled by torch.compile calls the same custom
    op if its Triton kernels can run, otherwise `reference.layer_norm`.

    Source: Ba et al. 2016, arXiv 1607.06450. The formulas of the second derivative are in
    `layer_norm_kernels`.

    Args:
        x: (..., C), any floating-point dtype.
        weight: (C,), any floating-point dtype. None means 1.
        bias: (C,), any floating-point dtype. None means 0.
        eps: number added to the variance of a row.
        residual: a tensor with the shape of x, which is added to x before the normalisation.
        dtype: dtype of the normalised output. If None, it is the dtype that ``F.layer_norm`` would
            return. This is the dtype of x, or float32 under autocast on CUDA.

    Returns:
        The normalised x, (..., C). With a residual, the pair (normalised sum, sum) for the sum
        x + residual. The sum is rounded to its dtype before it is normalised, as in PyTorch.

    Raises:
        ValueError: if a shape does not fit.
        TypeError: if a tensor or `dtype` is not floating-point.
    """
    columns = x.shape[-1:]
    if not columns:
        raise ValueError("layer_norm: x has shape (), should be (..., C)")
    for name, value, shape in (
        ("weight", weight, columns),
        ("bias", bias, columns),
        ("residual", residual, x.shape),
    ):
        if value is not None and value.shape != shape:
            raise ValueError(
                f"layer_norm: {name} has shape {tuple(value.shape)}, should be {tuple(shape)}"
            )
    check_floating("layer_norm", x=x, weight=weight, bias=bias, residual=residual)
    if dtype is not None and not dtype.is_floating_point:
        raise TypeError(f"layer_norm: dtype is {dtype}, should be a floating-point dtype")
    if residual is not None and residual.dtype != x.dtype:
        common = torch.promote_types(x.dtype, residual.dtype)
        x, residual = x.to(common), residual.to(common)
    if dtype is None:
        autocast = x.is_cuda and torch.is_autocast_enabled("cuda")
        dtype = torch.promote_types(x.dtype, torch.float32) if autocast else x.dtype
    if is_compiling() and not _kernel_runs(x):
        return reference.layer_norm(x, weight, bias, eps, residual, dtype)
    if weight is None:
        weight = torch.ones(columns, dtype=x.dtype, device=x.device)
    if bias is None:
        bias = torch.zeros(columns, dtype=weight.dtype, device=x.device)
    bias = bias.to(weight.dtype)
    if residual is None:
        return run_op(_layer_norm, formulas.layer_norm, x, weight, bias, eps, dtype)
    args = (residual, weight, bias, eps, dtype)
    return run_op(_add_layer_norm, formulas.add_layer_norm, x, *args)
