"""Tests that the checks refuse wrong ops. Otherwise it would mean little that an op passes them."""

import ctypes
import mmap
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from fastgn_kernels import gelu, reference
from support import checks
from support.checks import random
from torch import Tensor
from torch.autograd.gradcheck import GradcheckError


class Kernel(torch.autograd.Function):
    """gelu in the usual wrapping of a kernel, whose second derivative is wrong.

    The first derivative is right, but autograd sees only its factor gy.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.nn.functional.gelu(x)

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            (derivative,) = torch.autograd.grad(torch.nn.functional.gelu(x).sum(), x)
        return gy * derivative


class _CubeBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gy: Tensor, x: Tensor) -> Tensor:
        ctx.save_for_backward(gy, x)
        return 3 * gy * x.square()

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor, Tensor]:
        gy, x = ctx.saved_tensors
        return 3 * v * x.square(), 6 * v * gy * x


class Cube(torch.autograd.Function):
    """x^3 with two derivatives, right in eager mode. Compiled code loses the second one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> Tensor:
        return _CubeBackward.apply(gy, *ctx.saved_tensors)


def erf_gelu(x: Tensor) -> Tensor:
    return reference.activation(x, "gelu")


def tanh_gelu(x: Tensor) -> Tensor:
    return reference.activation(x, "gelu_tanh")


def rounded(x: Tensor) -> Tensor:
    """Computes in half precision."""
    return erf_gelu(x.to(torch.float16)).to(x.dtype)


@pytest.mark.parametrize(
    "check, error, message",
    [
        (lambda x: checks.check_derivatives(Kernel.apply, [x]), GradcheckError, "mismatch"),
        (lambda x: checks.check_against_reference(gelu, tanh_gelu, [x]), AssertionError, "y0"),
        (
            lambda x: checks.check_against_reference(erf_gelu, erf_gelu, [x]),
            AssertionError,
            "no fused",
        ),
        (lambda x: checks.check_against_reference(gelu, gelu, [x]), AssertionError, "a fused"),
        (
            lambda x: checks.check_low_precision(rounded, erf_gelu, [x], torch.float32),
            AssertionError,
            "y0, norm 2.0",
        ),
    ],
    ids=["kernel in a Function", "another", "reference", "itself", "rounded"],
)
def test_what_is_wrong_is_refused(check: Callable, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        check(random(3, 4))


def test_a_penalty_that_leaves_no_trace_is_refused() -> None:
    linear = lambda x: 3.0 * x.detach() + 0.0 * x  # noqa: E731
    with pytest.raises(AssertionError, match="no trace"):
        checks.check_compiled(linear, [random(3, 4)])


def test_what_only_a_compiled_step_gets_wrong_is_refused() -> None:
    checks.check_derivatives(Cube.apply, [random(3, 4)])
    with pytest.raises(AssertionError, match="parameter 0"):
        checks.check_compiled(lambda x: Cube.apply(x), [random(3, 4)])


@checks.only_interpreted
def test_an_interpreted_run_is_of_the_triton_body() -> None:
    launches = []
    run = checks.triton_interpreter.GridExecutor.__call__
    with mock.patch.object(
        checks.triton_interpreter.GridExecutor,
        "__call__",
        lambda self, *args, **kwargs: (launches.append(self.fn), run(self, *args, **kwargs)),
    ):
        checks.three_orders(gelu, [random(3, 4)])
    assert len(launches) == 3


@pytest.mark.parametrize("given_back", ["nothing", "heap", "pages of a file"])
def test_touched_memory_is_counted(given_back: str, tmp_path: Path) -> None:
    """What the process returns to the system within the block does not hide it."""
    blocks = [ctypes.create_string_buffer(bytes(100_000)) for _ in range(3000)]
    top = ctypes.create_string_buffer(bytes(100_000))
    del blocks  # free() keeps them: they lie below one that is in use
    (tmp_path / "file").write_bytes(bytes(1 << 28))
    with open(tmp_path / "file") as file:
        mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
    assert not any(mapped[i] for i in range(0, 1 << 28, mmap.PAGESIZE))
    with pytest.raises(AssertionError, match="GiB were touched"), checks.little_memory(1 << 26):
        held = torch.ones(1 << 25)
        if given_back == "heap":
            ctypes.CDLL(None).malloc_trim(0)
        elif given_back == "pages of a file":
            mapped.madvise(mmap.MADV_DONTNEED)
    assert held[-1] == 1
    del top


def test_layouts_are_what_they_are_called() -> None:
    x = random(3, 5, 7)
    lies = {name: f(x) for name, f in checks.LAYOUTS.items()}
    assert all(t.shape == x.shape for t in lies.values())
    assert all(torch.equal(t, x) for name, t in lies.items() if name != "expanded")
    contiguous = [name for name, t in lies.items() if t.is_contiguous()]
    assert contiguous == ["contiguous", "unaligned"]
    assert lies["unaligned"].storage_offset() == 1 and lies["expanded"].stride(0) == 0
    assert lies["transposed"].stride() == (1, 3, 15)
