"""Functions that all ops of this package share.

They register ops with PyTorch, choose between Triton kernels and PyTorch's operators, and check
inputs. An op, such as layer_norm, is a chain of three custom ops of ``torch.library``:

- ``fastgn::<op>`` is the forward;
- ``fastgn::<op>_bwd`` is the backward, which computes the first derivative;
- ``fastgn::<op>_bwd_bwd`` is the backward of the backward, which computes the second derivative.

The backward is registered as the derivative of the forward, and the backward of the backward as the
derivative of the backward. If a custom op without a registered derivative is differentiated,
PyTorch raises an error. A plain ``autograd.Function`` around a kernel would instead lose the
second-order terms without an error.

Each custom op has at least two implementations of the same formulas. One uses Triton kernels, and
one uses only PyTorch's operators. Both write into tensors that they allocate, so neither can be
differentiated by PyTorch.

Where a custom op cannot be used, `run_op` calls its formula in `formulas` instead. PyTorch can
differentiate a formula any number of times. This is so in forward-mode autograd and inside the
transforms of torch.func. The third derivative of an op is the derivative of the formula of the
second derivative.
"""

import functools
import hashlib
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd import forward_ad

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether Triton's interpreter runs the kernels on the CPU. Triton reads the environment variable
TRITON_INTERPRET when a kernel is defined, so a later change has no effect."""

LAUNCH = {"enable_fp_fusion": True}
"""Options for every launch of a Triton kernel. With enable_fp_fusion, the compiler may fuse a
multiplication and an addition into one instruction. Triton 3.10 no longer does so by default."""

LARGEST_GRID_Y = 65535
"""Largest number of programs that CUDA allows along the second dimension of a launch grid."""


def source_hash() -> str:
    """Returns a hash of all Python files of this package, as 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


# Without this tag, torch.compile could reuse a cached graph of another version of this package.
torch.compiler.config.cache_key_tag += f" fastgn_kernels {source_hash()}"

_engine_will_run = getattr(torch._C, "_will_engine_execute_node", lambda node: True)
"""PyTorch's function that takes a node of autograd's graph. It returns whether the running backward
pass will execute the node. If PyTorch lacks this function, the answer is always True, so that all
gradients are computed."""


def runs_triton(x: Tensor) -> bool:
    """Returns whether Triton kernels can run on the tensor `x`.

    They can if x is on CUDA, or if Triton's interpreter runs the kernels on the CPU.
    """
    return x.is_cuda or INTERPRETED


def capability(x: Tensor) -> int:
    """Returns the compute capability of the GPU that holds `x`, for example 90 for capability 9.0.

    Triton's interpreter needs no GPU. If it runs, the result is 90, and tests may replace this
    function. The result is a number instead of a pair, because Dynamo in PyTorch 2.11 cannot
    compare constant tuples.
    """
    return 90 if INTERPRETED else _capability(x.device.index)


@torch.compiler.assume_constant_result
def _capability(index: int) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


def is_compiling() -> bool:
    """Returns whether torch.compile is tracing the code.

    In compiled code, activations, cross_entropy and gradient_norm call PyTorch's operators.
    Inductor fuses these operators with the operations around them, but it cannot fuse across a
    custom op.

    layer_norm and window_attention remain custom ops if their Triton kernels can run. Even without
    Inductor's fusion, a training step with these kernels reads and writes fewer bytes of memory
    (benchmarks/NOTES.md).
    """
    return torch.compiler.is_compiling()


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype in which an op computes, if `dtype` is the dtype of its input.

    It is float64 for float64 inputs, and float32 for all other inputs.
    """
    return torch.float64 if dtype == torch.float64 else torch.float32


def triton_compute_dtype(dtype: torch.dtype) -> Any:
    """Returns the dtype in which a kernel computes, as a Triton dtype.

    It is float64 if the input has the dtype float64, otherwise float32.
    """
    return tl.float64 if dtype == torch.float64 else tl.float32


def with_strides_of(x: Tensor, other: Tensor) -> Tensor:
    """Returns `x` itself if it has the strides of `other`, otherwise a copy of `x` that has them.

    Both tensors must have the same shape. The elements of `other` must fill its memory without
    holes.
    """
    return x if x.stride() == other.stride() else torch.empty_like(other, dtype=x.dtype).copy_(x)


def count_strips(rows: int, rows_per_block: int, column_blocks: int, programs: int = 1056) -> int:
    """Returns into how many strips of rows a kernel divides a matrix to compute the sum of its
    rows.

    One Triton program adds up the rows of one strip, for one block of columns. The results are
    partial sums, which must be added up afterwards.

    - rows: number of rows of the matrix.
    - rows_per_block: number of rows that a program processes at a time.
    - column_blocks: number of blocks into which the columns are divided.
    - programs: largest useful number of programs. The default is 8 programs for each of the 132
      multiprocessors of an H200.
    """
    wanted = max(programs // max(column_blocks, 1), 1)
    return max(1, min(triton.cdiv(rows, rows_per_block), wanted, LARGEST_GRID_Y))


def check_floating(name: str, **tensors: Tensor | None) -> None:
    """Raises TypeError if one of the tensors does not have a floating-point dtype.

    name: name of the op, for the error message. tensors: name of each argument -> its tensor, or
    None if the argument was not given.
    """
    for argument, x in tensors.items():
        if x is not None and not x.is_floating_point():
            raise TypeError(f"{name}: {argument} is {x.dtype}, should be a floating-point tensor")


@torch.compiler.assume_constant_result
def _find_mode() -> str:
    """Returns "torch.func" inside a transform, "forward" in forward-mode autograd, otherwise "".

    Under torch.compile, the result is a constant of the graph.
    """
    if torch._C._are_functorch_transforms_active():
        return "torch.func"
    return "forward" if forward_ad._current_level >= 0 else ""


def needs_formula(*args: Any) -> bool:
    """Returns whether an op must be computed by its formula, because it has no rule for the mode.

    This is so inside a transform of torch.func, and in forward-mode autograd if one of the
    arguments is a tensor with a tangent. There a custom op would fail or lose the tangent, and some
    operators of PyTorch, such as softmax, have derivatives that cannot be differentiated again.
    """
    mode = _find_mode()
    if not mode:
        # This is False. As compiled code reads the level, it is compiled again where the level is
        # another one. Without this, it would call the custom op there, and lose the tangent.
        return forward_ad._current_level >= 0
    if mode == "torch.func" or torch.compiler.is_compiling():
        return True  # as Dynamo traces the code, tensors do not show their tangents
    return any(
        isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None for x in args
    )


def run_op(op: Any, formula: Callable, x: Tensor, *args: Any) -> Any:
    """Calls a custom op, or its formula if `needs_formula` says so.

    formula: function of `formulas`. It takes the arguments of the op, which are x and args.
    """
    if not needs_formula(x, *args):
        return op(x, *args)
    with torch.autocast(x.device.type, enabled=False):
        return formula(x, *args)


def differentiate(
    function: Callable,
    inputs: Sequence[Any],
    cotangents: Sequence[Tensor | None],
    wanted: Sequence[bool] | None = None,
) -> list[Any]:
    """Returns one gradient for each input, or None for inputs that are not wanted or no tensors.

    The gradients can be differentiated again, in every mode. They are those of the function alone,
    even if one of its inputs was computed from another one.

    - function: function of the inputs. It returns a tensor, or a sequence of tensors and None.
    - cotangents: for each output, the gradient of the loss with respect to it. None means zero, and
      so does a tensor without elements.
    - wanted: for each input, whether its gradient is computed. None means all inputs.
    """
    chosen = [
        i
        for i, x in enumerate(inputs)
        if isinstance(x, Tensor) and x.is_floating_point() and (wanted is None or wanted[i])
    ]
    given = [i for i, c in enumerate(cotangents) if c is not None and c.numel()]
    gradients: list[Any] = [None] * len(inputs)
    if not given:
        for i in chosen:
            gradients[i] = torch.zeros_like(inputs[i])
        return gradients

    def of_chosen(*xs: Tensor) -> tuple[Tensor, ...]:
        filled = list(inputs)
        for i, x in zip(chosen, xs, strict=True):
            filled[i] = x
        outputs = function(*filled)
        outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
        return tuple(outputs[i] for i in given)

    pull_back = torch.func.vjp(of_chosen, *(inputs[i] for i in chosen))[1]
    found = pull_back(tuple(cotangents[i] for i in given))
    for i, gradient in zip(chosen, found, strict=True):
        gradients[i] = gradient
    return gradients


def define_op(name: str) -> Callable[[Callable], Any]:
    """Returns a decorator that registers a function as a custom op.

    The first argument of the function must be a tensor, and the function must not change its
    arguments. The op makes the device of that tensor the current device, because Triton launches
    kernels on the current device. Autocast is off while the function runs, because autocast would
    cast tensors inside the function.

    name: full name of the op, such as "fastgn::layer_norm".
    """

    def custom_op(body: Callable) -> Any:
        @functools.wraps(body)
        def run(x: Tensor, *args: Any) -> Any:
            with torch.cuda.device_of(x), torch.autocast(x.device.type, enabled=False):
                return body(x, *args)

        return torch.library.custom_op(name, run, mutates_args=())

    return custom_op


def register_derivative(
    op: Any,
    *,
    save: Callable[[Sequence[Any], Any], Sequence[Tensor | None]],
    backward: Callable,
) -> None:
    """Registers the derivative of a custom op.

    - op: the custom op.
    - save: function that takes (inputs, output) of the op, and returns the tensors to keep for the
      backward pass.
    - backward: function that takes (options, saved, wanted, *cotangents). It returns one gradient,
      or None, for each input of the op.

    The arguments of `backward` are:

    - options: the inputs of the op that are not tensors. An optional tensor that is None counts as
      one of them.
    - saved: the tensors that `save` returned.
    - wanted: for each input of the op, whether the running backward pass needs its gradient.
    - cotangents: for each output of the op, the gradient of the loss with respect to it. None means
      zero.
    """

    def setup_context(ctx: Any, inputs: Sequence[Any], output: Any) -> None:
        ctx.save_for_backward(*save(inputs, output))
        ctx.options = tuple(x for x in inputs if not isinstance(x, Tensor))
        ctx.is_tensor = tuple(isinstance(x, Tensor) for x in inputs)
        ctx.set_materialize_grads(False)

    def run_unless_zero(ctx: Any, *cotangents: Tensor | None) -> Any:
        if all(c is None for c in cotangents):
            return (None,) * len(ctx.needs_input_grad)
        return backward(ctx.options, ctx.saved_tensors, _find_wanted(ctx), *cotangents)

    op.register_autograd(run_unless_zero, setup_context=setup_context)


def _find_wanted(ctx: Any) -> tuple[bool, ...]:
    """Returns, for each input of an op, whether the running backward pass needs its gradient.

    ctx.needs_input_grad is not enough, because PyTorch sets it in the forward pass. A gradient
    penalty or an attack asks only for the gradient of the images. With ctx.needs_input_grad alone,
    the op would also compute the gradients of its weights. If the autograd engine does not say
    whether it needs a gradient, the result is True.

    ctx: the autograd context of the op's backward.
    """
    is_node = isinstance(ctx, torch.autograd.function.BackwardCFunction)
    if not is_node:  # ctx is another object in compiled autograd, which cannot trace the code below
        return tuple(ctx.needs_input_grad)
    # in ctx.next_functions, the node of an input that needs no gradient is None
    nodes = (node for node, _ in ctx.next_functions)
    return tuple(is_tensor and _engine_reaches(next(nodes)) for is_tensor in ctx.is_tensor)


def _engine_reaches(node: Any) -> bool:
    """Returns whether the running backward pass needs the gradient that flows into `node`.

    node: node of autograd's graph, or None if the tensor needs no gradient.
    """
    try:
        return node is not None and _engine_will_run(node)
    except RuntimeError:
        # PyTorch raises this error for a leaf among autograd.grad's inputs, or outside a backward.
        # In both cases, the gradient counts as needed.
        return True


def register_third_derivative(op: Any, name: str, formula: Callable) -> None:
    """Registers the derivative of the custom op of a second derivative.

    There is no kernel for it. PyTorch's operators compute it, and so can every further derivative
    be. A warning says so when this first happens to the op.

    op: the op ``fastgn::<op>_bwd_bwd``. name: name of the public function, for the warning.
    formula: function of `formulas` that takes the arguments of the op and returns its results.
    """

    def save(inputs: Sequence[Any], output: Any) -> list[Tensor | None]:
        return [x if isinstance(x, Tensor) else None for x in inputs]

    def backward(options: tuple, saved: tuple, wanted: tuple[bool, ...], *cotangents: Any) -> tuple:
        warn_of_third_derivative(name)
        left = iter(options)
        inputs = [next(left) if x is None else x for x in saved]
        with torch.autocast(inputs[0].device.type, enabled=False):
            return tuple(differentiate(formula, inputs, cotangents, wanted))

    register_derivative(op, save=save, backward=backward)


@functools.cache
def warn_of_third_derivative(name: str) -> None:
    """Warns that a third derivative is slow, once per process and op.

    name: name of the public function, such as "layer_norm".
    """
    warnings.warn(
        f"fastgn_kernels.{name} has kernels for two derivatives. PyTorch's operators compute the "
        f"third one and all further ones, which is slow. fastgn_kernels.reference.{name} consists "
        "of PyTorch's operators alone, and torch.compile can fuse them",
        stacklevel=2,
    )
