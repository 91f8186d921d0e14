"""Tests of layer_norm in three orders, with and without a residual."""

import functools
import itertools
import sys
from collections.abc import Callable

import pytest
import torch
from fastgn_kernels import layer_norm, reference
from support import checks
from support.checks import DEVICE, LAYOUTS, random
from support.marks import first_is_quick
from torch import Tensor
from torch.testing import assert_close

# the attribute of the package with this name is the function, not the module
module = sys.modules["fastgn_kernels.layer_norm"]
kernels = sys.modules["fastgn_kernels.layer_norm_kernels"]

pytestmark = [
    # from NumPy, on the way to an expected NaN
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:divide by zero encountered:RuntimeWarning"),
]

NAN, INF = float("nan"), float("inf")
FORMS = ("bare", "affine", "residual")
"""The inputs are x alone, x with weight and bias, or x with residual, weight and bias."""

every_form = pytest.mark.parametrize("form", FORMS)
low_dtypes = pytest.mark.parametrize(
    "dtype",
    [
        torch.float32,
        torch.float16,
        torch.bfloat16,
    ],
    ids=str,
)


def of(function: Callable, eps: float = 1e-5) -> Callable:
    """Returns an op or reference as a function of tensors, in the order of `FORMS`."""

    def call(x: Tensor, *rest: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        residual, rest = (rest[0], rest[1:]) if len(rest) == 3 else (None, rest)
        return function(x, *(rest or (None, None)), eps=eps, residual=residual)

    return call


op, twin = of(layer_norm), of(reference.layer_norm)


def eager(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Normalises with F.layer_norm, whose rounding errors are those of eager PyTorch."""
    total = x if residual is None else x + residual
    y = torch.nn.functional.layer_norm(total, x.shape[-1:], weight, bias, eps)
    return y if residual is None else (y, total)


def inputs(form: str, *shape: int) -> list[Tensor]:
    x, residual = random(*shape), random(*shape, seed=1)
    weight, bias = 1 + random(shape[-1], seed=2) / 4, random(shape[-1], seed=3)
    return {"bare": [x], "affine": [x, weight, bias], "residual": [x, residual, weight, bias]}[form]


@checks.interpreter(form=["affine"])
@every_form
def test_derivatives(form: str) -> None:
    # With a small eps, finite differences would be inexact. A large one tests the same terms.
    checks.check_derivatives(of(layer_norm, eps=0.1), inputs(form, 2, 3))


@pytest.mark.parametrize("used", [0, 1])
def test_derivatives_of_one_output(used: int) -> None:
    """The loss uses only the normalised sum, or only the sum, whose gradient needs no op."""
    checks.check_derivatives(
        lambda *xs: of(layer_norm, eps=0.1)(*xs)[used], inputs("residual", 2, 3)
    )


@checks.interpreter(form=["residual"])
@checks.interpreter(shape=[(3, 5, 7)])
@every_form
@pytest.mark.parametrize(
    "shape",
    [(0, 4), (2, 0, 4), (7,), (1, 8), (3, 5, 7), (70, 37), (2, 129), (2, 1500)],
    ids=str,
)
def test_is_its_reference(form: str, shape: tuple[int, ...]) -> None:
    checks.check_against_reference(op, twin, inputs(form, *shape), tolerance=1e-9)


@checks.interpreter
@every_form
@pytest.mark.parametrize("rows", [1, 3])
def test_one_column(rows: int, form: str) -> None:
    """The output is the bias, whatever x is. PyTorch has rounding errors where ours is 0."""
    xs = inputs(form, rows, 1)
    ours, theirs = checks.three_orders(op, xs), checks.three_orders(twin, xs)
    for name, right in theirs.items():
        assert_close(ours[name], right, rtol=1e-10, atol=1e-10, msg=name)


@checks.interpreter
@pytest.mark.parametrize("used", [0, 1])
def test_one_output_is_the_references(used: int) -> None:
    xs = inputs("residual", 5, 7)
    if used == 0:
        checks.check_against_reference(
            lambda *xs: op(*xs)[0], lambda *xs: twin(*xs)[0], xs, tolerance=1e-9
        )
    # the loss uses one of both outputs, so autograd leaves the other's cotangent undefined
    results = []
    for function in (op, twin):
        leaves = checks.leaves(xs)
        y = function(*leaves)[used]
        gxs = torch.autograd.grad(
            (y**3).sum(), leaves, create_graph=True, materialize_grads=True, allow_unused=True
        )
        penalty = sum((g**3).sum() for g in gxs)
        seconds = torch.autograd.grad(penalty, leaves, materialize_grads=True, allow_unused=True)
        results.append([*gxs, *seconds])
    assert_close(*results, rtol=1e-9, atol=1e-9)
    assert all(g.abs().sum() > 0 for g in results[0][:2])


@checks.interpreter
def test_several_strips_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of 3 programs sums over several tiles, and some over one tile more than others."""
    monkeypatch.setattr(kernels, "count_strips", lambda rows, rows_per_block, columns: 3)
    for shape in ((61, 1030), (3, 1030), (2, 1030)):
        checks.check_against_reference(op, twin, inputs("residual", *shape), tolerance=1e-9)


@checks.interpreter
def test_rows_beyond_the_largest_take_the_plain_body() -> None:
    with pytest.MonkeyPatch.context() as patches:
        for order in ("fwd", "bwd", "bwd_bwd"):
            patches.delattr(kernels, f"_layer_norm_{order}_kernel")
        xs = inputs("residual", 2, module.LARGEST + 1)
        checks.check_against_reference(op, twin, xs, tolerance=1e-9)


@checks.only_interpreted
@pytest.mark.parametrize("columns", [module.LARGEST - 3, module.LARGEST])
def test_the_largest_row_is_a_kernels(columns: int) -> None:
    with pytest.MonkeyPatch.context() as patches:
        for order in ("forward", "backward", "backward_backward"):
            patches.delattr(module, f"_{order}_plain")
        checks.check_against_reference(op, twin, inputs("affine", 2, columns), tolerance=1e-9)


@every_form
def test_compiled(form: str) -> None:
    checks.check_compiled(op, inputs(form, 3, 5))


@every_form
def test_compiled_as_custom_ops(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests compiled code that keeps the custom ops, as on CUDA."""
    monkeypatch.setattr(module, "is_compiling", lambda: False)
    checks.check_compiled(op, inputs(form, 3, 5))


@pytest.mark.slow
def test_compiled_by_inductor() -> None:
    checks.check_compiled(op, inputs("residual", 4, 16), backend="inductor")


def test_a_compiled_region_holds_an_opaque_op_only_where_its_kernel_runs() -> None:
    backend, called = checks.recording_backend()
    checks.check_compiled(op, inputs("residual", 3, 5), backend=backend)
    opaque = any("fastgn" in name for name in called)
    assert opaque == (checks.DEVICE == "cuda"), sorted(called)  # there its kernel runs
    assert any(name.startswith("aten.rsqrt") for name in called) != opaque


@checks.interpreter(form=["residual"], dtype=checks.NUMPY_DTYPES)
@low_dtypes
@every_form
def test_low_precision(form: str, dtype: torch.dtype) -> None:
    for scale, columns in itertools.product((1, 8), (60, 128)):
        x, *rest = inputs(form, 64, columns)
        checks.check_low_precision(op, of(eager), [scale * x, *rest], dtype)


@checks.interpreter(dtype=checks.NUMPY_DTYPES)
@low_dtypes
def test_a_common_offset_costs_no_more_than_pytorchs(dtype: torch.dtype) -> None:
    """The variance is computed from centred values. E[x^2] - E[x]^2 would have no digit left."""
    checks.check_low_precision(
        op, of(eager), [random(16, 96) + 100, *inputs("affine", 1, 96)[1:]], dtype
    )


@checks.interpreter(layout=["transposed"])
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "unaligned"])
def test_opcheck(layout: str) -> None:
    place = LAYOUTS[layout]
    x, residual, gy, gsum, v = (place(random(3, 4, seed=s)) for s in range(5))
    weight, bias, vw, vb = (place(random(4, seed=s)) for s in range(5, 9))
    grad = [t.clone().requires_grad_() for t in (x, residual, weight, bias)]
    check = functools.partial(checks.check_opcheck, traced=layout == "contiguous")
    ops = torch.ops.fastgn
    for dtype in (torch.float64, torch.float32):
        options = (1e-5, dtype)
        check(ops.layer_norm.default, (grad[0], *grad[2:], *options))
        check(ops.add_layer_norm.default, (*grad, *options))
    for g, weight_grads in itertools.product((None, gsum), (False, True)):
        arguments = (gy.clone().requires_grad_(), g, grad[0], grad[2], 1e-5, weight_grads)
        check(ops.layer_norm_bwd.default, arguments)
    for cotangents in ((v, None, None), (v, vw, None), (v, None, vb), (v, vw, vb)):
        arguments = (*cotangents, gy, x, weight, 1e-5, vb is cotangents[2])
        check(ops.layer_norm_bwd_bwd.default, arguments)
    # each of another dtype: x half, its cotangents float32, the weights float64
    mixed = (v.half(), vw, vb, gy.float(), x.half(), weight)
    check(ops.layer_norm_bwd_bwd.default, (*mixed, 1e-5, True))


@checks.interpreter
def test_layouts() -> None:
    """Every argument of every order has each layout while another has each layout."""
    ways = list(LAYOUTS.values())
    for i, j in itertools.product(range(len(ways)), repeat=2):
        lies = [ways[i], ways[j], ways[(i + j) % len(ways)]]
        x, gy, v = (f(random(3, 5, 7, seed=seed)) for seed, f in enumerate(lies))
        residual, gsum = ways[j](random(3, 5, 7, seed=4)), ways[i](random(3, 5, 7, seed=5))
        weight, bias, vw, vb = (LAYOUTS["sliced"](random(7, seed=s)) for s in range(6, 10))
        results = []
        for same in (lambda t: t, lambda t: t.clone(memory_format=torch.contiguous_format)):
            xs, ws = map(same, (v, gy, gsum, x, residual)), map(same, (weight, bias, vw, vb))
            (v_, gy_, gsum_, x_, residual_), (weight_, bias_, vw_, vb_) = xs, ws
            results.append([
                *module._add_layer_norm(x_, residual_, weight_, bias_, 1e-5, x.dtype),
                *module._layer_norm_bwd(gy_, gsum_, x_, weight_, 1e-5, True),
                *module._layer_norm_bwd_bwd(v_, vw_, vb_, gy_, x_, weight_, 1e-5, True),
            ])  # fmt: skip
        assert all(r.is_contiguous() for r in results[0])
        assert_close(*results, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_against_the_reference(layout: str) -> None:
    x, residual, *weights = inputs("residual", 3, 5, 7)
    place = LAYOUTS[layout]
    checks.check_against_reference(op, twin, [place(x), place(residual), *weights], tolerance=1e-9)


def test_weight_and_bias_may_each_be_left_out() -> None:
    x, weight, bias = inputs("affine", 5, 7)
    for w, b in itertools.product((weight, None), (bias, None)):
        ours, theirs = (f(x, w, b) for f in (layer_norm, reference.layer_norm))
        assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    given = [lambda x, b, f=f: f(x, None, b) for f in (layer_norm, reference.layer_norm)]
    checks.check_against_reference(*given, [x, bias], tolerance=1e-9)
    # with a bias but no weight, PyTorch's own second derivative lacks a term
    ones = torch.ones_like(bias)
    ours, theirs = (
        checks.three_orders(f, [x, bias])
        for f in (given[1], lambda x, b: torch.nn.functional.layer_norm(x, (7,), ones, b))
    )
    for name, right in theirs.items():
        assert_close(ours[name], right, rtol=1e-12, atol=1e-12)
    assert_close(layer_norm(x, weight, bias), torch.nn.functional.layer_norm(x, (7,), weight, bias))


@checks.interpreter
def test_eps() -> None:
    x = torch.full((2, 6), 3.0, dtype=torch.float64, device=DEVICE)
    x[1] = random(6) / 100
    for eps in (1e-5, 1e-2):
        checks.check_against_reference(
            of(layer_norm, eps), of(reference.layer_norm, eps), [x], tolerance=1e-9
        )
    assert checks.relative(layer_norm(x, eps=1e-2), layer_norm(x)) > 0.1
    # with eps = 0, rows beyond the last one in a tile divide by 0
    xs = inputs("affine", 3, 8)
    checks.check_against_reference(
        of(layer_norm, 0.0), of(reference.layer_norm, 0.0), xs, tolerance=1e-9
    )


@checks.interpreter
def test_no_columns() -> None:
    x = random(3, 0).requires_grad_()
    (g,) = torch.autograd.grad(layer_norm(x, random(0), random(0)).sum(), x, create_graph=True)
    assert g.shape == torch.autograd.grad(g.sum(), x)[0].shape == (3, 0)


@checks.interpreter(value=[NAN, INF])
@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("where", range(5), ids=["x", "weight", "bias", "gy", "v"])
def test_infinities_and_nan_go_where_pytorchs_go(where: int, value: float) -> None:
    """Results are infinite or NaN exactly where PyTorch's are."""
    x, weight, bias = (t.float() for t in inputs("affine", 3, 5))
    arguments = [x, weight, bias, random(3, 5, seed=8).float(), random(3, 5, seed=9).float()]
    arguments[where].flatten()[2] = value
    results = []
    for function in (op, twin):
        *xs, gy = checks.leaves(arguments[:4])
        y = function(*xs)
        gxs = torch.autograd.grad(y, xs, gy, create_graph=True)
        seconds = torch.autograd.grad(gxs[0], (gy, xs[0], xs[1]), arguments[4])
        results.append([y, *gxs, *seconds])
    assert any(not t.isfinite().all() for t in results[0])
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours.isfinite(), theirs.isfinite()), (ours, theirs)
        assert_close(ours[theirs.isfinite()], theirs[theirs.isfinite()], rtol=1e-3, atol=1e-4)


@checks.interpreter(dtype=checks.NUMPY_DTYPES)
@pytest.mark.parametrize(
    "dtype",
    [torch.float16, torch.bfloat16],
    ids=str,
)
@pytest.mark.parametrize("form", ["affine", "residual"])
def test_mixed_dtypes(form: str, dtype: torch.dtype) -> None:
    """Gradients of float32 weights beside half-precision rows are summed and kept in float32.

    Rounding them to `dtype` would be an error of 5e-4 or more.
    """
    x, *residual, weight, bias = inputs(form, 64, 48)
    x, residual = x.to(dtype), [r.to(dtype) for r in residual]
    leaves = checks.leaves([x, weight.float(), bias.float()])
    ys = checks.tensors(op(leaves[0], *residual, *leaves[1:]))
    gys = checks.leaves([random(64, 48, seed=7 + i).to(dtype) for i in range(len(ys))])
    gxs = torch.autograd.grad(ys, leaves, gys, create_graph=True)
    vs = [random(*g.shape, seed=9 + i).to(g.dtype) for i, g in enumerate(gxs)]
    seconds = torch.autograd.grad(gxs, [*gys, *leaves[:2]], vs)
    assert {t.dtype for t in (*ys, gxs[0], *seconds[:-1])} == {dtype}
    assert {t.dtype for t in (*gxs[1:], seconds[-1])} == {torch.float32}

    rounded = ys[1] if residual else x
    wide = checks.leaves([t.double() for t in (rounded, *leaves[1:])])
    right = torch.autograd.grad(twin(*wide), wide, gys[0].double(), create_graph=True)
    (second,) = torch.autograd.grad(right, wide[1], [v.double() for v in vs])
    for ours, exact in ((gxs[1], right[1]), (gxs[2], right[2]), (seconds[-1], second)):
        assert checks.relative(ours.double(), exact) < 1e-6


@checks.interpreter
def test_the_sum_is_rounded_before_it_is_normalised() -> None:
    """So the backward reads the same numbers that the forward normalised."""
    x, residual = random(5, 40).half(), random(5, 40, seed=1).half()
    y, total = layer_norm(x, residual=residual, dtype=torch.float32)
    assert torch.equal(total, x + residual)
    assert torch.equal(y, layer_norm(total, dtype=torch.float32))


def test_a_residual_of_another_dtype_widens_the_sum() -> None:
    x, residual = random(3, 8).half(), random(3, 8, seed=1).float()
    for a, b in ((x, residual), (residual, x)):
        y, total = layer_norm(a, residual=b)
        right, right_total = reference.layer_norm(a, residual=b)
        assert y.dtype == total.dtype == torch.float32
        assert torch.equal(total, right_total)
        assert_close(y, right)


@pytest.mark.parametrize("out", [torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
@every_form
def test_dtype_of_the_output(form: str, dtype: torch.dtype, out: torch.dtype) -> None:
    leaves = checks.leaves([x.to(dtype) for x in inputs(form, 6, 10)])
    x, residual = leaves[0], leaves[1] if form == "residual" else None
    weights = leaves[-2:] if form != "bare" else (None, None)
    ys = checks.tensors(layer_norm(x, *weights, residual=residual, dtype=out))
    rights = checks.tensors(reference.layer_norm(x, *weights, residual=residual, dtype=out))
    assert [y.dtype for y in ys] == [r.dtype for r in rights] == [out, dtype][: len(ys)]
    for y, right in zip(ys, rights, strict=True):
        assert_close(y, right, rtol=2e-3, atol=2e-3)
    gxs = torch.autograd.grad(sum((y.double() ** 3).sum() for y in ys), leaves, create_graph=True)
    seconds = torch.autograd.grad(sum((g.double() ** 2).sum() for g in gxs), leaves[:1])
    assert {t.dtype for t in (*gxs, *seconds)} == {dtype}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@every_form
def test_autocast(form: str, dtype: torch.dtype) -> None:
    """The output has the dtype of F.layer_norm's. Everything else is as without autocast."""
    *xs, weight, bias = inputs(form if form != "bare" else "affine", 5, 8)
    *xs, weight, bias = *(x.to(dtype) for x in xs), weight.float(), bias.float()

    def run(**options: torch.dtype) -> list[Tensor]:
        leaves = checks.leaves([*xs, weight, bias])
        residual = leaves[1] if len(leaves) == 4 else None
        affine = leaves[-2:] if form != "bare" else (None, None)
        ys = checks.tensors(layer_norm(leaves[0], *affine, residual=residual, **options))
        (gx,) = torch.autograd.grad(
            sum((y.float() ** 3).sum() for y in ys), leaves[:1], create_graph=True
        )
        return [*ys, gx, *torch.autograd.grad((gx.float() ** 2).sum(), leaves[:1])]

    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        inside, as_told = run(), run(dtype=dtype)
        theirs = torch.nn.functional.layer_norm(xs[0], (8,), weight, bias).dtype
    outside, plainly = run(dtype=theirs), run()
    assert inside[0].dtype == theirs and as_told[0].dtype == plainly[0].dtype == dtype
    for a, b in zip((*inside, *as_told), (*outside, *plainly), strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


@every_form
def test_plain_bodies_compute_half_precision_in_float32(
    form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The only error of each result is its last rounding."""
    monkeypatch.setattr(module, "_kernel_runs", lambda x: False)
    x, *rest = (x.half() for x in inputs(form, 16, 50))
    # the residual is no input here, because autograd would add its gradients in half precision
    residual = [rest.pop(0)] if form == "residual" else []
    named = checks.three_orders(lambda x, *ws: op(x, *residual, *ws), [x, *rest], torch.float16)
    if residual:  # the derivatives are those at the rounded sum
        x, residual = named["y1"], [torch.zeros_like(x, dtype=torch.float64)]
    exact = checks.three_orders(
        lambda x, *ws: twin(x, *residual, *ws), [t.double() for t in (x, *rest)], torch.float16
    )
    for name, right in exact.items():
        error = (named[name].double() - right).abs()
        assert (error <= right.abs() * 2**-11 + 2e-6 * right.abs().max() + 2**-25).all(), name


@pytest.mark.parametrize("trained", list(itertools.product([False, True], repeat=4)), ids=str)
def test_frozen_inputs(trained: tuple[bool, ...]) -> None:
    """x, residual, weight and bias each may need no gradient."""
    results = []
    for function in (op, twin):
        xs = [x.requires_grad_(t) for x, t in zip(inputs("residual", 4, 6), trained, strict=True)]
        wanted = [x for x in xs if x.requires_grad]
        y, total = function(*xs)
        loss = (y**3).sum() + (total**3).sum()
        assert loss.requires_grad == any(trained)
        if not wanted:
            return
        gxs = torch.autograd.grad(loss, wanted, create_graph=True)
        seconds = torch.autograd.grad(sum((g**2).sum() for g in gxs), wanted)
        results.append([*gxs, *seconds])
    assert_close(*results, rtol=1e-9, atol=1e-9)


def test_the_same_bits_in_every_run() -> None:
    xs = [x.float() for x in inputs("residual", 300, 40)]
    first, second = (checks.three_orders(op, xs, torch.float32) for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda x: layer_norm(x, x), ValueError, r"weight has shape \(2, 3\), should be \(3,\)"),
        (
            lambda x: layer_norm(x, x[0, :1]),
            ValueError,
            r"weight has shape \(1,\), should be \(3,\)",
        ),
        (
            lambda x: layer_norm(x, None, x),
            ValueError,
            r"bias has shape \(2, 3\), should be \(3,\)",
        ),
        (
            lambda x: layer_norm(x, residual=x[0]),
            ValueError,
            r"residual has shape \(3,\), should be \(2, 3\)",
        ),
        (lambda x: layer_norm(x[0, 0]), ValueError, r"x has shape \(\), should be \(\.\.\., C\)"),
        (lambda x: layer_norm(x.long()), TypeError, "x is torch.int64"),
        (lambda x: layer_norm(x, x[0].int()), TypeError, "weight is torch.int32"),
        (lambda x: layer_norm(x, None, x[0].int()), TypeError, "bias is torch.int32"),
        (lambda x: layer_norm(x, residual=x.bool()), TypeError, "residual is torch.bool"),
        (lambda x: layer_norm(x, dtype=torch.int32), TypeError, "dtype is torch.int32"),
    ],
)
def test_mistakes(call: Callable, error: type, message: str) -> None:
    with pytest.raises(error, match=message) as raised:
        call(random(2, 3))
    assert "\n" not in str(raised.value)


@checks.only_interpreted
@pytest.mark.parametrize("order", first_is_quick([0, 1, 2]))
def test_beyond_2_to_the_31_elements(order: int) -> None:
    columns = module.LARGEST
    # whole rounds of all programs, so that the last program has the last row
    rows = 1056 * (2**31 // columns // 1056 + 1)
    assert rows * columns > 2**31 and kernels.count_strips(rows, 1, 1) == 1056
    half = lambda *shape, seed: random(*shape, seed=seed, dtype=torch.float16)  # noqa: E731
    with checks.little_memory(), checks.last_program_alone():
        x, residual, gy, v = (torch.empty(rows, columns, dtype=torch.float16) for _ in range(4))
        for seed, t in enumerate((x, residual, gy, v)):
            t[-1] = half(columns, seed=seed)
        weight, bias, vw = (half(columns, seed=s) for s in (4, 5, 6))
        last = (x[-1:], residual[-1:], gy[-1:], v[-1:])
        x_, residual_, gy_, v_ = (t.double() for t in last)
        weight_, bias_, vw_ = (t.double() for t in (weight, bias, vw))
        if order == 0:
            ours = module._add_layer_norm(x, residual, weight, bias, 1e-5, torch.float16)
            right = reference.layer_norm(x_, weight_, bias_, residual=residual_)
        else:
            xs = checks.leaves([x_, weight_])
            (gy_,) = checks.leaves([gy_])
            y = reference.layer_norm(*xs)
            right = torch.autograd.grad(y, xs, gy_, create_graph=True)
            if order == 1:
                ours = module._layer_norm_bwd(gy, residual, x, weight, 1e-5, True)[:1]
                right = [right[0] + residual_]
            else:
                ours = module._layer_norm_bwd_bwd(v, vw, None, gy, x, weight, 1e-5, True)[:2]
                right = torch.autograd.grad(right, (gy_, xs[0]), (v_, vw_))
        ours = [t[-1:].double() for t in ours]
    for a, b in zip(ours, right, strict=True):
        assert checks.relative(a, b) < 2e-3
