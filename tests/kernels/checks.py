"""What every op is held to; each test file calls these for its own op.

The op and its reference are called as function(*inputs), every input being a tensor that is
differentiated; what is not, a mask or an option, belongs in a closure. They return a tensor or a
tuple of tensors. `pytest tests/kernels` runs the plain bodies on a CPU and the Triton bodies on
CUDA, ``TRITON_INTERPRET=1 pytest tests/kernels`` the Triton bodies on a CPU.
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
"""Name -> a tensor of the shape given that lies otherwise in memory; "expanded" repeats its first
row, the others keep the values."""

SHAPES = {"empty": (0, 4), "one": (1, 1), "odd": (3, 5, 7)}


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Normally distributed, the same on every machine."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)


def tensors(y: Tensor | Sequence[Tensor]) -> list[Tensor]:
    """An op's outputs as a list."""
    return [y] if isinstance(y, Tensor) else list(y)


def leaves(inputs: Sequence[Tensor], dtype: torch.dtype | None = None) -> list[Tensor]:
    """Fresh leaves that require grad, in the layout given where the dtype stays."""
    return [x.detach().to(dtype or x.dtype).requires_grad_() for x in inputs]


def wave(x: Tensor) -> Tensor:
    """Fixed numbers in [-1, 1] in the shape of `x`: a cotangent that a compiled region can make."""
    return torch.cos(torch.arange(x.numel(), device=x.device, dtype=x.dtype) + 1).view(x.shape)


def check_derivatives(function: Callable, inputs: Sequence[Tensor]) -> None:
    """Both derivatives are those of the function, by finite differences in float64, for random
    cotangents that lie apart in memory and for cotangents that autograd leaves undefined."""
    inputs = tuple(leaves(inputs, torch.float64))
    assert torch.autograd.gradcheck(function, inputs, check_undefined_grad=True)
    assert torch.autograd.gradgradcheck(
        function, inputs, gen_non_contig_grad_outputs=True, check_undefined_grad=True
    )


def three_orders(
    function: Callable, inputs: Sequence[Tensor], rounded: torch.dtype = torch.float64
) -> dict[str, Tensor]:
    """Outputs, their gradients under fixed cotangents, and the gradients of those: to the first
    cotangents ("ggy"), and to the inputs ("second"). Each order sees the same cotangents, numbers
    of the dtype `rounded`, whatever the order before it computed."""

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
    """A gradient penalty, nonlinear in the outputs and in every input's gradient."""
    ys = tensors(function(*inputs))
    loss = sum(((wave(y) + y / 2) * y).sum() for y in ys)
    gradients = torch.autograd.grad(loss, inputs, create_graph=True)
    return sum(((wave(g) + g) * g).sum() for g in gradients)


def relative(a: Tensor, b: Tensor) -> float:
    """Norm of a - b over the norm of `b`."""
    a, b = a.detach(), b.detach()
    return float((a - b).norm() / b.norm().clamp_min(1e-30)) if b.numel() else 0.0


def ops_called(function: Callable, *args: Any) -> set[str]:
    """Names, "fastgn::gelu", of the operators that a call runs."""
    called = set()

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            called.add(func._schema.name)
            return func(*args, **(kwargs or {}))

    with Recorder():
        function(*args)
    return called


def recording_backend() -> tuple[Callable, set[str]]:
    """A backend of torch.compile that runs its graphs as they are, and the names of the operators
    in them, such as "aten.mul.Tensor"."""
    called: set[str] = set()

    def record(graph: torch.fx.GraphModule, example: list) -> Callable:
        called.update(str(n.target) for n in graph.graph.nodes if n.op == "call_function")
        return make_boxed_func(graph.forward)

    return aot_autograd(fw_compiler=record, bw_compiler=record), called


def check_against_reference(
    op: Callable, reference: Callable, inputs: Sequence[Tensor], tolerance: float = 1e-10
) -> None:
    """In float64: values, first derivatives, second derivatives and the gradients of a gradient
    penalty are the reference's, and have its shapes; and the op is not the reference."""
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
    """A step as the trainer compiles it: the loss, and a penalty on its gradient to the images."""

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
    """The gradients of a penalised loss, compiled whole, are those of eager; and the penalty
    changes them: designs that lose second-order terms in silence fail here and nowhere else."""
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
    """Of every order, the error to the reference in float64 is at most twice that of the reference
    run by eager PyTorch in `dtype`, and its largest element at most four times: of two orders of
    the same float32 sums on a GPU, one was seen with 2.1 times the other's."""
    inputs = [x.to(dtype) for x in inputs]
    ours, eager = (three_orders(f, inputs, dtype) for f in (op, reference))
    exact = three_orders(reference, [x.double() for x in inputs], dtype)
    info = torch.finfo(dtype)
    for name, right in exact.items():
        assert ours[name].dtype == dtype, f"{name} is {ours[name].dtype}"
        assert ours[name].isfinite().all(), f"{name} has overflowed"
        # What rounding to the nearest costs, which no kernel can undercut: where eager is exact by
        # luck (one element, a power of two) twice its error would ask for the impossible.
        rounding = info.eps / 2 * right.abs() + info.smallest_normal * info.eps / 2
        errors = ours[name].double() - right, eager[name].double() - right, rounding
        # PyTorch's mish overflows in float16: its error there would allow anything
        comparable = eager[name].isfinite()
        for norm, factor in ((2.0, 2), (float("inf"), 4)) if comparable.any() else ():
            ours_is, eager_is, rounding_is = (
                float(torch.linalg.vector_norm(e[comparable], norm)) for e in errors
            )
            assert ours_is <= factor * eager_is + rounding_is, (
                f"{name}, norm {norm}: {ours_is:.2e}, eager {eager_is:.2e}"
            )


def check_third_order_raises(op: Callable, inputs: Sequence[Tensor]) -> None:
    """A third derivative raises, and names the reference."""
    xs = leaves(inputs)
    gxs = torch.autograd.grad(penalty(op, xs), xs, create_graph=True)
    with pytest.raises(RuntimeError, match="reference"):
        torch.autograd.grad(sum(g.sum() for g in gxs), xs)


def check_opcheck(custom_op: Any, args: Sequence[Any], traced: bool = True) -> None:
    """Checks that a custom op does what it registered.

    These are its schema, its autograd formula, and the shapes, dtypes and strides of its fake
    implementation. traced: whether to compare the op with a traced graph of it, too, which takes
    most of the time. If the derivative of the op raises, no input may require a gradient.
    """
    utils = ["test_schema", "test_autograd_registration", "test_faketensor"]
    torch.library.opcheck(
        custom_op, tuple(args), test_utils=utils + ["test_aot_dispatch_dynamic"] * traced
    )


def touched_bytes() -> int:
    """Returns how much anonymous memory this process has touched and still holds, swapped or not.

    Pages of files, such as torch's libraries, do not count: a busy machine takes them away.
    """
    status = Path("/proc/self/status").read_text()
    return sum(1024 * int(kb) for kb in re.findall(r"^(?:RssAnon|VmSwap):\s*(\d+)", status, re.M))


@contextlib.contextmanager
def last_program_alone() -> Iterator[None]:
    """Under the interpreter, each launch runs the last program of its grid and no other.

    A tensor beyond 2^31 elements then costs little: of fresh memory that nobody touched the kernel
    commits the pages around its last elements. An offset that wraps in 32 bits reads and writes
    elsewhere, or is a segmentation fault.
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
    """Fails if the block touches more than `limit` bytes that it still holds at its end."""
    gc.collect()  # what earlier tests left must not be given back inside the block
    ctypes.CDLL(None).malloc_trim(0)
    before = touched_bytes()
    yield
    used = touched_bytes() - before
    assert used < limit, f"{used / 2**30:.1f} GiB were touched"
