"""Every op of fastgn_kernels and each of its orders: time, bytes a second, memory.

    python -m benchmarks.kernels.ops  # a GPU: Swin-B's shapes, 64 images, within --minutes
    python -m benchmarks.kernels.ops --ops gelu layer_norm --no-compile
    PYTHONPATH=.:kernels python -m benchmarks.kernels.ops  # with torch, triton, numpy alone

A row is one request: `forward`; `backward`, all gradients; `second`, what a gradient penalty asks
for: given the cotangent of the gradient to the op's first input, the gradients to the backward's
cotangents and to all inputs. Each is timed alone, the graph that it differentiates built before.
`all` is the three in one function, which is what `torch.compile` is given. Peers have first orders.

Bytes are the op's by definition, not what a kernel happens to move: each tensor that the order
needs read once, each that it returns written once (`MOVES`). The yardstick is a device copy of as
many bytes, half read and half written, timed in the same rounds; `share_of_copy` is its median time
over the op's, and `share_of_large_copy` the same against one of 2 GiB. Calls are cold (`timing`).
Peak memory is what the request allocates above inputs and cotangents, its graph included.

Writes benchmarks/results/kernels_<card>.json, after every case, and the picture into runs/. On a
CPU it runs small shapes, its times mean nothing and it writes to runs/ alone.
"""

import argparse
import dataclasses
import functools
import gc
import importlib.util
import itertools
import math
import os
import platform
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
from fastgn_kernels import (
    ACTIVATIONS,
    activation,
    cross_entropy,
    gradient_norm,
    layer_norm,
    reference,
    window_attention_qkvpacked,
)
from torch import Tensor

from benchmarks.common.arguments import RESULTS, ROOT
from benchmarks.common.records import hold, write_record
from benchmarks.common.timing import Timing, cold

try:
    from fastgn.metrics import environment
except ImportError as error:  # a borrowed card has no trainer: say less of it, but run
    LACKING = str(error)

    def environment() -> dict[str, Any]:
        versions = {"python": platform.python_version(), "torch": torch.__version__}
        hardware: dict[str, Any] = {"cpu": platform.processor(), "cpu_count": os.cpu_count()}
        if torch.cuda.is_available():
            hardware |= {"gpus": [torch.cuda.get_device_name()], "cuda": torch.version.cuda}
        return {
            "versions": versions | {"triton": triton.__version__},
            "commit": None,
            "hardware": hardware,
            "environment_lacks": LACKING,
        }


NO_MEANING = "NO GPU: small shapes on a CPU, these times mean nothing"

ORDERS = ("forward", "backward", "second")
STAGES = {1: (56, 128, 4), 2: (28, 256, 8), 3: (14, 512, 16), 4: (7, 1024, 32)}
"""Swin-B's at 224 pixels: tokens a side, channels, heads."""
SIDE, WINDOW, HEAD_DIM, CLASSES = 224, 7, 32, 1000
LARGE_COPY = 2 << 30
DIFFERENCE = {torch.bfloat16: 0.03, torch.float32: 1e-3}
"""Relative L2 difference from eager above which a row's kernel is wrong: bfloat16 keeps 8 bits, and
eager rounds to them between its kernels."""

SHARE = "share of copy bandwidth"

Outputs = Tensor | tuple[Tensor, ...]


@dataclasses.dataclass(frozen=True)
class Case:
    """An op at one shape. `inputs` are differentiated; `constants` are keyword arguments that are
    not."""

    op: str
    shape: str
    dtype: torch.dtype
    ours: Callable[..., Outputs]
    eager: Callable[..., Outputs]
    inputs: Mapping[str, Tensor]
    constants: Mapping[str, Tensor]
    peers: Mapping[str, Callable[..., Outputs]] = dataclasses.field(default_factory=dict)


MOVES = {
    "activation": ("x -> y", "gy x -> gx", "v gy x -> ggy gx"),
    "bias_activation": ("x bias -> y", "gy x bias -> gx gbias", "v gy x bias -> ggy gx gbias"),
    "layer_norm": (
        "x weight bias -> y",
        "gy x weight -> gx gweight gbias",
        "v gy x weight -> ggy gx gweight",
    ),
    # the two inputs have one gradient between them, and v goes to gsum as it is
    "add_layer_norm": (
        "x residual weight bias -> y sum",
        "gy gsum sum weight -> gx gweight gbias",
        "v gy sum weight -> ggy gx gweight",
    ),
    "window_attention": (
        "qkv bias -> y",
        "gy qkv bias -> gqkv gbias",
        "v gy qkv bias -> ggy gqkv gbias",
    ),
    "shifted_window_attention": (
        "qkv bias mask -> y",
        "gy qkv bias mask -> gqkv gbias",
        "v gy qkv bias mask -> ggy gqkv gbias",
    ),
    "cross_entropy": (
        "logits targets -> y",
        "gy logits targets -> glogits",
        "v gy logits targets -> ggy glogits",
    ),
    # L1's second derivative to x is zero: nothing to write
    "gradient_norm_l1": ("x -> y", "gy x -> gx", "v x -> ggy"),
    "gradient_norm_l2": ("x -> y", "gy x y -> gx", "v gy x y -> ggy gx"),
}
"""Op -> what its orders read and write: v is the cotangent of the first input's gradient, and a g
before a name its gradient."""

SAME_MOVES = (
    dict.fromkeys(ACTIVATIONS, "activation")
    | {"bias_gelu": "bias_activation"}
    | {f"cross_entropy_{kind}": "cross_entropy" for kind in ("index", "soft")}
)

OPS = (
    *ACTIVATIONS,
    "bias_gelu",
    "layer_norm",
    "add_layer_norm",
    "window_attention",
    "shifted_window_attention",
    "cross_entropy_index",
    "cross_entropy_soft",
    "gradient_norm_l1",
    "gradient_norm_l2",
)


def moves(op: str, order: str) -> tuple[list[str], list[str]]:
    """Names of the tensors that an op's order reads, and that it writes."""
    read, written = MOVES[SAME_MOVES.get(op, op)][ORDERS.index(order)].split("->")
    return read.split(), written.split()


def size(name: str, sizes: Mapping[str, int]) -> int:
    """Bytes of a tensor of `MOVES`, a gradient's being those of what it is the gradient to."""
    if name == "v":
        return next(iter(sizes.values()))
    while name not in sizes:
        assert name.startswith("g"), f"{name} is none of {', '.join(sizes)}"
        name = name[1:]
    return sizes[name]


def bytes_moved(op: str, order: str, sizes: Mapping[str, int]) -> int:
    """Bytes that an order has to move; sizes: name -> bytes, the op's first input first."""
    read, written = moves(op, order)
    return sum(size(name, sizes) for name in read + written)


def targets(
    op: str, order: str, share: float, faster: float, leaner: float
) -> list[dict[str, Any]]:
    """Issue 3's, of one row. share: of copy bandwidth; faster, leaner: eager's time and peak memory
    over ours. What beats eager in neither is to be removed."""
    wanted = []
    family = SAME_MOVES.get(op, op)
    if order in ORDERS and family.endswith("activation"):
        wanted.append((SHARE, share, 0.9))
    if order in ORDERS and family.endswith("layer_norm"):
        wanted.append((SHARE, share, 0.8))
    if order == "second":
        times = {"activation": 2.5, "layer_norm": 4, "window_attention": 5}
        wanted += [
            ("times as fast as eager", faster, least)
            for end, least in times.items()
            if family.endswith(end)
        ]
        if family.endswith("window_attention"):
            wanted.append(("times less peak memory than eager", leaner, 4))
    rows = [
        {"target": name, "value": value, "at_least": least, "met": value >= least}
        for name, value, least in wanted
    ]
    better = {"target": "better than eager in time or memory", "value": max(faster, leaner)}
    return [*rows, better | {"at_least": 1, "met": max(faster, leaner) > 1}]


def peers() -> tuple[dict[str, Callable], dict[str, str]]:
    """Other libraries' layer norms, and why those that are not here are not."""
    found: dict[str, Callable] = {}
    missing = {}
    if importlib.util.find_spec("liger_kernel") is None:
        missing["liger"] = "liger_kernel is not installed"
    else:
        from liger_kernel.transformers.functional import liger_layer_norm

        found["liger"] = lambda x, weight, bias: liger_layer_norm(x, weight, bias, 1e-5)
    try:
        from apex.normalization import FusedLayerNorm  # noqa: F401  PyPI's apex has none
        from apex.normalization.fused_layer_norm import fused_layer_norm_affine

        found["apex"] = lambda x, weight, bias: fused_layer_norm_affine(
            x, weight, bias, x.shape[-1:], 1e-5
        )
    except ImportError as error:
        missing["apex"] = f"NVIDIA's apex is not installed: {error}"
    return found, missing


def sdpa(qkv: Tensor, bias: Tensor, mask: Tensor | None = None) -> Tensor:
    """What timm calls where it may: its fused kernels know first orders only."""
    added = bias[None]
    if mask is not None:
        added = (mask[:, None] + added).repeat(qkv.shape[1] // mask.shape[0], 1, 1, 1)
    q, k, v = qkv.unbind()
    return F.scaled_dot_product_attention(q, k, v, added.expand(qkv.shape[1], -1, -1, -1))


def shift_mask(side: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Swin's for windows shifted by half: -100 between tokens that came from opposite edges."""
    band = torch.zeros(side, device=device)
    band[-WINDOW:] = 1
    band[-(WINDOW // 2) :] = 2
    region = band[:, None] * 3 + band
    windows = region.unfold(0, WINDOW, WINDOW).unfold(1, WINDOW, WINDOW).reshape(-1, WINDOW**2)
    return torch.where(windows[:, None] != windows[..., None], -100.0, 0.0).to(dtype)


class Spec(NamedTuple):
    """What to build a case from. stage: 0 for an op that has none."""

    op: str
    stage: int
    dtype: torch.dtype


def specs(ops: Sequence[str], stages: Sequence[int]) -> list[Spec]:
    """Every op's first case, then every second one, and so on: if time runs out, each op has been
    measured."""
    by_op = []
    for op in ops:
        family = SAME_MOVES.get(op, op)
        if op in ("gelu", "layer_norm") or family.endswith("window_attention"):
            # a stage of one window is not shifted
            at = [s for s in stages if op != "shifted_window_attention" or STAGES[s][0] > WINDOW]
        else:
            at = [0] if family.startswith(("cross_entropy", "gradient_norm")) else list(stages[:1])
        # the other kinds differ from gelu in arithmetic alone: one shape and dtype tells
        alone = op in ACTIVATIONS and op != "gelu"
        dtypes = (torch.bfloat16,) if alone else (torch.bfloat16, torch.float32)
        by_op.append([Spec(op, stage, dtype) for stage in at for dtype in dtypes])
    return [spec for rank in itertools.zip_longest(*by_op) for spec in rank if spec]


def build(spec: Spec, batch: int, device: torch.device) -> Case:
    """A spec's tensors and functions, at Swin-B's shapes for a batch of images."""
    op, stage, dtype = spec
    side, width, heads = STAGES.get(stage, (0, 0, 0))
    rows, columns = batch * side * side, width
    constants: dict[str, Tensor] = {}
    others: dict[str, Callable[..., Outputs]] = {}

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    ours: Callable[..., Outputs]
    eager: Callable[..., Outputs]
    if op in ACTIVATIONS:
        columns *= 4
        shape = f"{rows} x {columns}"
        ours = functools.partial(activation, kind=op)
        eager = functools.partial(reference.activation, kind=op)
        inputs = {"x": random(rows, columns)}
    elif op == "bias_gelu":
        columns *= 4
        shape = f"{rows} x {columns}"
        ours = lambda x, bias: activation(x, "gelu", bias)  # noqa: E731
        eager = lambda x, bias: reference.activation(x, "gelu", bias)  # noqa: E731
        inputs = {"x": random(rows, columns), "bias": random(columns)}
    elif op == "layer_norm":
        shape = f"{rows} x {columns}"
        ours, eager, others = layer_norm, reference.layer_norm, peers()[0]
        inputs = {"x": random(rows, columns), "weight": random(columns), "bias": random(columns)}
    elif op == "add_layer_norm":
        shape = f"{rows} x {columns}"
        ours = lambda x, r, weight, bias: layer_norm(x, weight, bias, residual=r)  # noqa: E731
        eager = lambda x, r, weight, bias: reference.layer_norm(  # noqa: E731
            x, weight, bias, residual=r
        )
        inputs = {"x": random(rows, columns), "residual": random(rows, columns)}
        inputs |= {"weight": random(columns), "bias": random(columns)}
    elif op.endswith("window_attention"):
        tokens = WINDOW**2
        windows = rows // tokens
        shape = f"{windows} windows x {heads} heads"
        ours = window_attention_qkvpacked
        eager = lambda qkv, bias, mask=None: reference.window_attention(  # noqa: E731
            *qkv.unbind(), bias, mask
        )
        if op.startswith("shifted"):
            constants = {"mask": shift_mask(side, dtype, device)}
        others = {"sdpa": sdpa}
        # as a linear layer gives it
        qkv = random(windows, tokens, 3, heads, HEAD_DIM).permute(2, 0, 3, 1, 4)
        inputs = {"qkv": qkv, "bias": random(heads, tokens, tokens)}
    elif op.startswith("cross_entropy"):
        shape = f"{batch} x {CLASSES}"
        ours = functools.partial(cross_entropy, reduction="none")
        eager = functools.partial(reference.cross_entropy, reduction="none")
        soft = torch.rand(batch, CLASSES, device=device).softmax(1)
        index = torch.randint(CLASSES, (batch,), device=device)
        constants = {"targets": soft if op.endswith("soft") else index}
        inputs = {"logits": random(batch, CLASSES)}
    else:
        shape = f"{batch} x 3 x {SIDE} x {SIDE}"
        ord = 1 if op.endswith("l1") else 2
        ours = functools.partial(gradient_norm, ord=ord)
        eager = functools.partial(reference.gradient_norm, ord=ord)
        inputs = {"x": random(batch, 3, SIDE, SIDE)}
    if stage:
        shape = f"stage {stage}: {shape}"
    inputs = {name: x.requires_grad_() for name, x in inputs.items()}
    return Case(op, shape, dtype, ours, eager, inputs, constants, others)


def listed(y: Outputs) -> list[Tensor]:
    return [y] if isinstance(y, Tensor) else list(y)


def requests(
    function: Callable[..., Outputs],
    inputs: Sequence[Tensor],
    gys: Sequence[Tensor],
    v: Tensor | None,
) -> dict[str, Callable[[], Sequence[Tensor | None]]]:
    """Order -> what asks for it, of a graph that is there. Without v, first orders alone."""
    ys = listed(function(*inputs))
    asked: dict[str, Callable[[], Sequence[Tensor | None]]] = {
        "forward": lambda: listed(function(*inputs)),
        "backward": lambda: torch.autograd.grad(ys, inputs, gys, retain_graph=True),
    }
    if v is not None:
        gx = torch.autograd.grad(ys, inputs, gys, create_graph=True)[0]
        asked["second"] = lambda: torch.autograd.grad(
            gx, [*gys, *inputs], v, retain_graph=True, allow_unused=True
        )
    return asked


def through(
    function: Callable[..., Outputs],
    inputs: Sequence[Tensor],
    gys: Sequence[Tensor],
    v: Tensor,
    order: str = "second",
    wanted: Sequence[bool] | None = None,
) -> list[Tensor | None]:
    """What every order up to this one gives, from the inputs on. wanted: which of the cotangents
    and inputs have a gradient of second order; None: found out."""
    found = ys = listed(function(*inputs))
    if order != "forward":
        twice = order == "second"
        gxs = torch.autograd.grad(ys, inputs, gys, create_graph=twice)
        found = [*ys, *gxs]
        if twice:
            to = [*gys, *inputs]
            if wanted is not None:
                to = [x for x, one in zip(to, wanted, strict=True) if one]
            unused = wanted is None
            found += torch.autograd.grad(gxs[0], to, v, allow_unused=unused)
    # no output of a compiled step may ask for one derivative more
    return [None if x is None else x.detach() for x in found]


def peak_bytes(run: Callable[[], object]) -> int | None:
    """The most that a call allocates at once, what it returns included; None on a CPU."""
    if not torch.cuda.is_available():
        return None
    run()  # libraries' workspaces, which stay
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return torch.cuda.max_memory_allocated() - before


def copier(moved: int, device: torch.device) -> Callable[[], Tensor]:
    """A device copy that moves as many bytes, half read and half written."""
    source = torch.ones(max(moved // 2, 1), dtype=torch.uint8, device=device)
    to = torch.empty_like(source)
    return lambda: to.copy_(source)


def milliseconds(timing: Timing) -> dict[str, float]:
    return {
        "mean": timing.mean * 1e3,
        "std": timing.std * 1e3,
        "median": timing.median * 1e3,
        "n": len(timing.rounds),
    }


def difference(ours: Sequence[Tensor | None], eager: Sequence[Tensor | None]) -> float:
    """The largest relative L2 difference of a result, NaN if any is; None is zero."""
    errors = [0.0]
    for x, y in zip(ours, eager, strict=True):
        x, y = (torch.zeros(()) if z is None else z.detach().double() for z in (x, y))
        errors.append(float((x.to(y.device) - y).norm() / y.norm().clamp_min(1e-30)))
    return math.nan if any(map(math.isnan, errors)) else max(errors)


class Bench:
    """Measures cases, row by row. Rows: see `row`; skipped: what was not measured, and why; failed:
    what broke."""

    def __init__(self, device: torch.device, rounds: int, large_copy: Timing, large_bytes: int):
        self.device = device
        self.rounds = rounds
        self.large_bytes_per_s = large_bytes / large_copy.median
        self.meaningful = device.type == "cuda"
        self.rows: list[dict[str, Any]] = []
        self.skipped: list[str] = []
        self.failed: list[str] = []

    def skip(self, op: str, what: str, why: str) -> None:
        self.skipped.append(f"{op}: {what}: {why}")
        print(f"skipped: {self.skipped[-1]}", flush=True)

    def fail(self, op: str, what: str, error: Exception) -> None:
        self.failed.append(f"{op}: {what}: {first_line(error)}")
        print(f"FAILED: {self.failed[-1]}", flush=True)

    def measure(self, case: Case) -> None:
        """Rows of the three orders, each alone."""
        ours, eager, inputs, gys, v = self.prepare(case)
        asked = {"ours": requests(ours, inputs, gys, v), "eager": requests(eager, inputs, gys, v)}
        for name, peer in case.peers.items():
            try:
                asked[name] = requests(bound(peer, case), inputs, gys, None)
                for run in asked[name].values():
                    run()
            except Exception as error:  # other libraries' limits are their own
                asked.pop(name, None)
                self.skip(f"{case.op}, {case.shape}", name, first_line(error))
        for order in ORDERS:
            self.row(
                case,
                order,
                bytes_moved(case.op, order, sizes(case, ours)),
                {name: runs[order] for name, runs in asked.items() if order in runs},
                {
                    name: peak_bytes(functools.partial(through, f, inputs, gys, v, order))
                    for name, f in (("ours", ours), ("eager", eager))
                },
            )

    def measure_all(self, case: Case, compiled: bool) -> None:
        """The row of the three orders in one function, with torch.compile."""
        ours, eager, inputs, gys, v = self.prepare(case)
        arms: dict[str, Callable] = {
            "ours": lambda: through(ours, inputs, gys, v),
            "eager": lambda: through(eager, inputs, gys, v),
        }
        if compiled:
            try:
                arms["compile"] = self.compiled(eager, inputs, gys, v)
            except Exception as error:  # the compiler's, on PyTorch's own operators
                self.skip(f"{case.op}, {case.shape}", "torch.compile", first_line(error))
        sized = sizes(case, ours)
        self.row(
            case,
            "all",
            sum(bytes_moved(case.op, order, sized) for order in ORDERS),
            arms,
            {name: peak_bytes(run) for name, run in arms.items()},
        )

    def compiled(
        self, function: Callable, inputs: Sequence[Tensor], gys: Sequence[Tensor], v: Tensor
    ) -> Callable:
        torch._dynamo.reset()
        found = requests(function, inputs, gys, v)["second"]()
        wanted = [x is not None for x in found]
        step = torch.compile(
            lambda inputs, gys, v: through(function, inputs, gys, v, wanted=wanted),
            fullgraph=True,
            dynamic=False,
        )
        step(inputs, gys, v)
        return lambda: step(inputs, gys, v)

    def prepare(self, case: Case) -> tuple[Callable, Callable, list[Tensor], list[Tensor], Tensor]:
        ours, eager = bound(case.ours, case), bound(case.eager, case)
        inputs = list(case.inputs.values())
        with torch.no_grad():
            gys = [torch.randn_like(y).requires_grad_() for y in listed(ours(*inputs))]
        return ours, eager, inputs, gys, torch.randn_like(inputs[0])

    def row(
        self,
        case: Case,
        order: str,
        moved: int,
        arms: Mapping[str, Callable[[], Sequence[Tensor | None]]],
        peaks: Mapping[str, int | None],
    ) -> None:
        off = difference(arms["ours"](), arms["eager"]())
        copy = {"copy": copier(moved, self.device)}
        timings = cold({**arms, **copy}, rounds=self.rounds)
        seconds = {name: timing.median for name, timing in timings.items()}
        share = seconds["copy"] / seconds["ours"]
        faster = {n: s / seconds["ours"] for n, s in seconds.items() if n not in ("ours", "copy")}
        known = {name: peak for name, peak in peaks.items() if peak is not None}
        leaner = {n: p / max(known["ours"], 1) for n, p in known.items() if n != "ours"}
        judged = []
        if self.meaningful:
            judged = targets(case.op, order, share, faster["eager"], leaner["eager"])
        row = {
            "op": case.op,
            "shape": case.shape,
            "dtype": name_of(case.dtype),
            "order": order,
            "bytes": moved,
            "ms": {name: milliseconds(timing) for name, timing in timings.items()},
            "bytes_per_s": moved / seconds["ours"],
            "share_of_copy": share,
            "share_of_large_copy": moved / seconds["ours"] / self.large_bytes_per_s,
            "times_as_fast_as": faster,
            "peak_bytes": dict(peaks),
            "times_less_memory_than": leaner,
            "relative_difference_to_eager": off if math.isfinite(off) else None,
            "agrees": off <= DIFFERENCE[case.dtype],
            "targets": judged,
        }
        self.rows.append(row)
        print(line_of(row), flush=True)


def bound(function: Callable[..., Outputs], case: Case) -> Callable[..., Outputs]:
    return lambda *inputs: function(*inputs, **case.constants)


def sizes(case: Case, function: Callable[..., Outputs]) -> dict[str, int]:
    """Name in `MOVES` -> bytes."""
    with torch.no_grad():
        ys = listed(function(*case.inputs.values()))
    tensors = {**case.inputs, **case.constants, **dict(zip(("y", "sum"), ys, strict=False))}
    return {name: x.nbytes for name, x in tensors.items()}


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"


HEADER = (
    f"{'op':24} {'shape':30} {'dtype':8} {'order':8} {'ours ms':>16} {'GB/s':>6} {'copy':>5}  "
    "as fast as (times); memory; targets"
)


def line_of(row: Mapping[str, Any]) -> str:
    ms = row["ms"]["ours"]
    faster = " ".join(f"{name} {value:.2f}" for name, value in row["times_as_fast_as"].items())
    leaner = " ".join(f"{name} {v:.2f}" for name, v in row["times_less_memory_than"].items())
    judged = "; ".join(
        f"{'met' if t['met'] else 'MISSED'} {t['value']:.2f} of {t['at_least']:g} {t['target']}"
        for t in row["targets"]
    )
    off = "" if row["agrees"] else f"  DIFFERS by {row['relative_difference_to_eager']}"
    return (
        f"{row['op']:24} {row['shape']:30} {row['dtype']:8} {row['order']:8} "
        f"{ms['mean']:8.4f} ± {ms['std']:5.4f} {row['bytes_per_s'] / 1e9:6.0f} "
        f"{100 * row['share_of_copy']:4.0f}%  {faster}; {leaner or '-'}; {judged or '-'}{off}"
    )


def plot(rows: Sequence[Mapping[str, Any]], title: str, path: Path) -> None:
    """Share of the copy's bandwidth of each op and order, of its first shape and dtype."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["text.parse_math"] = False
    from matplotlib import pyplot

    shown: dict[str, dict[str, Any]] = {}
    for row in rows:
        orders = shown.setdefault(row["op"], {})
        same = next(iter(orders.values()), row)
        if row["order"] in ORDERS and (row["shape"], row["dtype"]) == (
            same["shape"],
            same["dtype"],
        ):
            orders[row["order"]] = row
    names = [name for name, orders in shown.items() if len(orders) == len(ORDERS)]
    figure, axes = pyplot.subplots(figsize=(9, 1.6 + 0.52 * len(names)), layout="constrained")
    colours = ("#9ecae1", "#3182bd", "#08306b")  # lighter to darker: the orders
    for i, (order, colour) in enumerate(zip(ORDERS, colours, strict=True)):
        at = [n + 0.26 * (i - 1) for n in range(len(names))]
        shares = [100 * shown[name][order]["share_of_copy"] for name in names]
        axes.barh(at, shares, height=0.24, color=colour, label=order)
        for y, share in zip(at, shares, strict=True):
            # beside the bars' area: a number at a bar's end would stand on the lines
            right = axes.get_yaxis_transform()
            axes.text(1.01, y, f"{share:.0f}", transform=right, va="center", fontsize=7)
    first = [next(iter(shown[name].values())) for name in names]
    labels = [f"{r['op']}\n{r['shape']}, {r['dtype']}" for r in first]
    axes.set_yticks(range(len(names)), labels, fontsize=7)
    axes.axvline(100, color="black", linewidth=0.8)
    for i, row in enumerate(first):
        for target in row["targets"]:
            if target["target"] == SHARE:
                at_least = 100 * target["at_least"]
                axes.vlines(at_least, i - 0.4, i + 0.4, color="#d95f02", linewidth=1.2)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xlabel("share of a device copy's bandwidth, %: bytes by definition; orange: target")
    axes.set_title(title, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper right", ncols=3, frameon=False, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def main() -> int:
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ops", nargs="+", choices=OPS, metavar="OP", default=OPS)
    parser.add_argument(
        "--stages", nargs="+", type=int, choices=STAGES, default=list(STAGES) if gpu else [3, 4]
    )
    parser.add_argument("--batch-size", type=int, default=64 if gpu else 2, help="images")
    parser.add_argument("--rounds", type=int, default=30 if gpu else 3)
    parser.add_argument("--no-compile", action="store_true", help="no torch.compile")
    parser.add_argument(
        "--minutes", type=float, default=5, help="no case or compilation begins after these"
    )
    parser.add_argument("--commit", help="to record where the checkout does not know its own")
    parser.add_argument("--output", type=Path, help="JSON")
    parser.add_argument("--plot", type=Path, help="PNG")
    args = parser.parse_args()

    began = time.perf_counter()
    device = torch.device("cuda" if gpu else "cpu")
    card = torch.cuda.get_device_name() if gpu else "cpu"
    slug = re.sub(r"\W+", "_", card.lower())
    output = args.output or (RESULTS if gpu else ROOT / "runs") / f"kernels_{slug}.json"
    hold(output)
    picture = args.plot or ROOT / "runs" / f"kernels_{slug}.png"
    if not gpu:
        print(NO_MEANING)
    torch.manual_seed(0)
    torch._dynamo.config.trace_autograd_ops = True

    large_bytes = LARGE_COPY if gpu else 64 << 20
    large_copy = cold({"copy": copier(large_bytes, device)}, rounds=args.rounds)["copy"]
    bench = Bench(device, args.rounds, large_copy, large_bytes)
    print(
        f"{card}: a copy of {large_bytes >> 20} MiB moves {bench.large_bytes_per_s / 1e9:.0f} GB/s"
    )
    missing = peers()[1]
    for reason in missing.values():
        print(f"skipped: {reason}")
    record = environment()
    record["commit"] = record["commit"] or args.commit

    def late() -> bool:
        return time.perf_counter() - began > 60 * args.minutes

    def save(complete: bool) -> None:
        content = {
            "device": card,
            "meaningful_times": gpu,
            "complete": complete,
            "batch_size": args.batch_size,
            "rounds": args.rounds,
            "l2_cold": gpu,
            "large_copy": {
                "bytes": large_bytes,
                "bytes_per_s": bench.large_bytes_per_s,
                "ms": milliseconds(large_copy),
            },
            "missing_peers": missing,
            "skipped": bench.skipped,
            "failed": bench.failed,
            "seconds": time.perf_counter() - began,
            "rows": bench.rows,
        }
        write_record(output, content | record)

    print(HEADER)
    for together in (False, True):  # what takes longest, torch.compile, comes last
        what = "all orders together" if together else "each order"
        for spec in specs(args.ops, args.stages):
            name = f"{spec.op}, stage {spec.stage}, {name_of(spec.dtype)}"
            if late():
                bench.skip(name, what, "--minutes were over")
                continue
            try:
                gc.collect()
                if gpu:
                    torch.cuda.empty_cache()
                if together:
                    bench.measure_all(build(spec, args.batch_size, device), not args.no_compile)
                else:
                    bench.measure(build(spec, args.batch_size, device))
            except Exception as error:  # a case that breaks must not take the others along
                bench.fail(name, what, error)
            save(complete=False)
    save(complete=True)

    judged = [t for row in bench.rows for t in row["targets"]]
    wrong = [row for row in bench.rows if not row["agrees"]]
    title = f"{card}, batch {args.batch_size}" + ("" if gpu else f" ({NO_MEANING})")
    if importlib.util.find_spec("matplotlib") is None:
        print("skipped: the picture: matplotlib is not installed")
    elif bench.rows:
        plot(bench.rows, title, picture)
        print(f"picture: {picture}")
    print(
        f"{len(bench.rows)} rows, {sum(t['met'] for t in judged)} of {len(judged)} targets met, "
        f"{len(bench.skipped)} skipped, {len(bench.failed)} failed, {len(wrong)} differ from eager "
        f"-> {output}"
    )
    if not gpu:
        print(NO_MEANING)
    return int(bool(wrong or bench.failed))


if __name__ == "__main__":
    sys.exit(main())
