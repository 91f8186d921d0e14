"""Tests of forward mode, torch.func, and derivatives of third and higher order, for every op.

In these modes an op calls fastgn_kernels.reference. So the tests compare it with formulas that
share no code with the reference. All inputs of an op are parts of one vector, so that each test
covers the derivatives with respect to all of them, and the mixed ones.
"""

import contextlib
import functools
import math
import sys
import warnings
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import fastgn_kernels
import pytest
import torch
from fastgn_kernels import ACTIVATIONS, dispatch, reference
from support import checks, independent
from support.checks import DEVICE, random, relative, tensors, wave
from torch import Tensor
from torch.autograd import forward_ad, functional

pytestmark = [
    pytest.mark.filterwarnings("ignore:fastgn_kernels.* has kernels for two:UserWarning"),
    # of PyTorch, from torch.func.linearize and batched gradients
    pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning"),
    pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node:UserWarning"),
]


class Case(NamedTuple):
    """A call of an op with the inputs that are differentiated."""

    call: Callable[..., Any]
    """Takes fastgn_kernels, its reference or `independent`, and then the inputs."""
    shapes: list[tuple[int, ...]]
    """Shape of each input."""


def attention(f: Any, qkv: Tensor, bias: Tensor | None = None, **options: Any) -> Tensor:
    """Calls window attention, packed where the module `f` has such a function."""
    if hasattr(f, "window_attention_qkvpacked"):
        return f.window_attention_qkvpacked(qkv, bias, **options)
    return f.window_attention(*qkv.unbind(), bias, **options)


CLASSES = torch.tensor([3, 0], device=DEVICE)
SOFT = random(2, 4, seed=5).abs()
MASKS = random(2, 2, 2, seed=6)
PARAMETERS = {"softplus": 2.0, "elu": 0.5, "leaky_relu": 0.2}
QKV = (3, 2, 1, 2, 2)

QUICK = {
    "gelu": Case(lambda f, x: f.activation(x, "gelu"), [(2, 3)]),
    "mish, bias": Case(lambda f, x, b: f.activation(x, "mish", b), [(2, 3), (3,)]),
    "layer_norm": Case(lambda f, *xs: f.layer_norm(*xs), [(2, 3), (3,), (3,)]),
    "cross_entropy": Case(lambda f, z: f.cross_entropy(z, CLASSES), [(2, 4)]),
    "gradient_norm, 2": Case(lambda f, g: f.gradient_norm(g, 2), [(2, 3)]),
    "window_attention": Case(
        lambda f, *xs: attention(f, *xs, mask=MASKS, scale=0.8), [QKV, (1, 2, 2)]
    ),
}
"""Name -> a case of each op, and of each way in which its inputs are connected."""

SLOW = {
    **{
        kind: Case(lambda f, x, kind=kind: f.activation(x, kind), [(2, 3)])
        for kind in ACTIVATIONS
        if kind != "gelu"
    },
    **{
        f"{kind}, {parameter}": Case(
            lambda f, x, kind=kind, p=parameter: f.activation(x, kind, parameter=p), [(2, 3)]
        )
        for kind, parameter in PARAMETERS.items()
    },
    "gelu, bias": Case(lambda f, x, b: f.activation(x, "gelu", b), [(2, 3), (3,)]),
    "layer_norm, bare": Case(lambda f, x: f.layer_norm(x), [(2, 3)]),
    "layer_norm, weight": Case(lambda f, x, w: f.layer_norm(x, w), [(2, 3), (3,)]),
    "layer_norm, no weight": Case(lambda f, x, b: f.layer_norm(x, None, b), [(2, 3), (3,)]),
    "layer_norm, residual": Case(
        lambda f, x, r, *xs: f.layer_norm(x, *xs, residual=r), [(2, 3), (2, 3), (3,), (3,)]
    ),
    "layer_norm, dtype": Case(
        lambda f, x, *xs: f.layer_norm(x, *xs, eps=0.1, dtype=torch.float64), [(2, 3), (3,), (3,)]
    ),
    "cross_entropy, none": Case(lambda f, z: f.cross_entropy(z, CLASSES, "none"), [(2, 4)]),
    "cross_entropy, sum": Case(lambda f, z: f.cross_entropy(z, CLASSES, "sum"), [(2, 4)]),
    "cross_entropy, soft": Case(lambda f, z: f.cross_entropy(z, SOFT), [(2, 4)]),
    "cross_entropy, soft, none": Case(lambda f, z: f.cross_entropy(z, SOFT, "none"), [(2, 4)]),
    "gradient_norm, 1": Case(lambda f, g: f.gradient_norm(g), [(2, 3)]),
    "window_attention, no bias": Case(attention, [QKV]),
    "window_attention, apart": Case(
        lambda f, *xs: f.window_attention(*xs), [(2, 1, 2, 2)] * 3 + [(1, 2, 2)]
    ),
}
"""Name -> the other options of each op."""

CASES = QUICK | SLOW

quick_cases = pytest.mark.parametrize("name", QUICK)
every_case = pytest.mark.parametrize(
    "name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]
)


def start(name: str, count: int = 1) -> Tensor:
    """Returns the inputs of a case as one vector, or `count` such vectors as rows."""
    total = sum(math.prod(shape) for shape in CASES[name].shapes)
    return random(count, total, seed=7) if count > 1 else random(total, seed=7)


def of_vector(name: str, f: Any) -> Callable[[Tensor], Tensor]:
    """Returns a case as a function from the vector of its inputs to the vector of its outputs."""
    case = CASES[name]

    def run(vector: Tensor) -> Tensor:
        parts = vector.split([math.prod(shape) for shape in case.shapes])
        ys = case.call(f, *(p.view(s) for p, s in zip(parts, case.shapes, strict=True)))
        return torch.cat([y.flatten() for y in tensors(ys)])

    return run


def of_inputs(name: str, f: Any) -> Callable[..., Any]:
    return lambda *xs: CASES[name].call(f, *xs)


def loss_of(f: Callable) -> Callable[[Tensor], Tensor]:
    """Returns a scalar function that is nonlinear in the outputs of f."""

    def loss(x: Tensor) -> Tensor:
        y = f(x)
        return ((wave(y) + y / 2) * y).sum()

    return loss


def close(ours: Tensor, exact: Tensor) -> None:
    assert ours.shape == exact.shape
    assert exact.isfinite().all() and relative(ours, exact) < 1e-9, f"{relative(ours, exact):.1e}"


# -------------------------------------------------------------------- the derivatives of each mode


# not of window_attention, which would take minutes in Triton's interpreter
@checks.interpreter(name=[name for name in QUICK if name != "window_attention"])
@every_case
def test_gradcheck(name: str) -> None:
    """Checks by finite differences, first of the outputs and then of the gradients."""
    xs = [random(*shape, seed=i) for i, shape in enumerate(CASES[name].shapes)]
    xs = checks.leaves(xs)
    assert torch.autograd.gradcheck(
        of_inputs(name, fastgn_kernels), xs, check_forward_ad=True, check_batched_grad=True,
        check_batched_forward_grad=True,
    )  # fmt: skip
    assert torch.autograd.gradgradcheck(
        of_inputs(name, fastgn_kernels), xs, check_fwd_over_rev=True, check_rev_over_rev=True,
        check_batched_grad=True,
    )  # fmt: skip


func = torch.func


def dual(f: Callable, x: Tensor, v: Tensor) -> Tensor:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(x, v))).tangent


def forward_over_reverse(f: Callable, x: Tensor, v: Tensor, order: int) -> Tensor:
    """Differentiates `order` times in reverse, and once in forward mode.

    Only the last cotangent has a tangent, so the ops see none in the passes before.
    """
    x = x.clone().requires_grad_()
    y = f(x)
    for _ in range(order - 1):
        (y,) = torch.autograd.grad((y * y * y).sum(), x, create_graph=True)
    with forward_ad.dual_level():
        gy = forward_ad.make_dual(wave(y), y.detach() + 1)
        (gx,) = torch.autograd.grad(y, x, gy)
        return forward_ad.unpack_dual(gx).tangent


def dual_then_reverse(f: Callable, x: Tensor, v: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(f(forward_ad.make_dual(x, v))).tangent
        loss = (tangent * wave(tangent) + tangent**2).sum() + 0 * x.sum()  # relu's is constant
        return torch.autograd.grad(loss, x)[0]


def forward_over_reverse_then_reverse(f: Callable, x: Tensor, v: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    y = f(x)
    with forward_ad.dual_level():
        gy = forward_ad.make_dual(wave(y), y.detach() + 1)
        (gx,) = torch.autograd.grad(y, x, gy, create_graph=True)
        tangent = forward_ad.unpack_dual(gx).tangent
        loss = (tangent * wave(tangent) + tangent**2).sum() + 0 * x.sum()
        return torch.autograd.grad(loss, x)[0]


def batched_gradients(f: Callable, x: Tensor, v: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    (g,) = torch.autograd.grad(loss_of(f)(x), x, create_graph=True)
    cotangents = torch.stack([v, wave(v)])
    return torch.autograd.grad(g, x, cotangents, is_grads_batched=True)[0]


def in_reverse(times: int) -> Callable:
    """Returns a transform that differentiates `times` times, each time through the last result."""

    def run(f: Callable, x: Tensor, v: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        loss = loss_of(f)(x)
        for _ in range(times):
            (g,) = torch.autograd.grad(loss, x, create_graph=True)
            loss = ((wave(g) + g / 3) * g).sum()
        return g

    return run


def jvp(f: Callable, x: Tensor, v: Tensor) -> Tensor:
    return func.jvp(f, (x,), (v,))[1]


def rows(x: Tensor) -> Tensor:
    return torch.stack([x, x / 2 + 0.1])


TRANSFORMS: dict[str, Callable[[Callable, Tensor, Tensor], Tensor]] = {
    "grad": lambda f, x, v: func.grad(loss_of(f))(x),
    "vjp": lambda f, x, v: func.vjp(f, x)[1](wave(f(x)))[0],
    "jvp": jvp,
    "jacrev": lambda f, x, v: func.jacrev(f)(x),
    "jacfwd": lambda f, x, v: func.jacfwd(f)(x),
    "hessian": lambda f, x, v: func.hessian(loss_of(f))(x),
    "vmap": lambda f, x, v: func.vmap(f)(rows(x)),
    "linearize": lambda f, x, v: func.linearize(f, x)[1](v),
    "dual": dual,
    "dual, then reverse": dual_then_reverse,
    "forward over reverse": lambda f, x, v: forward_over_reverse(f, x, v, 1),
    "forward over reverse over reverse": lambda f, x, v: forward_over_reverse(f, x, v, 2),
    "forward over the third reverse": lambda f, x, v: forward_over_reverse(f, x, v, 3),
    "forward over reverse, then reverse": forward_over_reverse_then_reverse,
    "functional.hvp": lambda f, x, v: functional.hvp(loss_of(f), x, v)[1],
    "functional.hessian": lambda f, x, v: functional.hessian(loss_of(f), x),
    "functional.jacobian": lambda f, x, v: functional.jacobian(
        f, x, vectorize=True, strategy="forward-mode"
    ),
    "batched gradients": batched_gradients,
    "grad of grad": lambda f, x, v: func.grad(lambda x: (func.grad(loss_of(f))(x) ** 3).sum())(x),
    "jvp of grad": lambda f, x, v: jvp(func.grad(loss_of(f)), x, v),
    "grad of jvp": lambda f, x, v: func.grad(lambda x: (jvp(f, x, v) ** 3).sum())(x),
    "jvp of jvp": lambda f, x, v: jvp(lambda x: jvp(f, x, v), x, wave(v)),
    "vmap of grad": lambda f, x, v: func.vmap(func.grad(loss_of(f)))(rows(x)),
    "vmap of hessian": lambda f, x, v: func.vmap(func.hessian(loss_of(f)))(rows(x)),
    "grad of hessian": lambda f, x, v: func.grad(
        lambda x: (func.hessian(loss_of(f))(x) ** 2).sum()
    )(x),
    "second order": in_reverse(2),
    "third order": in_reverse(3),
    "fourth order": in_reverse(4),
}
"""Name -> a transform of f that takes (f, x, v). f: function of a vector. v: a tangent of x."""


AFTER_KERNELS = (
    "forward over reverse",
    "forward over reverse over reverse",
    "forward over the third reverse",
    "batched gradients",
    "third order",
)
"""The transforms in which the forward pass runs a kernel."""


@checks.only_interpreted
@quick_cases
def test_transforms_after_kernels(name: str) -> None:
    compare(name, AFTER_KERNELS)


@every_case
def test_transforms(name: str) -> None:
    compare(name, TRANSFORMS, reference)


def compare(name: str, transforms: Iterable[str], *others: Any) -> None:
    """Compares an op, and `others` in its place, with an independent formula under transforms."""
    x, v = start(name), wave(start(name))
    exact_of = of_vector(name, independent)
    wrong = []
    for transform in transforms:
        run = TRANSFORMS[transform]
        exact = run(exact_of, x, v)
        for f in (fastgn_kernels, *others):
            try:
                close(run(of_vector(name, f), x, v), exact)
            except Exception as error:
                wrong.append(f"{f.__name__}, {transform}: {error!r}")
    assert not wrong, "\n".join(wrong)


# --------------------------------------------------------------------- what stays as it is, and how


def test_pytorchs_layer_norm_fails_this_test() -> None:
    """F.layer_norm treats the mean and the variance as constants, so the reference is without it.

    If this fails, PyTorch has corrected it: correct reference.layer_norm's comment, too.
    """
    exact = of_vector("layer_norm", independent)
    x, v = start("layer_norm"), wave(start("layer_norm"))

    def pytorchs(vector: Tensor) -> Tensor:
        x, weight, bias = vector.split([6, 3, 3])
        return torch.nn.functional.layer_norm(x.view(2, 3), (3,), weight, bias).flatten()

    for transform in ("grad of jvp", "third order"):
        run = TRANSFORMS[transform]
        with pytest.raises(AssertionError, match="e-0"):
            close(run(pytorchs, x, v), run(exact, x, v))


@checks.interpreter
@quick_cases
def test_ops_run_outside_the_modes(name: str) -> None:
    """An op is itself again after a mode, and if no argument of it carries a tangent."""
    f, x = of_vector(name, fastgn_kernels), start(name).requires_grad_()
    ops = {f"fastgn::{name.split(',')[0]}", f"fastgn::{name.split(',')[0]}_bwd"}
    names = {"gelu": "activation", "mish": "activation"}
    ops = {op.replace(kind, is_called) for op in ops for kind, is_called in names.items()} | ops

    def gradient(x: Tensor) -> None:
        torch.autograd.grad(f(x).sum(), x)

    def called() -> set[str]:
        return {op for op in checks.ops_called(gradient, x) if op.startswith("fastgn::")}

    assert called() and called() <= ops
    assert not any("fastgn" in op for op in checks.ops_called(func.grad(loss_of(f)), x.detach()))
    with forward_ad.dual_level():
        assert called()
        tangent = forward_ad.make_dual(x.detach(), wave(x))
        assert not any("fastgn" in op for op in checks.ops_called(f, tangent))
    assert called()


def test_the_warning_comes_once_per_op() -> None:
    third = TRANSFORMS["third order"]
    dispatch.warn_of_third_derivative.cache_clear()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for name in ("gelu", "mish, bias", "gradient_norm, 2", "gradient_norm, 1", "gelu"):
            third(of_vector(name, fastgn_kernels), start(name), start(name))
            TRANSFORMS["second order"](
                of_vector("layer_norm", fastgn_kernels), *[start("layer_norm")] * 2
            )
    messages = [str(w.message) for w in seen if "fastgn_kernels" in str(w.message)]
    assert len(messages) == 2
    for message, name in zip(messages, ("activation", "gradient_norm"), strict=True):
        assert message.startswith(f"fastgn_kernels.{name} has kernels for two derivatives")
        assert f"fastgn_kernels.reference.{name}" in message


@pytest.mark.filterwarnings("ignore:(?s).*Traceback of forward call:UserWarning")
@pytest.mark.parametrize("transform", ["grad", "jvp", "vmap of grad"])
@pytest.mark.parametrize("name", ["layer_norm", "window_attention"])
def test_a_compiled_region_with_torch_func(
    name: str, transform: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compiled code that would keep a custom op uses the reference inside a transform."""
    monkeypatch.setattr(sys.modules[f"fastgn_kernels.{name}"], "is_compiling", lambda: False)
    f, x, v = of_vector(name, fastgn_kernels), start(name), wave(start(name))

    def run(x: Tensor, v: Tensor) -> Tensor:
        return TRANSFORMS[transform](f, x, v) * f(x).sum()

    torch._dynamo.reset()
    backend, called = checks.recording_backend()
    close(torch.compile(run, fullgraph=True, backend=backend)(x, v), run(x, v))
    assert any("fastgn" in op for op in called)  # the second factor


@pytest.mark.parametrize("name", ["layer_norm", "window_attention"])
def test_a_compiled_region_in_forward_mode(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Code that was compiled outside forward mode does not lose a tangent inside it.

    Newer versions of PyTorch refuse to compile code for an input with a tangent. They would call
    the old code without an error if needs_formula did not make them compile it again.
    """
    monkeypatch.setattr(sys.modules[f"fastgn_kernels.{name}"], "is_compiling", lambda: False)
    f, x, v = of_vector(name, fastgn_kernels), start(name), wave(start(name))
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: f(x), fullgraph=True, backend="aot_eager")
    exact = dual(of_vector(name, independent), x, v)
    for _ in range(2):
        close(compiled(x), f(x))
        with contextlib.suppress(torch._dynamo.exc.Unsupported):
            close(dual(compiled, x, v), exact)
    close(torch.compile(lambda x: dual(f, x, v), fullgraph=True, backend="aot_eager")(x), exact)


WEIGHT, BIAS = random(6, seed=2).float(), random(6, seed=3).float()

MIXED: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "activation": lambda f, x: f.activation(x, "gelu", BIAS),
    "layer_norm": lambda f, x: f.layer_norm(x, WEIGHT, BIAS, dtype=x.dtype),
    "cross_entropy": lambda f, x: f.cross_entropy(x, torch.arange(4, device=DEVICE), "none"),
    "gradient_norm": lambda f, x: f.gradient_norm(x, 2),
}
"""Name -> a call of an op with an input of 4 rows and 6 columns. Its weights are float32."""


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MIXED)
def test_dtypes(name: str, dtype: torch.dtype) -> None:
    """The results of every mode have the dtypes of the op, also under autocast."""
    op = functools.partial(MIXED[name], fastgn_kernels)
    x, v = random(4, 6).to(dtype), random(4, 6, seed=1).to(dtype)
    y = op(x)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        ours = jvp(op, x, v)
        leaf = x.clone().requires_grad_()
        z = op(leaf).float()
        for _ in range(3):
            (z,) = torch.autograd.grad((z * z).sum() / 8, leaf, create_graph=True)
            assert z.dtype == dtype
    assert ours.dtype == y.dtype
    exact = jvp(functools.partial(MIXED[name], independent), x.double(), v.double())
    assert relative(ours.double(), exact) < 8 * torch.finfo(dtype).eps
