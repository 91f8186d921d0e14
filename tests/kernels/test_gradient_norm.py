"""Tests of the norms of a gradient in three orders, and of gradnorm's loss with them."""

import sys

import pytest
import torch
import torch.nn.functional as F
from fastgn_kernels import cross_entropy, gradient_norm, reference
from support.checks import (
    DEVICE,
    LAYOUTS,
    NUMPY_DTYPES,
    check_against_reference,
    check_compiled,
    check_derivatives,
    check_low_precision,
    check_opcheck,
    interpreter,
    last_program_alone,
    leaves,
    little_memory,
    only_interpreted,
    ops_called,
    random,
    relative,
)
from torch import nn

from fastgn import objectives

# the attribute of the package with this name is the function, not the module
module = sys.modules["fastgn_kernels.gradient_norm"]

LAYOUTS = LAYOUTS | {
    "channels_last": lambda x: x.to(memory_format=torch.channels_last),
    "batch_inside": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
}
orders = pytest.mark.parametrize("ord", [1, 2])


def eager(g: torch.Tensor, ord: int) -> torch.Tensor:
    """Returns the norm that PyTorch computes, in the dtype of the gradient."""
    return g.flatten(1).abs().sum(1) if ord == 1 else torch.linalg.vector_norm(g.flatten(1), dim=1)


@interpreter
@orders
def test_derivatives(ord):
    check_derivatives(lambda g: gradient_norm(g, ord), [random(3, 2, 3)])


@interpreter
@orders
@pytest.mark.parametrize("shape", [(3, 5, 7), (1, 2), (2, 1025), (2, 3, 40, 40), (700, 2)])
def test_is_the_reference_and_pytorchs(ord, shape):
    inputs = [random(*shape)]
    check_against_reference(
        lambda g: gradient_norm(g, ord), lambda g: reference.gradient_norm(g, ord), inputs
    )
    check_against_reference(lambda g: gradient_norm(g, ord), lambda g: eager(g, ord), inputs)


@interpreter
@orders
@pytest.mark.parametrize("shape", [(5,), (1,), (1, 1), (3, 1, 1)])
def test_samples_of_one_element(ord, shape):
    """Both norms are abs(g) here, and their second derivative is 0 up to rounding.

    So this test cannot use errors relative to the result.
    """
    g, n = leaves([random(*shape), random(shape[0], seed=1)])
    norm = gradient_norm(g, ord)
    (gx,) = torch.autograd.grad(norm, g, n, create_graph=True)
    v = random(*shape, seed=2)
    gn, second = torch.autograd.grad(gx, (n, g), v, materialize_grads=True)
    sign, flat = g.detach().sign(), g.detach().reshape(-1)
    expected = [flat.abs(), n.view(shape[0], *[1] * (len(shape) - 1)) * sign, (v * sign).view(-1)]
    torch.testing.assert_close([norm, gx, gn], expected, rtol=1e-14, atol=0)
    torch.testing.assert_close(second, torch.zeros_like(g), rtol=0, atol=1e-14)


@interpreter
@orders
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(ord, layout):
    check_against_reference(
        lambda g: gradient_norm(g, ord),
        lambda g: reference.gradient_norm(g, ord),
        [LAYOUTS[layout](random(4, 3, 5, 6))],
    )


@interpreter
@orders
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "unaligned"])
def test_samples_in_one_block_are_not_copied(ord, layout):
    g = LAYOUTS[layout](random(4, 3, 5, 6))
    assert module._with_samples_in_blocks(g) is g
    (g,) = leaves([g])
    (gx,) = torch.autograd.grad(gradient_norm(g, ord).sum(), g)
    assert gx.stride() == g.stride()


@interpreter
@orders
@pytest.mark.parametrize("shape", [(0, 3, 2), (0,), (3, 0)])
def test_empty(ord, shape):
    (g,) = leaves([random(*shape)])
    norm = gradient_norm(g, ord)
    assert norm.shape == shape[:1] and norm.tolist() == [0.0] * shape[0]
    (gx,) = torch.autograd.grad(norm.sum(), g)
    assert gx.shape == shape


@interpreter(dtype=NUMPY_DTYPES)
@orders
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_low_precision(ord, dtype):
    # rounded to the gradient's dtype at last, as eager's is: the check asks for one dtype
    check_low_precision(
        lambda g: gradient_norm(g, ord).to(g.dtype),
        lambda g: eager(g, ord),
        [random(5, 3, 20, 20)],
        dtype,
    )


@interpreter(dtype=NUMPY_DTYPES)
@orders
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_float32(ord, dtype):
    """For 4096 elements of 300, the squares and both sums overflow float16."""
    (g,) = leaves([torch.full((2, 4096), 300.0, dtype=dtype, device=DEVICE)])
    norm = gradient_norm(g, ord)
    assert norm.dtype == torch.float32
    value = float(g.detach()[0, 0])
    assert norm.tolist() == pytest.approx([value * (4096 if ord == 1 else 64)] * 2, rel=1e-6)
    (gx,) = torch.autograd.grad(norm.sum(), g)
    assert gx.dtype == dtype and gx[0, 0].item() == (1.0 if ord == 1 else 1 / 64)


@interpreter
@orders
def test_at_zero(ord):
    """At 0, both orders are 0. The other sample of the batch is as if it were alone."""
    g = random(2, 4, 5)
    g[0] = 0
    g[1, 0, 0] = 0
    for f in (gradient_norm, reference.gradient_norm):
        (x,) = leaves([g])
        n = leaves([random(2, seed=3)])[0]
        (gx,) = torch.autograd.grad(f(x, ord), x, n, create_graph=True)
        v = random(*g.shape, seed=4)
        gn, second = torch.autograd.grad(gx, (n, x), v, materialize_grads=True)
        assert gx[0].count_nonzero() == 0 and second[0].count_nonzero() == 0 and gn[0] == 0
        assert gn[1] != 0 and gx[1, 0, 0] == 0
        (alone,) = leaves([g[1:]])
        (right,) = torch.autograd.grad(eager(alone, ord), alone, n[1:], create_graph=True)
        assert relative(gx[1:].detach(), right.detach()) < 1e-14
        if ord == 2:
            (right,) = torch.autograd.grad(right, alone, v[1:])
            assert relative(second[1:], right) < 1e-14


@interpreter
@orders
@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan")])
def test_infinities_and_nan_are_pytorchs(ord, value):
    g = random(3, 7, dtype=torch.float32)
    g[1, 2] = value
    ours, theirs = [], []
    for f, to in ((gradient_norm, ours), (eager, theirs)):
        (x,) = leaves([g])
        norm = f(x, ord)
        to += [norm, *torch.autograd.grad(norm.sum(), x)]
    torch.testing.assert_close(ours, theirs, equal_nan=True)
    assert not ours[0][1].isfinite() and ours[1][[0, 2]].isfinite().all()


@interpreter(dtype=[torch.float64], layout=["batch_inside"])
@orders
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced", "batch_inside"])
def test_opcheck(ord, dtype, layout):
    place, ops = LAYOUTS[layout], torch.ops.fastgn
    g, v = (place(random(2, 3, 2, 3, seed=seed, dtype=dtype)) for seed in (0, 1))
    n = random(2, seed=2).to(torch.float64 if dtype == torch.float64 else torch.float32)
    norm = reference.gradient_norm(g, 2) if ord == 2 else None
    traced = layout == "contiguous"
    check_opcheck(ops.gradient_norm_bwd_bwd.default, (v, n, g, norm, ord), traced)
    g, n = leaves([g, n])
    check_opcheck(ops.gradient_norm.default, (g, ord), traced)
    check_opcheck(ops.gradient_norm_bwd.default, (n, g, norm, ord), traced)


@pytest.mark.parametrize("opaque", [False, True])
@orders
def test_compiled_is_eager(ord, opaque, monkeypatch):
    """Tests compiled code with PyTorch's operators, its default, and with the custom ops."""
    if opaque:
        monkeypatch.setattr(module, "is_compiling", lambda: False)
    # of the square: the L1 norm alone has no second derivative that a penalty could leave
    check_compiled(lambda x: gradient_norm(x * x, ord), [random(3, 2, 4)])


@orders
def test_autocast_changes_nothing(ord):
    g = random(3, 50, dtype=torch.float32)

    def run():
        x, n = leaves([g, random(3, dtype=torch.float32)])
        norm = gradient_norm(x, ord)
        (gx,) = torch.autograd.grad(norm, x, n, create_graph=True)
        return [norm, gx, *torch.autograd.grad((gx * gx * gx).sum(), n)]

    plain = run()
    with torch.autocast(DEVICE, torch.bfloat16):
        torch.testing.assert_close(run(), plain, rtol=0, atol=0)


@orders
def test_the_same_bits_in_every_run(ord):
    g = random(2, 3, 50, 50, dtype=torch.float32)
    assert torch.equal(gradient_norm(g, ord), gradient_norm(g.clone(), ord))


@only_interpreted
@orders
def test_offsets_beyond_32_bits(ord):
    """Tests a batch of more than 2^31 elements."""
    rows, columns = 2**21 + 8, 1024
    with little_memory():
        g, v = (torch.empty(rows, columns, dtype=torch.float16) for _ in range(2))
        g[-1], v[-1] = random(columns), random(columns, seed=1)
        n = torch.full((), 2.0).expand(rows)
        norm = torch.ones(rows) if ord == 2 else None
        if ord == 2:
            norm[-1] = g[-1].float().norm()
        with last_program_alone():
            sums = torch.ops.fastgn.gradient_norm(g, ord)
            gx = torch.ops.fastgn.gradient_norm_bwd(n, g, norm, ord)
            gn, second = torch.ops.fastgn.gradient_norm_bwd_bwd(v, n, g, norm, ord)
        ours = [x[-1:].double() for x in (sums, gx, gn, second)]
    one = g[-1:].double()
    exact = norm[-1:].double() if ord == 2 else None
    right = [
        module._run_plain(0, one, ord)[0],
        module._run_plain(1, one, ord, n[-1:].double(), exact)[1],
    ]
    right += module._run_plain(2, one, ord, n[-1:].double(), exact, v[-1:].double())
    for a, b in zip(ours, right, strict=True):
        assert relative(a, b) < 1e-3


@only_interpreted
def test_offsets_beyond_32_bits_in_one_sample():
    """Tests the last of 65535 programs, whose 33rd tile lies beyond 2^31 elements."""
    tiles = 2**21 + 65535
    at = (65534 + 65535 * 32) * 1024
    assert at > 2**31
    with little_memory():
        g = torch.empty(1, tiles * 1024, dtype=torch.float16)
        g[0, at : at + 3] = torch.tensor([1.0, -2.0, 0.0])
        n = torch.full((1,), 3.0)
        with last_program_alone():
            gx = torch.ops.fastgn.gradient_norm_bwd(n, g, None, 1)
        assert gx[0, at : at + 3].tolist() == [3.0, -3.0, 0.0]


def test_mistakes():
    with pytest.raises(ValueError, match=r"ord 3 should be 1 or 2") as raised:
        gradient_norm(random(2, 3), 3)
    assert "\n" not in str(raised.value)
    with pytest.raises(ValueError, match=r"grad has shape \(\), should be \(B, ...\)"):
        gradient_norm(random())
    with pytest.raises(TypeError, match="grad is torch.int64"):
        gradient_norm(random(2, 3).long())


def gradnorm(model, images, targets, *, ce_weight=0.8, gn_weight=1.2, eps=4 / 255, sigma=0.225):
    """Returns the loss of fastgn.objectives.gradnorm, computed with both fused ops."""
    images = images.detach().requires_grad_()
    ce = cross_entropy(model(images), targets)
    (grad,) = torch.autograd.grad(ce, images, create_graph=True)
    grad_l1 = gradient_norm(grad).sum()
    return ce_weight * ce + gn_weight * (eps / sigma) * grad_l1


@pytest.mark.parametrize("kind", ["index", "soft"])
def test_gradnorm_with_these_ops_is_the_plain_one(kind):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.GELU(), nn.Flatten(), nn.Linear(4 * 16, 6), nn.GELU()
    ).to(DEVICE, torch.float64)
    images = random(5, 3, 6, 6).to(memory_format=torch.channels_last)
    targets = torch.tensor([0, 5, 2, 2, 1], device=DEVICE)
    if kind == "soft":
        targets = 0.9 * F.one_hot(targets, 6).double() + 0.1 / 6
    parameters = list(model.parameters())
    called = ops_called(gradnorm, model, images, targets)
    assert {"fastgn::cross_entropy_bwd", "fastgn::gradient_norm"} <= called
    fused = gradnorm(model, images, targets)
    plain = objectives.gradnorm(model, images, targets).total
    without = torch.autograd.grad(0.8 * cross_entropy(model(images), targets), parameters)
    ours = torch.autograd.grad(fused, parameters)
    theirs = torch.autograd.grad(plain, parameters)
    torch.testing.assert_close(fused, plain, rtol=1e-12, atol=0)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-14)
    assert relative(without[0], theirs[0]) > 1e-2, "the penalty left no trace in the gradient"
