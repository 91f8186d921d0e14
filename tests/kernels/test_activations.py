"""Tests of every kind of activation, with and without a bias, in three orders."""

import functools
import itertools
import math
from collections.abc import Callable

import pytest
import torch
from fastgn_kernels import ACTIVATIONS, activation, activations, gelu, reference, silu
from support import checks
from support.checks import DEVICE, LAYOUTS, SHAPES, random
from torch import Tensor
from torch.testing import assert_close

from fastgn.step.double_backward import compile_double_backward

pytestmark = [
    # from NumPy, on the way to a limit or to an expected NaN
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
]

NAN, INF = float("nan"), float("inf")
PARAMETERS = {"softplus": 2.0, "elu": 0.5, "leaky_relu": 0.2}

every_kind = pytest.mark.parametrize("kind", ACTIVATIONS)
with_and_without_bias = pytest.mark.parametrize("biased", [False, True], ids=["plain", "bias"])


def of_kind(function: Callable, kind: str, parameter: float | None = None) -> Callable:
    """Returns an op or reference as a function of (x) or (x, bias)."""
    return lambda x, bias=None: function(x, kind, bias, parameter)


def inputs(biased: bool, *shape: int) -> list[Tensor]:
    return [random(*shape), random(shape[-1], seed=1)][: 1 + biased]


def orders(function: Callable, x: Tensor, gy: Tensor, v: Tensor) -> list[Tensor]:
    """Returns y, gx, and the gradients of gx under the cotangent v with respect to gy and x."""
    x, gy = checks.leaves([x, gy])
    y = function(x)
    (gx,) = torch.autograd.grad(y, x, gy, create_graph=True)
    return [y, gx, *torch.autograd.grad(gx, (gy, x), v, materialize_grads=True)]


@checks.interpreter(kind=["gelu"])
@with_and_without_bias
@every_kind
def test_derivatives(kind: str, biased: bool) -> None:
    checks.check_derivatives(of_kind(activation, kind), inputs(biased, 3, 3))


@checks.interpreter(biased=[False])
@checks.interpreter(kind=["gelu", "mish"])
@with_and_without_bias
@every_kind
def test_is_its_reference(kind: str, biased: bool) -> None:
    op, twin = of_kind(activation, kind), of_kind(reference.activation, kind)
    for shape in SHAPES.values():
        checks.check_against_reference(op, twin, inputs(biased, *shape))
    # several blocks of columns, and enough rows for several partial sums of the bias gradient
    checks.check_against_reference(op, twin, inputs(biased, 37, 300))


@checks.interpreter(biased=[False])
@with_and_without_bias
@pytest.mark.parametrize("kind", PARAMETERS)
def test_parameters(kind: str, biased: bool) -> None:
    op, twin = (of_kind(f, kind, PARAMETERS[kind]) for f in (activation, reference.activation))
    checks.check_derivatives(op, inputs(biased, 3, 3))
    checks.check_against_reference(op, twin, inputs(biased, 5, 7))
    assert not torch.allclose(op(random(9)), activation(random(9), kind))


@pytest.mark.parametrize("kind, biased", [*((kind, False) for kind in ACTIVATIONS), ("gelu", True)])
def test_compiled(kind: str, biased: bool) -> None:
    """One kind is enough with a bias, which is added before the kind matters."""
    checks.check_compiled(of_kind(activation, kind, PARAMETERS.get(kind)), inputs(biased, 3, 5))


@pytest.mark.slow
def test_compiled_by_inductor() -> None:
    checks.check_compiled(gelu, inputs(True, 4, 16), backend="inductor")


def test_a_compiled_region_holds_no_opaque_op() -> None:
    backend, called = checks.recording_backend()
    checks.check_compiled(gelu, inputs(True, 3, 5), backend=backend)
    assert any(name.startswith("aten.erf") or name.startswith("aten.gelu") for name in called)
    assert not any("fastgn" in name for name in called)
    assert "fastgn::activation" in checks.ops_called(gelu, random(3))


@checks.interpreter(kind=["gelu"], dtype=checks.NUMPY_DTYPES)
@pytest.mark.parametrize(
    "dtype",
    [
        torch.float32,
        torch.float16,
        torch.bfloat16,
    ],
    ids=str,
)
@with_and_without_bias
@every_kind
def test_low_precision(kind: str, biased: bool, dtype: torch.dtype) -> None:
    op, twin = of_kind(activation, kind), of_kind(reference.activation, kind)
    for scale in (1, 4):
        x, *bias = inputs(biased, 64, 60)
        checks.check_low_precision(op, twin, [scale * x, *bias], dtype)


@checks.interpreter(biased=[True], layout=["transposed"])
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "unaligned"])
@with_and_without_bias
def test_opcheck(biased: bool, layout: str) -> None:
    x, *bias = (LAYOUTS[layout](t).requires_grad_() for t in inputs(biased, 3, 4))
    gy, v = (LAYOUTS[layout](random(3, 4, seed=s)) for s in (2, 3))
    check = functools.partial(checks.check_opcheck, traced=layout == "contiguous")
    rest = (bias[0] if biased else None, "gelu", 1.0)
    w = random(4, seed=4) if biased else None
    check(activations._activation, (x, *rest))
    gy.requires_grad_()
    for weight_grads in {False, biased}:
        check(activations._activation_bwd, (gy, x, *rest, weight_grads))
        plain = [t.detach() if isinstance(t, Tensor) else t for t in (v, w, gy, x, *rest)]
        check(activations._activation_bwd_bwd, (*plain, weight_grads))


@checks.interpreter
@with_and_without_bias
def test_layouts(biased: bool) -> None:
    """Every argument of every order has each layout while another has each layout."""
    bias, w = (random(7, seed=s) if biased else None for s in (1, 4))
    rest = (bias, "gelu", 1.0)
    ways = list(LAYOUTS.values())
    for i, j in itertools.product(range(len(ways)), repeat=2):
        lies = ways[i], ways[j], ways[(i + j) % len(ways)]
        v, gy, x = (f(random(3, 5, 7, seed=seed)) for seed, f in enumerate(lies))
        plain_v, plain_gy, plain_x = (t.clone().contiguous() for t in (v, gy, x))
        pairs = [
            (activations._activation(x, *rest), activations._activation(plain_x, *rest)),
            *zip(
                activations._activation_bwd(gy, x, *rest, biased),
                activations._activation_bwd(plain_gy, plain_x, *rest, biased),
                strict=True,
            ),
            *zip(
                activations._activation_bwd_bwd(v, w, gy, x, *rest, biased),
                activations._activation_bwd_bwd(plain_v, w, plain_gy, plain_x, *rest, biased),
                strict=True,
            ),
        ]
        for ours, plain in pairs:
            assert_close(ours, plain, rtol=1e-13, atol=1e-13, check_stride=False)


@pytest.mark.parametrize("layout", LAYOUTS)
@with_and_without_bias
def test_layouts_against_the_reference(biased: bool, layout: str) -> None:
    x, *bias = inputs(biased, 3, 5, 7)
    checks.check_against_reference(gelu, of_kind(reference.activation, "gelu"), [
        LAYOUTS[layout](x), *bias,
    ])  # fmt: skip


@checks.interpreter
def test_channels_last_stays() -> None:
    x = random(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    for result in orders(silu, x, random(2, 3, 4, 5, seed=1), torch.ones_like(x)):
        assert result.stride() == x.stride()


@checks.interpreter(kind=["gelu", "relu"])
@every_kind
def test_a_nan_goes_where_pytorchs_goes(kind: str) -> None:
    """NaN in x, gy or v. relu and similar kinds stop it where they are flat."""
    op, twin = of_kind(activation, kind), of_kind(reference.activation, kind)
    for where in range(3):
        arguments = [torch.tensor([1.5, -0.7, 0.0, 3.0], device=DEVICE) for _ in range(3)]
        arguments[where][:] = NAN
        for ours, theirs in zip(orders(op, *arguments), orders(twin, *arguments), strict=True):
            assert torch.equal(ours.isnan(), theirs.isnan()), (where, ours, theirs)


@checks.interpreter(kind=["gelu", "relu"])
@every_kind
def test_an_infinite_gradient_stays_visible(kind: str) -> None:
    """Results are infinite or NaN exactly where PyTorch's are, which gradient scalers look for.

    PyTorch's second derivatives of silu and mish subtract inf from inf and give NaN, where ours
    give inf.
    """
    op, twin = of_kind(activation, kind), of_kind(reference.activation, kind)
    x = torch.tensor([1.5, -0.7, 0.0, 3.0], device=DEVICE)
    for gy, v in ((INF, 1.0), (-INF, 1.0), (1.0, INF), (1.0, -INF)):
        arguments = x, torch.full_like(x, gy), torch.full_like(x, v)
        for ours, theirs in zip(orders(op, *arguments), orders(twin, *arguments), strict=True):
            assert torch.equal(ours.isfinite(), theirs.isfinite()), (gy, v, ours, theirs)
            assert_close(ours[~theirs.isnan()], theirs[~theirs.isnan()], rtol=1e-4, atol=0)


QUIRKS = {
    # vectorised on a CPU, F.gelu is NaN at inf, and inf above half of float32's largest number
    ("gelu", 0, INF): INF,
    ("gelu", 0, 3e38): 3e38,
    # on a CPU, mish's second derivative is exp(2 x) over exp(2 x): inf over inf
    **{("mish", 3, x): 0.0 for x in (90.0, 200.0, 1e4, 1e20)},
}
"""(kind, index in `orders`, x) -> the right value, where PyTorch is wrong on some CPUs."""


@checks.interpreter(kind=["gelu", "mish"])
@every_kind
def test_huge_and_infinite_inputs(kind: str) -> None:
    values = [s * x for x in (0.0, 20.0, 90.0, 200.0, 1e4, 1e20, 3e38, INF) for s in (1, -1)]
    x = torch.tensor(values, device=DEVICE)
    op, twin = of_kind(activation, kind), of_kind(reference.activation, kind)
    ours, theirs = (orders(f, x, torch.ones_like(x), torch.ones_like(x)) for f in (op, twin))
    for order, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        for i, value in enumerate(values):
            right = QUIRKS.get((kind, order, value), float(b[i].detach()))
            same = math.isnan(right) and bool(a[i].isnan())
            assert same or float(a[i].detach()) == pytest.approx(right, rel=1e-5, abs=1e-30), (
                order,
                value,
            )


@checks.interpreter(dtype=checks.NUMPY_DTYPES)
@pytest.mark.parametrize(
    "dtype",
    [torch.float16, torch.bfloat16],
    ids=str,
)
def test_mixed_dtypes(dtype: torch.dtype) -> None:
    """A float32 bias beside a half-precision x is added, and its gradient summed, in float32.

    Rounding the gradient to `dtype` would be an error of 5e-4 or more.
    """
    x = random(64, 48).to(dtype)
    x, bias = checks.leaves([x, random(48, seed=1).float()])
    y = gelu(x, bias)
    gy = random(64, 48, seed=2).to(dtype).requires_grad_()
    gx, gbias = torch.autograd.grad(y, (x, bias), gy, create_graph=True)
    v = random(64, 48, seed=3).to(dtype), random(48, seed=4).float()
    seconds = torch.autograd.grad((gx, gbias), (gy, x, bias), v)
    assert [t.dtype for t in (y, gx, *seconds[:2])] == [dtype] * 4
    assert gbias.dtype == seconds[2].dtype == torch.float32

    wide = checks.leaves([x.double(), bias.double(), gy.double()])
    right = torch.autograd.grad(
        reference.activation(wide[0], "gelu", wide[1]), wide[:2], wide[2], create_graph=True
    )
    (second,) = torch.autograd.grad(right, wide[1], [t.double() for t in v])
    assert checks.relative(gbias, right[1].float()) < 1e-6
    assert checks.relative(seconds[2], second.float()) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_autocast_changes_nothing(dtype: torch.dtype) -> None:
    """The op computes in float32 or float64 anyway and returns the dtype of x."""
    x, bias, gy, v = random(5, 8).to(dtype), random(8, seed=1), random(5, 8, seed=2).to(dtype), 1
    function = lambda t: gelu(t, bias.float())  # noqa: E731
    v = torch.ones_like(x)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        inside = orders(function, x, gy, v)
    for a, b in zip(inside, orders(function, x, gy, v), strict=True):
        assert a.dtype == dtype and torch.equal(a, b)


def test_gelu_and_silu_are_pytorchs() -> None:
    x, bias = inputs(True, 5, 7)
    functional = torch.nn.functional
    for approximate in ("none", "tanh"):
        assert_close(gelu(x, bias, approximate), functional.gelu(x + bias, approximate=approximate))
    assert not torch.allclose(gelu(x), gelu(x, approximate="tanh"), rtol=1e-6)
    assert_close(gelu(x), functional.gelu(x))
    assert_close(silu(x), functional.silu(x))
    assert_close(silu(x, bias), functional.silu(x + bias))


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda x: activation(x, "swish"), ValueError, "'swish' is not one of gelu"),
        (
            lambda x: activation(x, "gelu", x),
            ValueError,
            r"bias has shape \(2, 3\), should be \(3,\)",
        ),
        (lambda x: activation(x, "gelu", x[0, :1]), ValueError, r"\(1,\), should be \(3,\)"),
        (lambda x: activation(x[0, 0], "gelu", x[0, 0]), ValueError, r"bias has shape \(\)"),
        (lambda x: activation(x.long(), "relu"), TypeError, "x is torch.int64"),
        (lambda x: activation(x, "relu", x[0].int()), TypeError, "bias is torch.int32"),
        (lambda x: activation(x, "silu", parameter=2.0), ValueError, "silu has no parameter"),
        (lambda x: gelu(x, approximate="erf"), ValueError, "'erf' should be 'none' or 'tanh'"),
    ],
)
def test_mistakes(call: Callable, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        call(random(2, 3))


@checks.only_interpreted
@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize(
    "shape",
    [(2**31 + 3000,), (65, 2**25 + 1)],
    ids=["plain", "bias"],
)
def test_beyond_2_to_the_31_elements(shape: tuple[int, ...], order: int) -> None:
    last = (-1,) * len(shape)
    with checks.little_memory(), checks.last_program_alone():
        x, gy = (torch.empty(shape, dtype=torch.float16) for _ in range(2))
        x[last], gy[last] = 0.5, 3.0
        bias = torch.empty(shape[-1:], dtype=torch.float16) if len(shape) > 1 else None
        if bias is not None:
            bias[-1] = 0.25
        rest = (bias, "gelu", 1.0)
        if order == 0:
            results = [activations._activation(x, *rest)]
        elif order == 1:
            results = activations._activation_bwd(gy, x, *rest, bias is not None)
        else:
            results = activations._activation_bwd_bwd(gy, None, gy, x, *rest, bias is not None)
        ours = [float(r[(-1,) * r.ndim]) for r in results if r.numel()]

    u, gy = torch.tensor([0.75 if bias is not None else 0.5, 3.0], dtype=torch.float64)
    y, gx, ggy, second = map(float, orders(of_kind(reference.activation, "gelu"), u, gy, gy))
    right = [[y], [gx, gx], [ggy, second, second]][order]
    assert ours == pytest.approx(right if bias is not None else right[: order or 1], rel=1e-3)


def large_second(function: Callable, kind: str) -> tuple[Tensor, Tensor]:
    """Returns the first and second derivative at values where exponentials over- or underflow."""
    x = torch.tensor([-1e5, -200.0, -90.0, 88.5, 89.5, 200.0, 1e5], device=DEVICE)

    def derivatives(x: Tensor) -> tuple[Tensor, Tensor]:
        (gx,) = torch.autograd.grad(function(x, kind).square().sum(), x, create_graph=True)
        return gx, torch.autograd.grad(gx.sum(), x)[0]

    return derivatives(x.requires_grad_())


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_derivatives_are_right_at_large_values(kind):
    """Tests the op and its reference, which compiled code uses. F.mish would give NaN here."""
    double = lambda x, kind: reference.activation(x.double(), kind)  # noqa: E731
    exact = large_second(double, kind)
    for function in (activation, reference.activation):
        for found, right in zip(large_second(function, kind), exact, strict=True):
            assert right.isfinite().all()
            torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-6)


def test_mish_in_a_compiled_region_has_its_second_derivative_at_large_values():
    torch._dynamo.reset()

    class Penalty(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            (gx,) = torch.autograd.grad(activation(x, "mish").sum(), x, create_graph=True)
            return gx.square().sum()

    x = torch.tensor([-1.0, 1.0, 89.5, 1e4], device=DEVICE, requires_grad=True)
    compile_double_backward(Penalty(), backend="aot_eager")(x).backward()
    grad = x.grad.clone()
    x.grad = None
    Penalty()(x).backward()
    torch.testing.assert_close(grad, x.grad)
    assert grad.isfinite().all() and grad[:2].abs().min() > 0
