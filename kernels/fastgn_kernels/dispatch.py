"""Functions that all ops share: they register ops, choose an implementation and check inputs.

Each op is a chain of three ``torch.library`` custom ops, ``fastgn::<op>``, ``fastgn::<op>_bwd`` and
``fastgn::<op>_bwd_bwd``. Each of the first two registers the next one as its derivative. PyTorch
raises an error when a custom op without a registered derivative is differentiated. A plain
``autograd.Function`` around a kernel would lose the second-order terms without an error.

Each op has two implementations with the same formulas: Triton kernels, and PyTorch's operators.
"""

import functools
import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd import forward_ad

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether Triton interprets its kernels on the CPU. Triton reads the environment variable when a
kernel is defined, so the value holds for the whole process."""

LAUNCH = {"enable_fp_fusion": True}
"""Options for every kernel launch. Without enable_fp_fusion, Triton 3.10 no longer fuses a
multiplication and an addition into one instruction."""

LARGEST_GRID_Y = 65535
"""Largest size that CUDA allows for the second dimension of a launch grid."""


def source_hash() -> str:
    """Returns a hash of this package's source files."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


# Without this tag, torch.compile's cache on disk would reuse graphs with another version's ops.
torch.compiler.config.cache_key_tag += f" fastgn_kernels {source_hash()}"

# This function of PyTorch tells whether the running backward pass will execute a node.
# If a version of PyTorch lacks the function, all gradients are computed.
_engine_will_run = getattr(torch._C, "_will_engine_execute_node", lambda node: True)


def runs_triton(x: Tensor) -> bool:
    """Returns whether an op on `x` runs its Triton kernels.

    An op runs them if x is on CUDA, or if Triton interprets its kernels on the CPU.
    """
    return x.is_cuda or INTERPRETED


def capability(x: Tensor) -> int:
    """Returns the compute capability of the card that holds `x`, for example 90 for 9.0.

    The result is one number because Dynamo of PyTorch 2.11 cannot compare constant tuples.
    """
    return _capability(x.device.index)


@torch.compiler.assume_constant_result
def _capability(index: int) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


def is_compiling() -> bool:
    """Returns whether torch.compile is tracing the code.

    In compiled code, pointwise ops use PyTorch's operators, which Inductor fuses with their
    neighbours. Inductor cannot fuse across a custom op. LayerNorm and window attention remain
    custom ops if their kernels run. Even without Inductor's fusion, these kernels read and write
    fewer bytes of memory per training step (benchmarks/NOTES.md).
    """
    return torch.compiler.is_compiling()


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype for intermediate results: float64 for float64 inputs, otherwise float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def triton_compute_dtype(dtype: torch.dtype) -> Any:
    """Returns `compute_dtype(dtype)` as a Triton dtype."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def with_strides_of(x: Tensor, other: Tensor) -> Tensor:
    """Returns `x`, or a copy of `x` with the strides of `other` if the strides differ.

    Both tensors must have the same shape. The elements of `other` must fill its memory without
    holes.
    """
    return x if x.stride() == other.stride() else torch.empty_like(other, dtype=x.dtype).copy_(x)


def count_strips(rows: int, rows_per_block: int, column_blocks: int, programs: int = 1056) -> int:
    """Returns the number of strips of rows into which a kernel divides a matrix to sum its rows.

    One Triton program computes one partial sum, over the rows of one strip and for one block of
    columns. column_blocks: number of blocks into which the columns are divided. programs: largest
    number of programs that is useful. The default is 8 programs for each of the 132 processors of
    an H200.
    """
    wanted = max(programs // max(column_blocks, 1), 1)
    return max(1, min(triton.cdiv(rows, rows_per_block), wanted, LARGEST_GRID_Y))


def check_floating(name: str, **tensors: Tensor | None) -> None:
    """Raises TypeError if one of the tensors does not have a floating-point dtype."""
    for argument, x in tensors.items():
        if x is not None and not x.is_floating_point():
            raise TypeError(f"{name}: {argument} is {x.dtype}, should be a floating-point tensor")


def check_no_forward_mode(name: str, *tensors: Tensor | None) -> None:
    """Raises NotImplementedError if one of the tensors carries a forward-mode tangent.

    PyTorch would drop the tangent at the custom op and silently return a derivative of zero.
    """
    for x in tensors:
        if x is not None and forward_ad.unpack_dual(x).tangent is not None:
            raise NotImplementedError(
                f"fastgn_kernels.{name} has no forward mode: use fastgn_kernels.reference.{name}"
            )


def define_op(name: str) -> Callable[[Callable], Any]:
    """Returns a decorator that registers a function as the custom op `name`.

    The first argument of the function must be a tensor, and the function must change none of its
    arguments. The op makes the device of that tensor the current device, because Triton launches
    kernels on the current device. While the function runs, autocast is off, because it would cast
    tensors inside the function.
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
    name: str,
    *,
    save: Callable[[Sequence[Any], Any], Sequence[Tensor | None]],
    backward: Callable,
) -> None:
    """Registers the derivative of a custom op.

    name: name of the public function, for error messages. save: function that takes (inputs,
    output) of the op and returns the tensors to keep for the backward pass. backward: function that
    takes (options, saved, wanted, *cotangents) and returns one gradient, or None, for each input of
    the op. The arguments of `backward` are:

    - options: the inputs of the op that are not tensors;
    - saved: the tensors that `save` returned;
    - wanted: for each input, whether the running backward pass needs its gradient;
    - cotangents: the gradients of the loss with respect to the outputs. None means zero.
    """

    def setup_context(ctx: Any, inputs: Sequence[Any], output: Any) -> None:
        ctx.save_for_backward(*save(inputs, output))
        ctx.options = tuple(x for x in inputs if not isinstance(x, Tensor))
        ctx.is_tensor = tuple(isinstance(x, Tensor) for x in inputs)
        ctx.set_materialize_grads(False)

    def run_unless_zero(ctx: Any, *cotangents: Tensor | None) -> Any:
        if all(c is None for c in cotangents):
            return (None,) * len(ctx.needs_input_grad)
        check_no_forward_mode(name, *cotangents)
        return backward(ctx.options, ctx.saved_tensors, _find_wanted(ctx), *cotangents)

    op.register_autograd(run_unless_zero, setup_context=setup_context)


def _find_wanted(ctx: Any) -> tuple[bool, ...]:
    """Returns, for each input of an op, whether the running backward pass needs its gradient.

    ctx.needs_input_grad is not enough, because it is fixed in the forward pass. With it alone, the
    input gradient of a penalty or attack would also compute the gradient of every weight. If the
    autograd engine does not say what it needs, the gradient is computed.
    """
    is_node = isinstance(ctx, torch.autograd.function.BackwardCFunction)
    if not is_node:  # compiled autograd passes another object, and cannot trace the code below
        return tuple(ctx.needs_input_grad)
    nodes = (node for node, _ in ctx.next_functions)  # None if an input needs no gradient
    return tuple(is_tensor and _engine_reaches(next(nodes)) for is_tensor in ctx.is_tensor)


def _engine_reaches(node: Any) -> bool:
    """Returns whether the running backward pass needs the gradient that goes to `node`."""
    try:
        return node is not None and _engine_will_run(node)
    except RuntimeError:  # `node` is a leaf given to autograd.grad, or no backward pass is running
        return True


def forbid_third_derivative(op: Any, name: str) -> None:
    """Makes a custom op raise RuntimeError when it is differentiated.

    op: the op ``fastgn::<op>_bwd_bwd``, which computes a second derivative. name: name of the
    public function, for the error message.
    """

    def backward(ctx: Any, *cotangents: Tensor) -> None:
        raise RuntimeError(
            f"fastgn_kernels.{name} has no third derivative: use fastgn_kernels.reference.{name}, "
            "which can be differentiated any number of times"
        )

    op.register_autograd(backward)
