"""Checks that every op must pass. The test file of each op calls them.

The checks call the op and its reference as function(*inputs). Every input is a tensor that is
differentiated. Put other arguments, such as a mask or an option, into a closure. The functions
return a tensor or a tuple of tensors. `pytest tests/kernels` tests PyTorch's operators on a CPU and
the Triton kernels on CUDA. ``TRITON_INTERPRET=1 pytest tests/kernels`` tests the kernels on a CPU.

Names: gy is the gradient with respect to y, gx the one with respect to x. v is a cotangent of gx,
and ggy the gradient with respect to gy that it leads to.
"""

import contextlib
import ctypes
import gc
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from fastgn_kernels.dispatch import INTERPRETED
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime import interpreter as triton_interpreter

DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"

interpreter = pytest.mark.interpreter
"""Marks a test for the interpreted pass, because it checks what a Triton kernel computes.

`interpreter(kind=["gelu"], biased=[True])` selects the cases with these parameters. Of several such
marks, a case needs to fit one."""

NUMPY_DTYPES = [torch.float32, torch.float16]
"""The dtypes that Triton's interpreter rounds as a GPU does; it does not for bfloat16."""


def only_interpreted(test: Callable) -> Callable:
    """Marks a test that runs in the interpreted pass only."""
    skip = pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1")
    return interpreter(skip(test))


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x.contiguous(),
    # Fortran order: the last dimension has the largest stride
    "transposed": lambda x: (
        x.permute(*reversed(range(x.ndim))).contiguous().permute(*reversed(range(x.ndim)))
    ),
    "sliced": lambda x: torch.cat([x, x], -1)[..., : x.shape[-1]],
    # one element past an aligned address: no 16-byte accesses
    "unaligned": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
    "expanded": lambda x: x[:1].expand_as(x),
}
"""Name of a layout -> a function that returns a tensor with other strides or another address.
"expanded" changes the values, because it repeats the first row."""

SHAPES = {"empty": (0, 4), "one": (1, 1), "odd": (3, 5, 7)}


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Returns normally distributed numbers, which are the same on every machine."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)


def tensors(y: Tensor | Sequence[Tensor]) -> list[Tensor]:
    """Returns the outputs of an op as a list."""
    return [y] if isinstance(y, Tensor) else list(y)


def leaves(inputs: Sequence[Tensor], dtype: torch.dtype | None = None) -> list[Tensor]:
    """Returns copies that require grad. Without a change of dtype they keep their strides."""
    return [x.detach().to(dtype or x.dtype).requires_grad_() for x in inputs]


def wave(x: Tensor) -> Tensor:
    """Returns fixed numbers in [-1, 1] in the shape of `x`.

    They serve as a cotangent that compiled code can compute.
    """
    return torch.cos(torch.arange(x.numel(), device=x.device, dtype=x.dtype) + 1).view(x.shape)


def check_derivatives(function: Callable, inputs: Sequence[Tensor]) -> None:
    """Checks both derivatives of a function in float64, by finite differences.

    The cotangents are random and not contiguous, and some are left undefined, as autograd may do.
    """
    inputs = tuple(leaves(inputs, torch.float64))
    assert torch.autograd.gradcheck(function, inputs, check_undefined_grad=True)
    assert torch.autograd.gradgradcheck(
        function, inputs, gen_non_contig_grad_outputs=True, check_undefined_grad=True
    )


def three_orders(
    function: Callable, inputs: Sequence[Tensor], rounded: torch.dtype = torch.float64
) -> dict[str, Tensor]:
    """Returns the outputs of a function, and its first and second derivatives.

    Keys are "y0", "gx0", "ggy0" and "second0" for the outputs, the gradients of the inputs under
    fixed cotangents, and the gradients of those with respect to the first cotangents and to the
    inputs. The cotangents are numbers that the dtype `rounded` can hold. They do not depend on the
    results of earlier orders.
    """

    def cotangents(xs: Sequence[Tensor], seed: int) -> list[Tensor]:
        return [random(*x.shape, seed=seed + i).to(rounded).to(x.dtype) for i, x in enumerate(xs)]

    inputs = leaves(inputs)
    ys = tensors(function(*inputs))
    gys = leaves(cotangents(ys, seed=10))
    gxs = torch.autograd.grad(ys, inputs, gys, create_graph=True)
    vs = cotangents(gxs, seed=20)
    seconds = torch.autograd.grad(gxs, [*gys, *inputs], vs, materialize_grads=True)
    named = {f"y{i}": y for i, y in enumerate(ys)}
    named |= {f"gx{i}": g for i, g in enumerate(gxs)}
    named |= {f"ggy{i}": s for i, s in enumerate(seconds[: len(gys)])}
    named |= {f"second{i}": s for i, s in enumerate(seconds[len(gys) :])}
    return {name: x.detach() for name, x in named.items()}


def penalty(function: Callable, inputs: Sequence[Tensor]) -> Tensor:
    """Returns a gradient penalty that is nonlinear in the outputs and in every input gradient."""
    ys = tensors(function(*inputs))
    loss = sum(((wave(y) + y / 2) * y).sum() for y in ys)
    gradients = torch.autograd.grad(loss, inputs, create_graph=True)
    return sum(((wave(g) + g) * g).sum() for g in gradients)


def relative(a: Tensor, b: Tensor) -> float:
    """Returns the norm of a - b divided by the norm of b."""
    a, b = a.detach(), b.detach()
    return float((a - b).norm() / b.norm().clamp_min(1e-30)) if b.numel() else 0.0


def ops_called(function: Callable, *args: Any) -> set[str]:
    """Returns the names of the operators that a call runs, such as "fastgn::gelu"."""
    called = set()

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            called.add(func._schema.name)
            return func(*args, **(kwargs or {}))

    with Recorder():
        function(*args)
    return called


def recording_backend() -> tuple[Callable, set[str]]:
    """Returns a backend of torch.compile, and a set that it adds names of operators to.

    The backend runs its graphs as they are. The names are those of the operators in the graphs,
    such as "aten.mul.Tensor".
    """
    called: set[str] = set()

    def record(graph: torch.fx.GraphModule, example: list) -> Callable:
        called.update(str(n.target) for n in graph.graph.nodes if n.op == "call_function")
        return make_boxed_func(graph.forward)

    return aot_autograd(fw_compiler=record, bw_compiler=record), called


def check_against_reference(
    op: Callable, reference: Callable, inputs: Sequence[Tensor], tolerance: float = 1e-10
) -> None:
    """Checks an op against its reference in float64.

    It compares shapes, values, first and second derivatives, and the gradients of a gradient
    penalty. It also checks that the op calls a fused op and that the reference does not.
    """
    inputs = [x.to(torch.float64) for x in inputs]
    for function, fused in ((op, True), (reference, False)):
        called = ops_called(function, *inputs)
        is_fused = any(name.startswith("fastgn::") for name in called)
        assert is_fused == fused, f"{'no' if fused else 'a'} fused op in {sorted(called)}"
    ours, theirs = three_orders(op, inputs), three_orders(reference, inputs)
    for name, function in (("op", op), ("reference", reference)):
        xs = leaves(inputs)
        gradients = torch.autograd.grad(penalty(function, xs), xs, materialize_grads=True)
        (ours if name == "op" else theirs).update(
            {f"penalty{i}": g for i, g in enumerate(gradients)}
        )
    for name, exact in theirs.items():
        assert ours[name].shape == exact.shape, name
        assert relative(ours[name], exact) < tolerance, f"{name}: {relative(ours[name], exact):.1e}"


class _Penalised(torch.nn.Module):
    """A step as the trainer compiles it: a loss plus a penalty on its input gradient."""

    def __init__(self, op: Callable, inputs: Sequence[Tensor], weight: float):
        super().__init__()
        self.op, self.weight = op, weight
        self.scale = torch.nn.Parameter(1 + wave(inputs[0]) / 4)
        self.others = torch.nn.ParameterList(torch.nn.Parameter(x.clone()) for x in inputs[1:])

    def forward(self, x: Tensor) -> Tensor:
        others = [self.others[i] for i in range(len(self.others))]  # 2.11 cannot unpack none
        ys = tensors(self.op(x * self.scale, *others))
        loss = sum(((wave(y) + y / 2) * y).sum() for y in ys)
        (gx,) = torch.autograd.grad(loss, x, create_graph=True)
        return loss + self.weight * ((wave(gx) + gx) * gx).sum()


def _step_gradients(op: Callable, inputs: Sequence[Tensor], weight: float, **compile: Any) -> list:
    module = _Penalised(op, inputs, weight)
    step = torch.compile(module, fullgraph=True, dynamic=False, **compile) if compile else module
    x = inputs[0].detach().clone().requires_grad_()
    step(x).backward()
    return [p.grad for p in module.parameters()]


def check_compiled(
    op: Callable, inputs: Sequence[Tensor], backend: str = "aot_eager", tolerance: float = 1e-9
) -> None:
    """Checks that compiled code gives the gradients of a penalised loss that eager mode gives.

    It also checks that the penalty changes these gradients. Some designs lose second-order terms
    silently in compiled code, and only this check finds them.
    """
    inputs = [x.to(torch.float64) for x in inputs]
    torch._dynamo.reset()
    with torch._dynamo.config.patch(trace_autograd_ops=True):
        compiled = _step_gradients(op, inputs, 0.5, backend=backend)
    eager = _step_gradients(op, inputs, 0.5)
    without = _step_gradients(op, inputs, 0.0)
    for i, (a, b) in enumerate(zip(compiled, eager, strict=True)):
        assert relative(a, b) < tolerance, f"parameter {i}: {relative(a, b):.1e}"
    assert relative(without[0], eager[0]) > 1e-2, "the penalty left no trace in the gradient"


def check_low_precision(
    op: Callable, reference: Callable, inputs: Sequence[Tensor], dtype: torch.dtype
) -> None:
    """Checks the rounding errors of an op in `dtype` against those of eager PyTorch.

    Errors are differences to the reference in float64. In every order, the norm of the op's error
    may be at most twice that of eager PyTorch, and its largest element at most four times. Even two
    orders of the same float32 sum on a GPU differed by a factor of 2.1.
    """
    inputs = [x.to(dtype) for x in inputs]
    ours, eager = (three_orders(f, inputs, dtype) for f in (op, reference))
    exact = three_orders(reference, [x.double() for x in inputs], dtype)
    info = torch.finfo(dtype)
    for name, right in exact.items():
        assert ours[name].dtype == dtype, f"{name} is {ours[name].dtype}"
        assert ours[name].isfinite().all(), f"{name} has overflowed"
        # No kernel can avoid the error of rounding the right result. Without this term, the check
        # would fail where eager is exact by luck (one element, a power of two).
        rounding = info.eps / 2 * right.abs() + info.smallest_normal * info.eps / 2
        errors = ours[name].double() - right, eager[name].double() - right, rounding
        # ignore elements where PyTorch overflows, as mish does in float16
        comparable = eager[name].isfinite()
        for norm, factor in ((2.0, 2), (float("inf"), 4)) if comparable.any() else ():
            ours_is, eager_is, rounding_is = (
                float(torch.linalg.vector_norm(e[comparable], norm)) for e in errors
            )
            assert ours_is <= factor * eager_is + rounding_is, (
                f"{name}, norm {norm}: {ours_is:.2e}, eager {eager_is:.2e}"
            )


def check_opcheck(custom_op: Any, args: Sequence[Any], traced: bool = True) -> None:
    """Checks that a custom op does what it registered.

    These are its schema, its autograd formula, and the shapes, dtypes and strides of its fake
    implementation. traced: whether to compare the op with a traced graph of it, too, which takes
    most of the time.
    """
    utils = ["test_schema", "test_autograd_registration", "test_faketensor"]
    torch.library.opcheck(
        custom_op, tuple(args), test_utils=utils + ["test_aot_dispatch_dynamic"] * traced
    )


def touched_bytes() -> int:
    """Returns how many bytes of anonymous memory this process has touched and still holds.

    Swapped memory counts. Pages of files, such as torch's libraries, do not count, because the
    system may take them away at any time.
    """
    status = Path("/proc/self/status").read_text()
    return sum(1024 * int(kb) for kb in re.findall(r"^(?:RssAnon|VmSwap):\s*(\d+)", status, re.M))


@contextlib.contextmanager
def last_program_alone() -> Iterator[None]:
    """Makes each interpreted launch run only the last program of its grid.

    This makes tensors of more than 2^31 elements cheap, because only the memory pages around the
    last elements are touched. If an offset overflows 32 bits, the program reads and writes
    elsewhere or crashes.
    """
    run = triton_interpreter.GridExecutor.__call__
    builder = triton_interpreter.interpreter_builder
    set_index, set_dimensions = builder.set_grid_idx, builder.set_grid_dim

    def run_last(self: Any, *args: Any, **kwargs: Any) -> None:
        grid = (*self.grid, 1, 1)[:3]
        self.grid = (1, 1, 1)
        last = [n - 1 for n in grid]
        with (
            mock.patch.object(builder, "set_grid_idx", lambda *_: set_index(*last)),
            mock.patch.object(builder, "set_grid_dim", lambda *_: set_dimensions(*grid)),
            # copies each argument onto itself, all of it
            mock.patch.object(self, "_restore_args_dev", lambda *_: None),
        ):
            run(self, *args, **kwargs)

    with mock.patch.object(triton_interpreter.GridExecutor, "__call__", run_last):
        yield


@contextlib.contextmanager
def little_memory(limit: int = 1 << 30) -> Iterator[None]:
    """Fails if the block touches and holds more than `limit` bytes."""
    gc.collect()  # what earlier tests left must not be given back inside the block
    ctypes.CDLL(None).malloc_trim(0)
    before = touched_bytes()
    yield
    used = touched_bytes() - before
    assert used < limit, f"{used / 2**30:.1f} GiB were touched"
