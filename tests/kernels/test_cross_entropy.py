"""Tests of cross-entropy in three orders, with class indices and with probabilities."""

import sys

import pytest
import torch
import torch.nn.functional as F
from fastgn_kernels import cross_entropy, reference
from fastgn_kernels.dispatch import INTERPRETED
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
    random,
    relative,
)

# the attribute of the package with this name is the function, not the module
module = sys.modules["fastgn_kernels.cross_entropy"]

# the interpreter's NumPy on the padding's -inf minus -inf
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")

KINDS = ["index", "soft"]
SHAPES = [(5, 7), (1, 1), (1, 10), (3, 1), (70, 10), (2, 1000), (3, 1025)]
only_plain_on_cpu = pytest.mark.skipif(
    INTERPRETED or DEVICE != "cpu", reason="the plain body on a CPU alone may look at its targets"
)
only_triton = pytest.mark.skipif(
    not INTERPRETED and DEVICE == "cpu", reason="needs a GPU or TRITON_INTERPRET=1"
)


def make_targets(kind: str, rows: int, columns: int, dtype=torch.float64) -> torch.Tensor:
    """Returns class indices, or probabilities that do not sum to 1 and are partly 0."""
    if kind == "index":
        return (random(rows, seed=7).abs() * 1e6).long() % columns
    return random(rows, columns, seed=7).clamp_min(0).to(dtype)


@interpreter(reduction=["none"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_derivatives(kind, reduction):
    targets = make_targets(kind, 4, 5)
    check_derivatives(lambda z: cross_entropy(z, targets, reduction), [random(4, 5)])


@interpreter(reduction=["none"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("shape", SHAPES)
def test_is_the_reference(kind, reduction, shape):
    targets = make_targets(kind, *shape)
    check_against_reference(
        lambda z: cross_entropy(z, targets, reduction),
        lambda z: reference.cross_entropy(z, targets, reduction),
        [random(*shape)],
    )


@interpreter(kind=["soft"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(kind, layout):
    place = LAYOUTS[layout]
    targets = place(make_targets(kind, 4, 6))
    check_against_reference(
        lambda z: cross_entropy(z, targets, "none"),
        lambda z: reference.cross_entropy(z, targets, "none"),
        [place(random(4, 6))],
    )


@interpreter
@pytest.mark.parametrize("kind", KINDS)
def test_empty_batch(kind):
    z = random(0, 5).requires_grad_()
    targets = make_targets(kind, 0, 5)
    loss = cross_entropy(z, targets, "none")
    assert loss.shape == (0,)
    (gz,) = torch.autograd.grad(loss.sum(), z, create_graph=True)
    (second,) = torch.autograd.grad(gz.square().sum(), z)
    assert gz.shape == second.shape == (0, 5)
    assert cross_entropy(z, targets).isnan() and reference.cross_entropy(z, targets).isnan()


@interpreter(dtype=NUMPY_DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_low_precision(kind, dtype):
    targets = make_targets(kind, 20, 100, dtype)

    def eager(z):
        t = targets if kind == "index" else targets.to(z.dtype)
        return F.cross_entropy(z, t, reduction="none")

    # rounded to the logits' dtype at last, as eager's is: the check asks for one dtype throughout
    check_low_precision(
        lambda z: cross_entropy(z, targets, "none").to(z.dtype), eager, [3 * random(20, 100)], dtype
    )


@interpreter(dtype=NUMPY_DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_half_precision_loss_keeps_the_digits_of_float32(kind, dtype):
    z, targets = 3 * random(20, 100, dtype=dtype), make_targets(kind, 20, 100)
    loss = cross_entropy(z, targets, "none")
    assert loss.dtype == torch.float32
    assert (
        relative(loss.detach().double(), reference.cross_entropy(z.double(), targets, "none"))
        < 1e-6
    )


@interpreter
def test_a_common_offset_costs_no_digits():
    z = random(8, 50, dtype=torch.float32)
    z = (z * 64).round() / 64 + 4096.0  # exact in float32, so that the offset alone is tested
    targets = make_targets("index", 8, 50)
    exact = F.cross_entropy(z.double(), targets, reduction="none")
    assert relative(cross_entropy(z, targets, "none").double(), exact) < 1e-6


@interpreter
@pytest.mark.parametrize(
    ("logits", "targets"),
    [
        (torch.float16, torch.float32),
        (torch.float32, torch.float16),
        (torch.float32, torch.float64),
        (torch.float64, torch.float32),
    ],
)
def test_mixed_dtypes(logits, targets):
    t = make_targets("soft", 6, 9, targets)
    (z,) = leaves([random(6, 9, dtype=logits)])
    loss = cross_entropy(z, t)
    assert loss.dtype == (torch.float64 if logits == torch.float64 else torch.float32)
    (gz,) = torch.autograd.grad(loss, z, create_graph=True)
    (second,) = torch.autograd.grad(gz.float().square().sum(), z)
    assert gz.dtype == second.dtype == logits
    right = F.cross_entropy(z.detach().double(), t.double())
    assert relative(loss.detach().double(), right) < (1e-14 if logits == torch.float64 else 1e-6)


@interpreter
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan")])
def test_infinities_and_nan_are_pytorchs(kind, value):
    """Row 0 has the value at its target, row 1 elsewhere, row 2 everywhere, row 3 nowhere."""
    z = random(4, 5, dtype=torch.float32)
    z[0, 1] = z[1, 2] = value
    z[2] = value
    targets = torch.ones(4, dtype=torch.int64, device=DEVICE)
    if kind == "soft":
        targets = F.one_hot(targets, 5).float()
    ours, theirs = [], []
    for f, to in ((cross_entropy, ours), (F.cross_entropy, theirs)):
        (x,) = leaves([z])
        loss = f(x, targets, reduction="none")
        to += [loss, *torch.autograd.grad(loss.sum(), x)]
    torch.testing.assert_close(ours, theirs, equal_nan=True)
    assert ours[1][3].isfinite().all() and not ours[0][2].isfinite()


@interpreter(kind=["soft"])
@pytest.mark.parametrize("kind", KINDS)
def test_opcheck(kind):
    z, targets, gl, v = random(4, 5), make_targets(kind, 4, 5), random(4), random(4, 5, seed=2)
    ops = torch.ops.fastgn
    for place in (lambda x: x, LAYOUTS["transposed"]):
        x = place(z.clone()).requires_grad_()
        check_opcheck(ops.cross_entropy.default, (x, targets))
        check_opcheck(ops.cross_entropy_bwd.default, (gl.clone().requires_grad_(), x, targets))
        check_opcheck(ops.cross_entropy_bwd_bwd.default, (place(v), gl, place(z), targets))
        half = place(z.half())
        check_opcheck(
            ops.cross_entropy_bwd_bwd.default, (place(v.half()), gl.float(), half, targets)
        )


@pytest.mark.parametrize("opaque", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_compiled_is_eager(kind, opaque, monkeypatch):
    """Tests compiled code with PyTorch's operators, its default, and with the custom ops."""
    if opaque:
        monkeypatch.setattr(module, "is_compiling", lambda: False)
    targets = make_targets(kind, 4, 5)
    check_compiled(lambda z: cross_entropy(z, targets, "none"), [random(4, 5)])


def test_autocast_changes_nothing():
    z, targets = random(6, 9, dtype=torch.float32), make_targets("soft", 6, 9, torch.float32)

    def run():
        (x,) = leaves([z])
        loss = cross_entropy(x, targets)
        (gz,) = torch.autograd.grad(loss, x, create_graph=True)
        return [loss, gz, *torch.autograd.grad(gz.square().sum(), x)]

    plain = run()
    with torch.autocast(DEVICE, torch.bfloat16):
        torch.testing.assert_close(run(), plain, rtol=0, atol=0)


@only_plain_on_cpu
@pytest.mark.parametrize("wrong", [-100, -1, 5])
def test_an_index_out_of_range_raises_on_a_cpu(wrong):
    targets = torch.tensor([0, wrong, 4])
    with pytest.raises(ValueError, match=rf"target {wrong} should be in 0\.\.4"):
        cross_entropy(random(3, 5), targets)
    with pytest.raises(IndexError, match=str(wrong)):
        reference.cross_entropy(random(3, 5), targets)


@interpreter(fits=[True])
@only_triton
@pytest.mark.parametrize("wrong", [-100, -1, 5])
@pytest.mark.parametrize("fits", [True, False])
def test_an_index_out_of_range_is_nan_on_a_gpu(wrong, fits, monkeypatch):
    if not fits:
        monkeypatch.setattr(module, "LARGEST_ROW", 0)
    targets = torch.tensor([0, wrong, 4], device=DEVICE)
    (z,) = leaves([random(3, 5)])
    loss = cross_entropy(z, targets, "none")
    (gz,) = torch.autograd.grad(loss.sum(), z, create_graph=True)
    (second,) = torch.autograd.grad(gz.square().sum(), z)
    for x in (loss, gz.sum(1), second.sum(1)):
        assert x.isnan().tolist() == [False, True, False]


@interpreter(kind=["index"])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_beyond_the_largest_take_the_plain_body(kind, monkeypatch):
    def never(*_):
        raise AssertionError("the Triton body was called")

    monkeypatch.setattr(module, "_run_kernel", never)
    targets = make_targets(kind, 2, 16385)
    check_against_reference(
        lambda z: cross_entropy(z, targets, "none"),
        lambda z: reference.cross_entropy(z, targets, "none"),
        [random(2, 16385)],
    )


@only_interpreted
def test_offsets_beyond_32_bits():
    rows, columns = 2**21 + 8, 1024
    with little_memory():
        z = torch.empty(rows, columns, dtype=torch.float16)
        v = torch.empty(rows, columns, dtype=torch.float16)
        targets = torch.zeros(rows, dtype=torch.int64)
        z[-1], v[-1], targets[-1] = random(columns), random(columns, seed=1), 1023
        one = torch.ones((), dtype=torch.float32).expand(rows)
        with last_program_alone():
            loss = torch.ops.fastgn.cross_entropy(z, targets)
            gz = torch.ops.fastgn.cross_entropy_bwd(one, z, targets)
            ggl, second = torch.ops.fastgn.cross_entropy_bwd_bwd(v, one, z, targets)
        last = [x[-1:].double() for x in (loss, gz, ggl, second)]
    right = module._run_plain(0, z[-1:].double(), targets[-1:])[:1]
    right += module._run_plain(1, z[-1:].double(), targets[-1:], one[-1:].double())[1:]
    right += module._run_plain(2, z[-1:].double(), targets[-1:], one[-1:].double(), v[-1:].double())
    for a, b in zip(last, right, strict=True):
        assert relative(a, b) < 1e-3


@pytest.mark.parametrize(
    ("logits", "targets", "reduction", "error", "says"),
    [
        ((2, 3, 4), (2,), "mean", ValueError, r"logits has shape \(2, 3, 4\), should be \(B, K\)"),
        (
            (2, 0),
            (2,),
            "mean",
            ValueError,
            r"logits has shape \(2, 0\), should be \(B, K\) with K > 0",
        ),
        (
            (2, 3),
            (4,),
            "mean",
            ValueError,
            r"targets of torch.int64 has shape \(4,\), should be \(2,\)",
        ),
        ((2, 3), (2, 4), "mean", ValueError, r"has shape \(2, 4\), should be \(2, 3\)"),
        ((2, 3), (2,), "max", ValueError, r"reduction 'max' should be none, mean or sum"),
    ],
)
def test_mistakes_of_shape(logits, targets, reduction, error, says):
    t = random(*targets) if len(targets) == 2 else torch.zeros(targets, dtype=torch.int64)
    with pytest.raises(error, match=says) as raised:
        cross_entropy(random(*logits), t.to(DEVICE), reduction)
    assert "\n" not in str(raised.value)


def test_mistakes_of_kind():
    z, index = random(2, 3), torch.zeros(2, dtype=torch.int64, device=DEVICE)
    with pytest.raises(TypeError, match="targets is torch.int32"):
        cross_entropy(z, index.int())
    with pytest.raises(TypeError, match="logits is torch.int64"):
        cross_entropy(z.long(), index)
    with pytest.raises(ValueError, match="targets requires grad"):
        cross_entropy(z, random(2, 3).requires_grad_())
    with pytest.raises(ValueError, match="targets is on meta, should be on"):
        cross_entropy(z, index.to("meta"))
