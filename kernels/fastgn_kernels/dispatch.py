"""Which body of an op runs, and what every op shares.

Each op is a chain of three ``torch.library`` custom ops, ``fastgn::<op>``, ``fastgn::<op>_bwd`` and
``fastgn::<op>_bwd_bwd``, of which the first two register the next as their derivative. A custom op
without a formula raises when it is differentiated, where a plain ``autograd.Function`` around a
kernel loses the second-order terms without a word.
"""

import functools
import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import triton.language as tl
from torch import Tensor
from torch.autograd import forward_ad

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Triton reads this when a kernel is defined, so it is a property of the process."""

LAUNCH = {"enable_fp_fusion": True}
"""Options of every launch: Triton 3.10 stops fusing multiplications and additions by itself."""

LARGEST_GRID_Y = 65535


def source_hash() -> str:
    """Of this package's files."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


# torch.compile's cache on disk knows an op by its name: a graph with another version's formulas for
# its derivatives would be taken for one with these
torch.compiler.config.cache_key_tag += f" fastgn_kernels {source_hash()}"

# what PyTorch's own formulas ask C++ for
_engine_will_run = getattr(torch._C, "_will_engine_execute_node", lambda node: True)


def runs_triton(x: Tensor) -> bool:
    """Whether an op on `x` takes its Triton body: on CUDA, and wherever Triton is interpreted."""
    return x.is_cuda or INTERPRETED


def capability(x: Tensor) -> int:
    """Compute capability of the card that holds `x`: 90 for 9.0. A number, for Dynamo of PyTorch
    2.11 cannot compare a constant tuple."""
    return _capability(x.device.index)


@torch.compiler.assume_constant_result
def _capability(index: int) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


def inlines() -> bool:
    """Whether pointwise ops should give way to ATen's, and others where their kernel would not run:
    in a compiled region Inductor fuses those with their neighbours, and a custom op is a wall. With
    it, one step's LayerNorms and window attention still move fewer bytes (benchmarks/NOTES.md)."""
    return torch.compiler.is_compiling()


def wide(dtype: torch.dtype) -> torch.dtype:
    """What a body computes in: float64 for itself, float32 for all else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def tl_wide(dtype: torch.dtype) -> Any:
    """`wide`, as Triton names it."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def laid_out_as(x: Tensor, other: Tensor) -> Tensor:
    """`x` in the strides of `other`, a tensor of its shape without holes."""
    return x if x.stride() == other.stride() else torch.empty_like(other, dtype=x.dtype).copy_(x)


def round_up(a: int, b: int) -> int:
    """Blocks of `b` that cover `a`."""
    return -(-a // b)


def strips(rows: int, rows_per_block: int, columns_of_blocks: int, programs: int = 1056) -> int:
    """Into how many strips of rows a kernel with a reduction over rows is cut: each writes one
    partial sum. 1056 programs are 8 on each of an H200's 132 processors."""
    wanted = max(programs // max(columns_of_blocks, 1), 1)
    return max(1, min(round_up(rows, rows_per_block), wanted, LARGEST_GRID_Y))


def is_floating(name: str, **tensors: Tensor | None) -> None:
    """Raises TypeError unless every tensor given is of a floating-point dtype."""
    for argument, x in tensors.items():
        if x is not None and not x.is_floating_point():
            raise TypeError(f"{name}: {argument} is {x.dtype}, should be a floating-point tensor")


def no_forward_mode(name: str, *tensors: Tensor | None) -> None:
    """Raises NotImplementedError where a tensor carries a tangent: PyTorch would drop it at the
    custom op and give a derivative of zero without a word."""
    for x in tensors:
        if x is not None and forward_ad.unpack_dual(x).tangent is not None:
            raise NotImplementedError(
                f"fastgn_kernels.{name} has no forward mode: fastgn_kernels.reference.{name} has"
            )


def define(name: str) -> Callable[[Callable], Any]:
    """``torch.library.custom_op`` of a body that changes none of its arguments, the first of which
    is a tensor. Triton launches on the current device, and autocast reaches into custom ops: the
    body runs on its tensor's device, without autocast."""

    def custom_op(body: Callable) -> Any:
        @functools.wraps(body)
        def run(x: Tensor, *args: Any) -> Any:
            with torch.cuda.device_of(x), torch.autocast(x.device.type, enabled=False):
                return body(x, *args)

        return torch.library.custom_op(name, run, mutates_args=())

    return custom_op


def differentiable(
    op: Any,
    name: str,
    *,
    save: Callable[[Sequence[Any], Any], Sequence[Tensor | None]],
    backward: Callable,
) -> None:
    """Registers the derivative of an op, known to users as `name`. save(inputs, output) -> tensors
    to keep. backward(options, saved, wanted, *cotangents) gets the inputs that are no tensors, what
    was kept, for each input whether its gradient is asked for, and None for a cotangent that is
    zero; it gives None for an input without a gradient."""

    def setup_context(ctx: Any, inputs: Sequence[Any], output: Any) -> None:
        ctx.save_for_backward(*save(inputs, output))
        ctx.options = tuple(x for x in inputs if not isinstance(x, Tensor))
        ctx.is_tensor = tuple(isinstance(x, Tensor) for x in inputs)
        ctx.set_materialize_grads(False)

    def unless_zero(ctx: Any, *cotangents: Tensor | None) -> Any:
        if all(c is None for c in cotangents):
            return (None,) * len(ctx.needs_input_grad)
        no_forward_mode(name, *cotangents)
        return backward(ctx.options, ctx.saved_tensors, _wanted(ctx), *cotangents)

    op.register_autograd(unless_zero, setup_context=setup_context)


def _wanted(ctx: Any) -> tuple[bool, ...]:
    """For each input of an op, whether the sweep that runs asks for its gradient.
    ctx.needs_input_grad is settled in the forward: by it, the input gradient of a penalty or an
    attack would pay for every weight's. Where the engine does not say, the gradient is wanted."""
    is_node = isinstance(ctx, torch.autograd.function.BackwardCFunction)
    if not is_node:  # but compiled autograd's stand-in, whose nodes it cannot trace
        return tuple(ctx.needs_input_grad)
    nodes = (node for node, _ in ctx.next_functions)  # one a tensor, None for no gradient
    return tuple(is_tensor and _runs(next(nodes)) for is_tensor in ctx.is_tensor)


def _runs(node: Any) -> bool:
    """Whether this sweep goes on to the node of an input's gradient."""
    try:
        return node is not None and _engine_will_run(node)
    except RuntimeError:  # a leaf that autograd.grad was given is kept, not run; or nothing runs
        return True


def no_third_derivative(op: Any, twin: str) -> None:
    """Makes differentiating a backward-of-backward op raise; `twin` is the reference's name."""

    def backward(ctx: Any, *cotangents: Tensor) -> None:
        raise RuntimeError(
            f"fastgn_kernels.{twin} has no third derivative: "
            f"fastgn_kernels.reference.{twin} can be differentiated any number of times"
        )

    op.register_autograd(backward)
