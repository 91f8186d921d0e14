"""Tests that a backward pass computes the weight gradients it was asked for, and no others.

A sweep is one call of autograd.grad or backward.
"""

import contextlib
import functools
import importlib
import re
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import timm
import torch
import triton
from fastgn_kernels import activation, dispatch, layer_norm, reference, window_attention_qkvpacked
from fastgn_kernels.swap import swap_modules
from support import checks
from support.checks import DEVICE, random
from timm.layers import set_fused_attn
from torch import Tensor, nn
from torch._dynamo import compiled_autograd
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from benchmarks.kernels import builds as kernel_builds
from fastgn.step.double_backward import compile_double_backward

close = functools.partial(assert_close, rtol=1e-9, atol=1e-9)


def _summed(function: Callable, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    y, total = function(x, weight, bias, residual=x.sin())
    return y + total


def _attention(function: Callable, x: Tensor, bias: Tensor) -> Tensor:
    qkv = x if function is window_attention_qkvpacked else x.unbind()
    return function(*([qkv] if isinstance(qkv, Tensor) else qkv), bias)


OPS: dict[str, tuple[str, Callable, Callable, list[tuple[int, ...]]]] = {
    "layer_norm": ("layer_norm", layer_norm, reference.layer_norm, [(5, 6), (6,), (6,)]),
    "layer_norm of a sum": (
        "layer_norm",
        functools.partial(_summed, layer_norm),
        functools.partial(_summed, reference.layer_norm),
        [(5, 6), (6,), (6,)],
    ),
    "window_attention": (
        "window_attention",
        functools.partial(_attention, window_attention_qkvpacked),
        functools.partial(_attention, reference.window_attention),
        [(3, 2, 1, 3, 4), (1, 3, 3)],
    ),
    "activation": (
        "activation",
        lambda x, bias: activation(x, "gelu", bias),
        lambda x, bias: reference.activation(x, "gelu", bias),
        [(5, 6), (6,)],
    ),
}
"""Case -> name of the op, the op, its reference, and the shapes of x and of the weights."""

every_op = pytest.mark.parametrize("case", OPS)


def asked(name: str, args: Any) -> tuple[str, bool] | None:
    """Returns ("bwd" or "bwd_bwd", whether it computes weight gradients) for a call of such an op.

    For other calls it returns None.
    """
    found = re.fullmatch(r"fastgn(?:::|\.)\w+?_(bwd(?:_bwd)?)(?:\.default)?", name)
    return (found[1], args[-1]) if found and isinstance(args[-1], bool) else None


class Asked(TorchDispatchMode):
    """Records in order whether each backward op that runs computes weight gradients.

    It also checks that those it does not compute are empty.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, bool]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        call = asked(func._schema.name, args)
        if call:
            self.calls.append(call)
            weights = {"bwd": 1, "bwd_bwd": 2}[call[0]]
            assert all((g.numel() > 0) == call[1] for g in out[weights:])
        return out


def leaves(case: str) -> tuple[Tensor, list[Tensor]]:
    x, *weights = (random(*shape, seed=i) for i, shape in enumerate(OPS[case][3]))
    x, *weights = checks.leaves([x, *weights])
    return x, weights


def cubed(function: Callable, x: Tensor, weights: list[Tensor]) -> Tensor:
    return (function(x, *weights) ** 3).sum()


def accumulated(tensors: list[Tensor], backward: Callable) -> list[Tensor | None]:
    for t in tensors:
        t.grad = None
    backward()
    return [t.grad for t in tensors]


SWEEPS: dict[str, tuple[Callable, bool]] = {
    "input": (lambda loss, x, ws: torch.autograd.grad(loss(x, ws), x), False),
    "input, to be differentiated": (
        lambda loss, x, ws: torch.autograd.grad(loss(x, ws), x, create_graph=True),
        False,
    ),
    "an input that is no leaf": (
        lambda loss, x, ws: torch.autograd.grad(loss(2 * x, ws), x),
        False,
    ),
    "weights": (lambda loss, x, ws: torch.autograd.grad(loss(x, ws), ws), True),
    "last weight": (lambda loss, x, ws: torch.autograd.grad(loss(x, ws), ws[-1]), True),
    "input and weights": (lambda loss, x, ws: torch.autograd.grad(loss(x, ws), [x, *ws]), True),
    "weights in another order": (
        lambda loss, x, ws: torch.autograd.grad(loss(x, ws), [*ws[::-1], x]),
        True,
    ),
    "a gradient edge": (
        lambda loss, x, ws: torch.autograd.grad(
            loss(x, ws), [x, torch.autograd.graph.get_gradient_edge(ws[0])]
        ),
        True,
    ),
    "backward": (
        lambda loss, x, ws: accumulated([x, *ws], lambda: loss(x, ws).backward()),
        True,
    ),
    "backward to the input": (
        lambda loss, x, ws: accumulated([x, *ws], lambda: loss(x, ws).backward(inputs=[x])),
        False,
    ),
    "backward to a weight": (
        lambda loss, x, ws: accumulated([x, *ws], lambda: loss(x, ws).backward(inputs=ws[:1])),
        True,
    ),
    "input, beside weights that are no leaves": (
        lambda loss, x, ws: torch.autograd.grad(loss(x, [2 * w for w in ws]), x),
        False,
    ),
    "through weights that are no leaves": (
        lambda loss, x, ws: torch.autograd.grad(loss(x, [2 * w for w in ws]), [x, *ws]),
        True,
    ),
    "weights made of the input": (
        lambda loss, x, ws: torch.autograd.grad(loss(x, [w * x.sum() for w in ws]), x),
        True,
    ),
    "several gradients at once": (
        lambda loss, x, ws: torch.autograd.grad(
            loss(x, ws).reshape(1), x, random(4, 1), is_grads_batched=True
        ),
        False,
    ),
    "checkpointed": (
        lambda loss, x, ws: torch.autograd.grad(
            checkpoint(lambda x: loss(x, ws), x, use_reentrant=False), x
        ),
        False,
    ),
}
"""Sweep -> a function that takes gradients of loss(x, weights), and whether of a weight too."""


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@pytest.mark.parametrize("sweep", SWEEPS)
@every_op
def test_a_sweep_computes_what_it_is_asked_for(case: str, sweep: str) -> None:
    gradients, of_weights = SWEEPS[sweep]
    _, op, twin, _ = OPS[case]
    x, weights = leaves(case)
    with Asked() as seen:
        ours = gradients(functools.partial(cubed, op), x, weights)
    assert set(seen.calls) == {("bwd", of_weights)}
    theirs = gradients(functools.partial(cubed, twin), x, weights)
    for a, b in zip(ours, theirs, strict=True):
        assert (a is None) == (b is None)
        if b is not None:
            close(a, b)


@checks.interpreter
@every_op
def test_a_penalty_pays_for_weight_gradients_once(case: str) -> None:
    """Its last sweep computes them, and they equal the reference's."""
    _, op, twin, _ = OPS[case]
    results = []
    for function in (op, twin):
        x, weights = leaves(case)
        with Asked() as inner:
            (gx,) = torch.autograd.grad(cubed(function, x, weights), x, create_graph=True)
        with Asked() as outer:
            results.append(accumulated([x, *weights], (gx**3).sum().backward))
        if function is op:
            assert inner.calls == [("bwd", False)]
            assert outer.calls == [("bwd_bwd", True), ("bwd", True)]
    close(*results)


@checks.interpreter
@every_op
def test_nobody_pays_where_the_second_order_stays_with_the_input(case: str) -> None:
    _, op, twin, _ = OPS[case]
    results = []
    for function in (op, twin):
        x, weights = leaves(case)
        with Asked() as seen:
            (gx,) = torch.autograd.grad(cubed(function, x, weights), x, create_graph=True)
            results.append(torch.autograd.grad((gx**3).sum(), x))
        if function is op:
            assert seen.calls == [("bwd", False), ("bwd_bwd", False), ("bwd", False)]
    close(*results)


@every_op
def test_one_graph_serves_every_sweep(case: str) -> None:
    """A later sweep can compute what an earlier one left out, also at second order."""
    _, op, twin, _ = OPS[case]
    results = []
    for function in (op, twin):
        x, weights = leaves(case)
        loss = cubed(function, x, weights)
        keep = {"retain_graph": True, "create_graph": True}
        (first,) = torch.autograd.grad(loss, x, **keep)
        both = torch.autograd.grad(loss, [x, *weights], **keep)
        penalty = (first**3).sum() + sum((g**3).sum() for g in both)
        results.append([first, *both, *torch.autograd.grad(penalty, [x, *weights])])
    close(*results)


@every_op
def test_derivatives_of_the_input_alone(case: str) -> None:
    """Uses finite differences. The weights require gradients that no sweep asks for."""
    _, op, _, _ = OPS[case]
    x, weights = leaves(case)
    checks.check_derivatives(lambda x: op(x, *weights), [x])


def test_where_nothing_is_known_the_gradient_is_computed() -> None:
    x, (weight, bias) = leaves("layer_norm")
    y = layer_norm(x, weight, bias)
    (right,) = torch.autograd.grad((3 * y).sum(), x, retain_graph=True)
    assert dispatch._engine_reaches(y.grad_fn) is True  # no sweep runs
    assert dispatch._engine_reaches(None) is False
    with mock.patch.object(dispatch, "_engine_will_run", lambda node: True), Asked() as seen:
        close(torch.autograd.grad((3 * y).sum(), x), (right,))
    assert seen.calls == [("bwd", True)]


@pytest.mark.parametrize("fullgraph", [False, True])
def test_compiled_autograd(fullgraph: bool) -> None:
    """Compiled autograd has no nodes to ask.

    Its graphs must serve both kinds of sweep, one after the other.
    """
    torch._dynamo.reset()
    x, (weight, bias) = leaves("layer_norm")
    theirs = cubed(reference.layer_norm, x, [weight, bias])
    right = torch.autograd.grad(theirs, [x, weight, bias])
    with compiled_autograd._enable(torch.compile(backend="eager", fullgraph=fullgraph)):
        for wanted in ([x], [x, weight, bias], [x]):
            ours = torch.autograd.grad(cubed(layer_norm, x, [weight, bias]), wanted)
            close(ours, right[: len(wanted)])


@contextlib.contextmanager
def kept_in_compiled_regions() -> Iterator[None]:
    """Makes compiled code keep the custom ops, as on CUDA, and activations too."""
    with contextlib.ExitStack() as patches:
        for name in ("layer_norm", "window_attention", "activations"):
            module = importlib.import_module(f"fastgn_kernels.{name}")
            patches.enter_context(mock.patch.object(module, "is_compiling", lambda: False))
        yield


def backend_that_notes(calls: list[tuple[str, bool]]) -> Callable:
    def note(graph: torch.fx.GraphModule, example: list) -> Callable:
        nodes = (n for n in graph.graph.nodes if n.op == "call_function")
        calls.extend(call for n in nodes if n.args and (call := asked(str(n.target), n.args)))
        return make_boxed_func(graph.forward)

    return aot_autograd(fw_compiler=note, bw_compiler=note)


class _Step(nn.Module):
    def __init__(self, op: Callable, weights: list[Tensor], penalised: bool):
        super().__init__()
        self.op, self.penalised = op, penalised
        self.weights = nn.ParameterList(weights)

    def forward(self, x: Tensor) -> Tensor:
        weights = [self.weights[i] for i in range(len(self.weights))]
        loss = cubed(self.op, x, weights)
        if not self.penalised:  # an attack's step
            return torch.autograd.grad(loss, x)[0]
        (gx,) = torch.autograd.grad(loss, x, create_graph=True)
        return loss + (gx**3).sum()


@every_op
def test_a_compiled_graph_pays_once(case: str) -> None:
    torch._dynamo.reset()
    _, op, twin, _ = OPS[case]
    x, weights = leaves(case)
    calls: list[tuple[str, bool]] = []
    step = _Step(op, weights, penalised=True)
    with kept_in_compiled_regions():
        compiled = compile_double_backward(step, backend=backend_that_notes(calls))
        ours = accumulated(list(step.parameters()), lambda: compiled(x).backward())
    assert sorted(set(calls)) == [("bwd", False), ("bwd", True), ("bwd_bwd", True)]
    assert calls.count(("bwd", True)) == calls.count(("bwd_bwd", True)) == 1
    plain = _Step(twin, weights, penalised=True)
    theirs = accumulated(list(plain.parameters()), lambda: plain(x).backward())
    close(ours, theirs)


@every_op
def test_a_compiled_attack_pays_for_none(case: str) -> None:
    torch._dynamo.reset()
    _, op, twin, _ = OPS[case]
    x, weights = leaves(case)
    calls: list[tuple[str, bool]] = []
    with kept_in_compiled_regions():
        step = _Step(op, weights, penalised=False)
        ours = compile_double_backward(step, backend=backend_that_notes(calls))(x)
    assert calls == [("bwd", False)]
    close(ours, _Step(twin, weights, penalised=False)(x))


def swin() -> nn.Module:
    set_fused_attn(False)
    torch.manual_seed(0)
    model = timm.create_model(
        "swin_tiny_patch4_window7_224", num_classes=5, depths=(2,), num_heads=(2,), embed_dim=8,
        patch_size=2, img_size=8, window_size=2, drop_path_rate=0.0,
    )  # fmt: skip
    set_fused_attn(True)
    swap_modules(model)
    return model.to(DEVICE)


class _Penalised(nn.Module):
    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        ce_B = nn.functional.cross_entropy(
            self.model(images), torch.arange(2, device=images.device), reduction="none"
        )
        (g,) = torch.autograd.grad(ce_B.sum(), images, create_graph=True)
        return ce_B.mean() + g.abs().sum()


def test_a_swins_input_gradient_pays_for_no_weight() -> None:
    model = swin()
    images = random(2, 3, 8, 8, dtype=torch.float32).requires_grad_()
    ce = nn.functional.cross_entropy(model(images), torch.arange(2, device=DEVICE))
    with Asked() as inner:
        (g,) = torch.autograd.grad(ce, images, create_graph=True)
    with Asked() as outer:
        g.abs().sum().backward()
    # 6 norms, 2 attentions; activations have no bias of their own
    with_weights = 8
    assert inner.calls.count(("bwd", False)) == len(inner.calls) >= with_weights
    assert outer.calls.count(("bwd_bwd", True)) == with_weights
    assert outer.calls.count(("bwd", True)) == with_weights


@pytest.mark.slow
def test_a_compiled_swins_input_gradient_pays_for_no_weight() -> None:
    torch._dynamo.reset()
    calls: list[tuple[str, bool]] = []
    images = random(2, 3, 8, 8, dtype=torch.float32)
    with kept_in_compiled_regions():
        step = compile_double_backward(_Penalised(swin()), backend=backend_that_notes(calls))
        step(images).backward()
    assert calls.count(("bwd", True)) == calls.count(("bwd_bwd", True)) == 8
    assert calls.count(("bwd", False)) >= 8


def reads_partial_sums(kernel: triton.compiler.CompiledKernel, *_: Any) -> tuple[str, bool]:
    """Returns the name of a kernel, and whether its code reads the pointer to the partial sums."""
    arguments = [name for name, kind in kernel.src.signature.items() if kind != "constexpr"]
    name, index = kernel.metadata.name, arguments.index("partial_sums_pointer")
    return name, re.search(rf"\[{name}_param_{index}\]", kernel.asm["ptx"]) is not None


@every_op
def test_kernels_sum_only_what_is_asked_for(case: str) -> None:
    name, op, _, shapes = OPS[case]
    x = torch.empty(shapes[0], dtype=torch.bfloat16, requires_grad=True)
    weights = [torch.empty(shape, requires_grad=True) for shape in shapes[1:]]
    found: dict[bool, dict[str, bool]] = {}
    for with_weights in (False, True):
        wanted = [x, *weights] if with_weights else [x]
        with kernel_builds.compile_only(80) as builds:
            y = op(x, *weights)
            builds.clear()  # the forward's
            with mock.patch.object(kernel_builds, "inspect", reads_partial_sums):
                (gx, *_) = torch.autograd.grad(y.sum(), wanted, create_graph=True)
                torch.autograd.grad(gx.sum(), wanted, allow_unused=True)
        found[with_weights] = dict(builds)
    kernels = {f"_{name}_bwd_kernel", f"_{name}_bwd_bwd_kernel"}
    if name == "activation":
        kernels = {"_bias_activation_kernel"}  # of every order
    assert found == {False: dict.fromkeys(kernels, False), True: dict.fromkeys(kernels, True)}


def test_compiled_graphs_on_disk_are_of_these_sources() -> None:
    """PyTorch's cache on disk does not notice that the derivative of an op changed.

    After such a change, an old entry raised an error. With the same signature it would be used
    silently.
    """
    assert f"fastgn_kernels {dispatch.source_hash()}" in torch.compiler.config.cache_key_tag
