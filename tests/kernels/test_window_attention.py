"""Tests of window_attention in three orders, with packed and separate inputs, bias and mask."""

import functools
import itertools
import sys
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from fastgn_kernels import reference, window_attention, window_attention_qkvpacked
from support import checks
from support.checks import DEVICE, LAYOUTS, random
from support.marks import first_is_quick
from torch import Tensor
from torch.testing import assert_close

# the attribute of the package with this name is the function, not the module
module = sys.modules["fastgn_kernels.window_attention"]
launch = sys.modules["fastgn_kernels.window_attention_launch"]
products = sys.modules["fastgn_kernels.window_attention_products"]

pytestmark = [
    # from NumPy, on the way to an expected NaN
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
]

NAN, INF = float("nan"), float("inf")

low_dtypes = pytest.mark.parametrize(
    "dtype",
    [
        torch.float32,
        torch.float16,
        torch.bfloat16,
    ],
    ids=str,
)
HALF = torch.float16 if checks.INTERPRETED else torch.bfloat16


@pytest.fixture(
    autouse=True, params=[None, 70] if checks.INTERPRETED or DEVICE == "cuda" else [None]
)
def card(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int | None:
    """Returns the compute capability that the op is told, or None if it is told the real one.

    So each test of a kernel runs once with the kernels for whole windows, and once with matrix
    products and a kernel between them.
    """
    if request.param:
        monkeypatch.setattr(module, "capability", lambda x: request.param)
    return request.param


def op(mask: Tensor | None = None, scale: float | None = None) -> Callable:
    """Returns the op as a function of (qkv) or (qkv, bias)."""
    return lambda qkv, bias=None: window_attention_qkvpacked(qkv, bias, mask, scale)


def twin(mask: Tensor | None = None, scale: float | None = None) -> Callable:
    """Returns the reference as a function of (qkv) or (qkv, bias)."""
    return lambda qkv, bias=None: reference.window_attention(*qkv.unbind(), bias, mask, scale)


def inputs(windows: int, heads: int, tokens: int, dim: int, biased: bool = True) -> list[Tensor]:
    qkv = random(3, windows, heads, tokens, dim)
    return [qkv, random(heads, tokens, tokens, seed=1)][: 1 + biased]


def masks(count: int, tokens: int) -> Tensor | None:
    """Returns masks that hide one in three pairs of tokens, or None for a count of 0.

    Every second mask uses Swin's -100, and the others -inf. A token always sees itself.
    """
    if not count:
        return None
    barred = random(count, tokens, tokens, seed=2) < -0.43
    barred &= ~torch.eye(tokens, dtype=torch.bool, device=DEVICE)
    values = torch.tensor([-INF, -100.0], dtype=torch.float64, device=DEVICE)
    values = values[torch.arange(count, device=DEVICE) % 2]
    return torch.where(barred, values[:, None, None], 0.0)


def aim_at(programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes launches aim at another number of programs."""
    choose_grid = functools.partial(launch.choose_grid, programs=programs)
    monkeypatch.setattr(launch, "choose_grid", choose_grid)
    monkeypatch.setattr(products, "PROGRAMS", programs)


@pytest.mark.parametrize("count, biased", [(0, False), (0, True), (2, False), (2, True)])
def test_derivatives(count: int, biased: bool) -> None:
    checks.check_derivatives(op(masks(count, 3)), inputs(4, 2, 3, 2, biased=biased))


@checks.interpreter(count=[2], biased=[True])
@checks.interpreter(shape=[(2, 3, 17, 16)])
@pytest.mark.parametrize("count, biased", [(0, False), (0, True), (2, False), (2, True)])
@pytest.mark.parametrize(
    "shape",
    [
        (2, 2, 49, 32),  # Swin's
        (2, 1, 49, 40),  # two blocks of channels, one of them in part
        (2, 3, 17, 16),
        (2, 1, 64, 64),
        pytest.param((6, 2, 5, 7), marks=pytest.mark.slow),
        (2, 1, 1, 1),
        (2, 1, 1, 8),
        (2, 1, 16, 33),
    ],
    ids=str,
)
def test_is_its_reference(shape: tuple[int, ...], count: int, biased: bool) -> None:
    mask = masks(count, shape[2])
    checks.check_against_reference(op(mask), twin(mask), inputs(*shape, biased=biased))


@checks.interpreter
def test_one_window() -> None:
    checks.check_against_reference(op(), twin(), inputs(1, 1, 64, 64))
    mask = masks(1, 6)
    checks.check_against_reference(op(mask), twin(mask), inputs(1, 2, 6, 4))


@checks.interpreter
@pytest.mark.parametrize(
    "count, windows, heads, programs, strips",
    first_is_quick(
        [(0, 5, 1, 3, 3), (2, 6, 1, 1, 2), (0, 5, 1, 1, 1), (1, 5, 1, 2, 2), (2, 10, 2, 8, 4)], 2
    ),
)
def test_several_windows_a_strip(
    count: int,
    windows: int,
    heads: int,
    programs: int,
    strips: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each window uses its own mask, and each adds to the gradient of the bias.

    This holds however the windows are divided, also if some programs have one window more.
    """
    aim_at(programs, monkeypatch)
    mask = masks(count, 5)
    xs = inputs(windows, heads, 5, 4)
    assert launch.choose_grid(xs[0], mask) == (heads, strips)
    checks.check_against_reference(op(mask), twin(mask), xs)


def test_there_are_no_more_strips_than_windows() -> None:
    for windows, heads, count in itertools.product((1, 3, 64, 4096), (1, 4, 32, 2000), (0, 1)):
        mask = masks(count, 1)
        grid = launch.choose_grid(torch.empty(3, windows, heads, 1, 1), mask)
        assert grid[0] == heads and 1 <= grid[1] <= windows
    assert launch.choose_grid(torch.empty(3, 4096, 4, 1, 1), masks(64, 1)) == (4, 256)


@checks.interpreter(scale=[-0.3])
@pytest.mark.parametrize("scale", [0.0, 1.0, -0.3])
def test_scale(scale: float) -> None:
    checks.check_against_reference(op(scale=scale), twin(scale=scale), inputs(2, 2, 5, 4))


def test_apart() -> None:
    """Queries, keys and values are three tensors."""
    q, k, v = (random(4, 2, 5, 3, seed=s) for s in range(3))
    mask = masks(2, 5)
    checks.check_against_reference(
        lambda *xs: window_attention(*xs, mask), lambda *xs: reference.window_attention(*xs, mask),
        [q, k, v, random(2, 5, 5, seed=3)],
    )  # fmt: skip
    assert_close(window_attention(q, k, v), F.scaled_dot_product_attention(q, k, v))
    assert_close(
        window_attention(q, k, v, scale=0.3), F.scaled_dot_product_attention(q, k, v, scale=0.3)
    )


@checks.interpreter
@pytest.mark.parametrize("biased", [False, True])
def test_no_windows(biased: bool) -> None:
    leaves = checks.leaves(inputs(0, 2, 5, 4, biased=biased))
    o = op(masks(2, 5))(*leaves)
    assert o.shape == (0, 2, 5, 4)
    gxs = torch.autograd.grad(o.sum(), leaves, create_graph=True)
    seconds = torch.autograd.grad(sum(g.square().sum() for g in gxs), leaves)
    for g in (gxs, seconds):
        assert g[0].shape == (3, 0, 2, 5, 4)
        assert not biased or torch.equal(g[1], torch.zeros_like(leaves[1]))


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes compiled code keep the custom op, as where its kernels run."""
    monkeypatch.setattr(module, "is_compiling", lambda: False)


@pytest.mark.parametrize("count, biased", [(0, False), (2, True)])
def test_compiled(count: int, biased: bool, kept: None) -> None:
    checks.check_compiled(op(masks(count, 3)), inputs(4, 2, 3, 4, biased=biased))


@pytest.mark.slow
def test_compiled_by_inductor(kept: None) -> None:
    checks.check_compiled(op(masks(2, 3)), inputs(4, 2, 3, 4), backend="inductor")


def compiled_operators() -> set[str]:
    backend, called = checks.recording_backend()
    checks.check_compiled(op(masks(2, 3)), inputs(4, 2, 3, 4), backend=backend)
    return called


def test_a_compiled_region_keeps_the_op(kept: None) -> None:
    """The graph holds none of the operators that the op consists of."""
    called = compiled_operators()
    for order in ("", "_bwd", "_bwd_bwd"):
        assert f"fastgn.window_attention{order}.default" in called, sorted(called)
    assert not any(name.startswith(("aten.bmm", "aten._softmax")) for name in called)


def test_a_compiled_region_keeps_no_op_without_kernels() -> None:
    assert not any("fastgn" in name for name in compiled_operators())


def test_what_is_asked_of_the_card_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """On CUDA, compiled code asks for the compute capability, which Dynamo must take as given."""
    from fastgn_kernels import dispatch

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))

    def asked(x: torch.Tensor) -> torch.Tensor:
        return x + 1 if dispatch._capability(0) >= 80 else x

    compiled = torch.compile(asked, fullgraph=True, backend="aot_eager")
    assert compiled(torch.zeros(1)).item() == 1


@checks.interpreter(count=[2], dtype=checks.NUMPY_DTYPES)
@low_dtypes
@pytest.mark.parametrize("count, biased", [(0, False), (2, True)])
def test_low_precision(count: int, biased: bool, dtype: torch.dtype) -> None:
    for shape, scale in (((4, 2, 49, 32), 1), ((4, 2, 49, 32), 3), ((2, 1, 20, 40), 1)):
        mask = masks(count, shape[2])
        qkv, *bias = inputs(*shape, biased=biased)
        checks.check_low_precision(op(mask), twin(mask), [scale * qkv, *bias], dtype)


@checks.interpreter(layout=["transposed"])
@pytest.mark.parametrize(
    "count, biased, layout",
    [
        (0, False, "contiguous"),
        (0, True, "contiguous"),
        (2, False, "contiguous"),
        *((2, True, layout) for layout in ("contiguous", "transposed", "unaligned")),
    ],
)
def test_opcheck(count: int, biased: bool, layout: str) -> None:
    place = LAYOUTS[layout]
    qkv, *bias = (place(x) for x in inputs(2, 1, 3, 4, biased=biased))
    go, vqkv = place(random(2, 1, 3, 4, seed=3)), place(random(*qkv.shape, seed=4))
    vbias = place(random(1, 3, 3, seed=5))
    rest = (bias[0] if biased else None, masks(count, 3), 0.5)
    grads = [t.clone().requires_grad_() if isinstance(t, Tensor) else t for t in (qkv, rest[0])]
    ops = torch.ops.fastgn
    check = functools.partial(checks.check_opcheck, traced=layout == "contiguous")
    check(ops.window_attention.default, (*grads, *rest[1:]))
    gos = go.clone().requires_grad_()
    more = vqkv.clone().requires_grad_()
    for weight_grads in {False, biased}:
        for added in (None, more):
            arguments = (gos, grads[0], None, added, grads[1], *rest[1:], weight_grads)
            check(ops.window_attention_bwd.default, arguments)
    for v in (None, vbias) if biased else (None,):
        arguments = (vqkv, v, go, qkv, *rest, biased and v is None)
        check(ops.window_attention_bwd_bwd.default, arguments)
    half = (vqkv.half(), vbias.float() if biased else None, go.half(), qkv.half())
    rest = (bias[0].float() if biased else None, *rest[1:])
    check(ops.window_attention_bwd_bwd.default, (*half, *rest, biased))


@pytest.mark.slow
@checks.interpreter(tokens=[3])
@pytest.mark.parametrize("tokens", [3, 16])
def test_layouts(tokens: int) -> None:
    """Arguments have different layouts. 16 tokens fill a tile without padding."""
    ways = list(LAYOUTS.values())
    shape = (2, 2, tokens, 4)
    for i in range(len(ways)):
        one, other, third = ways[i], ways[i - 1], ways[i - 2]
        lies = {
            "qkv": one(random(3, *shape)), "go": other(random(*shape, seed=1)),
            "vqkv": third(random(3, *shape, seed=2)), "mask": third(masks(2, tokens)),
            "bias": other(random(2, tokens, tokens, seed=3)),
            "vbias": one(random(2, tokens, tokens, seed=4)),
        }  # fmt: skip
        results = []
        for same in (lambda t: t, lambda t: t.clone(memory_format=torch.contiguous_format)):
            t = {name: same(x) for name, x in lies.items()}
            rest = (t["qkv"], t["bias"], t["mask"], 0.5)
            results.append([
                module._window_attention(*rest)[0],
                *module._window_attention_bwd(
                    t["go"], t["qkv"], None, t["vqkv"], *rest[1:], True
                ),
                *module._window_attention_bwd_bwd(t["vqkv"], t["vbias"], t["go"], *rest, True),
            ])  # fmt: skip
        assert_close(*results, rtol=1e-12, atol=1e-12, check_stride=False)


def test_the_last_backward_adds_what_the_second_derivative_left() -> None:
    """One kernel computes the gradient of qkv. No operator adds two gradients."""
    (qkv,) = checks.leaves([random(3, 2, 1, 3, 4)])
    y = module.window_attention_qkvpacked(qkv)
    (gx,) = torch.autograd.grad((y * y).sum(), qkv, create_graph=True)
    called = []

    class Record(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.fastgn.window_attention_bwd.default:
                called.append(args)
            return func(*args, **kwargs or {})

    with Record():
        torch.autograd.grad((gx * gx).sum() + y.sum(), qkv)
    ((_, _, stand_in, more, *_),) = called
    assert stand_in is None and more.shape == qkv.shape


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_against_the_reference(layout: str) -> None:
    mask = LAYOUTS[layout](masks(2, 3))
    xs = [LAYOUTS[layout](x) for x in inputs(4, 2, 3, 4)]
    checks.check_against_reference(op(mask), twin(mask), xs)


@checks.interpreter
def test_a_linear_layers_output_is_not_copied() -> None:
    """Gradients on their way to linear layers are not copied either, in any order."""
    windows, heads, tokens, dim = 4, 2, 3, 4
    linear = random(windows, tokens, 3 * heads * dim).requires_grad_()
    go = random(windows, tokens, heads * dim, seed=1).requires_grad_()
    bias = random(heads, tokens, tokens, seed=2)
    v = random(*linear.shape, seed=3)

    def three_orders() -> list[Tensor]:
        qkv = linear.unflatten(-1, (3, heads, dim)).permute(2, 0, 3, 1, 4)
        assert launch.pack(qkv).data_ptr() == linear.data_ptr()
        o = window_attention_qkvpacked(qkv, bias)
        flat = o.transpose(1, 2).flatten(2)
        assert flat.data_ptr() == o.data_ptr()
        assert launch.pack_output(o).data_ptr() == o.data_ptr()
        (g,) = torch.autograd.grad(flat, linear, go, create_graph=True)
        return [flat, g, *torch.autograd.grad(g, (go, linear), v)]

    results = three_orders()
    assert all(r.is_contiguous() for r in results)
    called = checks.ops_called(three_orders)
    assert {f"fastgn::window_attention{order}" for order in ("", "_bwd", "_bwd_bwd")} <= called
    assert not called & {"aten::clone", "aten::copy_", "aten::_to_copy", "aten::contiguous"}


@checks.interpreter
def test_a_query_that_may_see_nothing_is_nan_as_pytorchs() -> None:
    mask = torch.zeros(2, 3, 3, dtype=torch.float64, device=DEVICE)
    mask[0, 1] = -INF
    results = [checks.three_orders(f(mask), inputs(4, 1, 3, 2)) for f in (op, twin)]
    o = results[0]["y0"].isnan().any(-1)
    assert o[:, 0].tolist() == 2 * [[False, True, False], [False, False, False]]
    for name, theirs in results[1].items():
        assert torch.equal(results[0][name].isnan(), theirs.isnan()), name
        assert_close(results[0][name], theirs, equal_nan=True)


@checks.interpreter(dtype=[HALF], value=[NAN, -INF])
@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("where", ["q", "k", "v", "bias", "go", "vq"])
def test_infinities_and_nan_go_where_pytorchs_go(
    where: str, value: float, dtype: torch.dtype
) -> None:
    """Results are infinite or NaN exactly where PyTorch's are, so windows do not mix."""
    qkv, bias = (x.to(dtype) for x in inputs(3, 2, 5, 4))
    go, vqkv = random(3, 2, 5, 4, seed=3, dtype=dtype), random(3, 3, 2, 5, 4, seed=4, dtype=dtype)
    tensor, index = {
        "q": (qkv, (0, 1, 0, 2, 1)), "k": (qkv, (1, 1, 0, 2, 1)), "v": (qkv, (2, 1, 0, 2, 1)),
        "bias": (bias, (0, 2, 1)), "go": (go, (1, 0, 2, 1)), "vq": (vqkv, (0, 1, 0, 2, 1)),
    }[where]  # fmt: skip
    tensor[index] = value
    results = []
    for function in (op(), twin()):
        xs = checks.leaves([qkv, bias])
        (gy,) = checks.leaves([go])
        o = function(*xs)
        gxs = torch.autograd.grad(o, xs, gy, create_graph=True)
        seconds = torch.autograd.grad(gxs[0], (gy, *xs), vqkv)
        results.append([o, *gxs, *seconds])
    for i, (ours, theirs) in enumerate(zip(*results, strict=True)):
        assert torch.equal(ours.isfinite(), theirs.isfinite()), (i, ours, theirs)
    barred = where == "bias" and value == -INF
    assert barred == all(x.isfinite().all() for x in results[0])
    assert results[0][1].isfinite().any()


@checks.interpreter
def test_large_scores_do_not_overflow() -> None:
    """exp(90) overflows float32, and exp(12) overflows float16."""
    qkv, bias = inputs(2, 1, 5, 4)
    for dtype in (torch.float32, HALF):
        checks.check_low_precision(op(), twin(), [qkv, 300 * bias], dtype)


@pytest.mark.slow
@checks.interpreter(dtype=[torch.float16])
@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.float16, torch.bfloat16],
    ids=str,
)
def test_mixed_dtypes(dtype: torch.dtype) -> None:
    """The gradient of a float32 or float64 bias beside half-precision queries keeps its own dtype.

    It is right to the digits of float32. Rounding it to `dtype` would be an error of 5e-4 or more.
    With matrix products and a kernel between them, its error is that of `dtype`, because the
    matrices between products are rounded.
    """
    mask = masks(2, 7)
    qkv, bias = inputs(8, 2, 7, 5)
    qkv = qkv.to(dtype)
    go, vqkv = random(8, 2, 7, 5, seed=3, dtype=dtype), random(*qkv.shape, seed=4, dtype=dtype)
    vbias = random(*bias.shape, seed=5)
    for other in (torch.float32, torch.float64):
        results = []
        for wide in (False, True):
            to = (lambda x: x.double()) if wide else (lambda x: x)  # noqa: E731
            xs = checks.leaves([to(qkv), to(bias.float().to(other))])
            (gy,) = checks.leaves([to(go)])
            o = (twin if wide else op)(mask)(*xs)
            gxs = torch.autograd.grad(o, xs, gy, create_graph=True)
            vs = [to(vqkv), to(vbias.float().to(other))]
            results.append([o, *gxs, *torch.autograd.grad(gxs, (gy, *xs), vs)])
        ours, exact = results
        dtypes = [t.dtype for t in ours]
        assert dtypes == [dtype, dtype, other, dtype, dtype, other]
        for i, (a, b) in enumerate(zip(ours, exact, strict=True)):
            exact_sum = i in (2, 5) and module._choose_implementation(qkv) != "products"
            wanted = 2e-6 if exact_sum else max(torch.finfo(dtype).eps, 2e-6)
            assert checks.relative(a.double(), b) < wanted, i


def test_a_mask_of_any_floating_dtype() -> None:
    mask = masks(2, 5)
    qkv, bias = (x.float() for x in inputs(4, 2, 5, 4))
    right = op(mask)(qkv.double(), bias.double())
    for dtype in (torch.float16, torch.float32, torch.float64):
        o = op(mask.to(dtype))(qkv, bias)
        assert o.dtype == torch.float32
        assert checks.relative(o.double(), right) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
def test_autocast(dtype: torch.dtype) -> None:
    """The inputs are cast as those of F.scaled_dot_product_attention. The bias is not."""
    mask = masks(2, 5)
    qkv, bias = inputs(4, 2, 5, 4)

    def run(cast: torch.dtype) -> list[Tensor]:
        xs = checks.leaves([qkv.to(dtype), bias.float()])
        o = op(mask)(xs[0].to(cast), xs[1])
        gxs = torch.autograd.grad((o.double() ** 3).sum(), xs, create_graph=True)
        return [o, *gxs, *torch.autograd.grad(sum((g.double() ** 2).sum() for g in gxs), xs)]

    with torch.autocast(DEVICE, dtype=HALF):
        inside = run(dtype)
        theirs = F.scaled_dot_product_attention(*qkv.to(dtype)).dtype
    assert inside[0].dtype == theirs
    for a, b in zip(inside, run(theirs), strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)
    assert [t.dtype for t in inside[1:]] == 2 * [dtype, torch.float32]


def test_plain_bodies_compute_half_precision_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """The only error of each result is its last rounding."""
    monkeypatch.setattr(module, "_choose_implementation", lambda qkv: "plain")
    mask = masks(2, 20)
    half = [x.half() for x in inputs(4, 2, 20, 16)]
    named = checks.three_orders(op(mask), half, torch.float16)
    exact = checks.three_orders(twin(mask), [x.double() for x in half], torch.float16)
    for name, right in exact.items():
        error = (named[name].double() - right).abs()
        assert (error <= right.abs() * 2**-11 + 2e-6 * right.abs().max() + 2**-25).all(), name


@pytest.mark.parametrize("trained", ["qkv", "bias", "both"])
def test_frozen_inputs(trained: str) -> None:
    results = []
    for function in (op(masks(2, 3)), twin(masks(2, 3))):
        qkv, bias = inputs(4, 2, 3, 4)
        qkv.requires_grad_(trained != "bias")
        bias.requires_grad_(trained != "qkv")
        wanted = [x for x in (qkv, bias) if x.requires_grad]
        gxs = torch.autograd.grad((function(qkv, bias) ** 3).sum(), wanted, create_graph=True)
        seconds = torch.autograd.grad(sum((g**2).sum() for g in gxs), wanted)
        results.append([*gxs, *seconds])
    assert_close(*results, rtol=1e-9, atol=1e-9)
    assert not op()(*inputs(4, 2, 3, 4)).requires_grad


@checks.interpreter
@pytest.mark.parametrize("used", [0, 1])
def test_second_derivatives_of_one_gradient(used: int) -> None:
    """The loss uses only gqkv or only gbias, so the other's cotangent is undefined."""
    results = []
    for function in (op(masks(2, 3)), twin(masks(2, 3))):
        xs = checks.leaves(inputs(4, 2, 3, 4))
        gx = torch.autograd.grad((function(*xs) ** 3).sum(), xs, create_graph=True)[used]
        results.append([gx, *torch.autograd.grad((gx**2).sum(), xs)])
    assert_close(*results, rtol=1e-9, atol=1e-9)


def test_the_same_bits_in_every_run(monkeypatch: pytest.MonkeyPatch) -> None:
    if DEVICE == "cpu":  # on a GPU, the shape below gives several windows per strip anyway
        aim_at(8, monkeypatch)
    shape = (12, 2, 9, 8) if DEVICE == "cpu" else (4096, 4, 49, 32)
    mask = masks(2, shape[2])
    xs = [x.half() for x in inputs(*shape)]
    first, second = (checks.three_orders(op(mask), xs, torch.float16) for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda x, b: op()(x[0]), ValueError, r"qkv has shape \(2, 2, 3, 4\), should be \(3, B, H"),
        (lambda x, b: op()(x[:2]), ValueError, r"qkv has shape \(2, 2, 2, 3, 4\)"),
        (lambda x, b: op()(random(3, 1, 1, 65, 4)), ValueError, r"N = 65 .* D = 4 .* 1 to 64"),
        (lambda x, b: op()(random(3, 1, 1, 4, 65)), ValueError, r"N = 4 .* D = 65 .* 1 to 64"),
        (lambda x, b: op()(x[..., :0]), ValueError, r"N = 3 .* D = 0 .* 1 to 64"),
        (lambda x, b: op()(x[..., :0, :]), ValueError, r"N = 0 .* D = 4 .* 1 to 64"),
        (lambda x, b: op()(x, b[:1]), ValueError, r"bias has .*\(1, 3, 3\), should be \(2, 3, 3\)"),
        (lambda x, b: op()(x, b[None]), ValueError, r"bias has shape \(1, 2, 3, 3\), should be"),
        (lambda x, b: op(b[0])(x), ValueError, r"\(3, 3\), should be \(windows per image, 3, 3\)"),
        (lambda x, b: op(b[..., :2])(x), ValueError, r"mask has shape \(2, 3, 2\), should be"),
        (lambda x, b: op(b[:0])(x), ValueError, r"mask has shape \(0, 3, 3\), should be"),
        (lambda x, b: op(b.repeat(2, 1, 1)[:3])(x), ValueError, "windows, 2, should be .* 3 masks"),
        (lambda x, b: op(b.requires_grad_())(x), ValueError, "mask requires grad, but would"),
        (lambda x, b: op()(x.long()), TypeError, "qkv is torch.int64, should be"),
        (lambda x, b: op()(x, b.int()), TypeError, "bias is torch.int32, should be"),
        (lambda x, b: op(b > 0)(x), TypeError, "mask is torch.bool, should be"),
        (
            lambda x, b: window_attention(x[0], x[1], x[2, :1]),
            ValueError,
            r"q, k, v have shapes (\(2, 2, 3, 4\), ){2}\(1, 2, 3, 4\), should have one shape",
        ),
    ],
)  # fmt: skip
def test_mistakes(call: Callable, error: type, message: str) -> None:
    with pytest.raises(error, match=message) as raised:
        call(*inputs(2, 2, 3, 4))
    assert "\n" not in str(raised.value)


@checks.only_interpreted
@pytest.mark.parametrize("order", first_is_quick([0, 1, 2]))
def test_beyond_2_to_the_31_elements(
    order: int, card: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Queries, keys and values have more than 2^31 elements together."""
    if card == 70:
        pytest.skip("the products of so many windows take too long")
    tokens, dim = 64, 64
    programs = 1056 * 16  # more than on a GPU, so that the last has few windows to go through
    aim_at(programs, monkeypatch)
    # whole rounds of all programs, so that the last program has the last window
    windows = programs * (2**31 // (3 * tokens * dim) // programs + 1)
    assert 3 * windows * tokens * dim > 2**31
    place = functools.partial(torch.empty, dtype=torch.float16)
    with checks.little_memory(), checks.last_program_alone():
        qkv, vqkv = (place(windows, tokens, 3, 1, dim).permute(2, 0, 3, 1, 4) for _ in range(2))
        go = place(windows, tokens, 1, dim).transpose(1, 2)
        assert launch.choose_grid(qkv, None) == (1, programs)
        for seed, t in enumerate((qkv, vqkv)):
            t[:, -1] = random(3, 1, tokens, dim, seed=seed, dtype=torch.float16)
        go[-1] = random(1, tokens, dim, seed=3, dtype=torch.float16)
        bias = random(1, tokens, tokens, seed=4)
        qkv_, vqkv_, go_ = (t.double() for t in (qkv[:, -1:], vqkv[:, -1:], go[-1:]))
        xs = checks.leaves([qkv_, bias])
        (go_,) = checks.leaves([go_])
        right = [twin()(*xs)]
        if order:
            right = torch.autograd.grad(right, xs, go_, create_graph=True)
        if order == 0:
            ours = [module._window_attention(qkv, bias, None, 0.125)[0]]
        elif order == 1:
            ours = module._window_attention_bwd(go, qkv, None, None, bias, None, 0.125, True)
        else:
            rest = (go, qkv, bias, None, 0.125, True)
            ours = module._window_attention_bwd_bwd(vqkv, None, *rest)
            right = torch.autograd.grad(right[0], (go_, *xs), vqkv_)
        ours = [t if t.ndim == 3 else t[:, -1:] if t.ndim == 5 else t[-1:] for t in ours]
        for a, b in zip(ours, right, strict=True):
            assert checks.relative(a.double(), b) < 2e-3


@checks.only_interpreted
@pytest.mark.parametrize("card", [70], indirect=True)
@pytest.mark.parametrize("order", first_is_quick([2, 1, 0]))
def test_matrices_between_products_beyond_2_to_the_31_elements(
    order: int, card: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel changes the last window's matrices as it changes those of a window alone."""
    tokens, windows = 64, 2**19 + 2
    aim_at(windows // 2, monkeypatch)
    layout = (2, tokens) if order == 2 else (tokens,)
    with checks.little_memory(), checks.last_program_alone():
        qkv = torch.empty(1, dtype=torch.float16).expand(3, windows, 1, tokens, 4)
        matrices = [torch.empty(windows, tokens, *layout, dtype=torch.float16) for _ in range(2)]
        alone = [random(1, tokens, *layout, seed=s, dtype=torch.float16) for s in range(2)]
        for all_windows, one in zip(matrices, alone, strict=True):
            all_windows[-1] = one[0]
        assert matrices[0].numel() > 2**31
        for case, xs in ((qkv, matrices), (qkv[:, :1], alone)):
            products.launch_between_products(case, None, None, *xs, order)
        for all_windows, one in zip(matrices, alone, strict=True):
            assert torch.equal(all_windows[-1, -16:], one[0, -16:])  # the last program's rows
        before = random(1, tokens, *layout, seed=0, dtype=torch.float16)
        assert not torch.equal(alone[0][0, -16:], before[0, -16:])
