"""Time, bandwidth and memory of every op of fastgn_kernels, in each order of differentiation.

Each op is timed against eager PyTorch and torch.compile, beside a device copy of as many bytes.

    python -m benchmarks.kernels.ops  # on a GPU: Swin-B's shapes, 64 images, within --minutes
    python -m benchmarks.kernels.ops --ops gelu layer_norm --no-compile
    PYTHONPATH=.:kernels python -m benchmarks.kernels.ops  # with torch, triton and numpy alone

A row is one order. `forward` is the op. `backward` gives all its gradients. `second` is what a
gradient penalty needs: from the cotangent of the gradient to the op's first input, the gradients to
the backward's cotangents and to all inputs. Each is timed alone, on a graph that was built before.
`all` is the three in one function, which torch.compile takes. PyTorch's fused attention (sdpa) has
first orders only.

Bytes are what the op needs by definition, not what a kernel happens to move: each tensor that the
order needs is read once, and each that it returns is written once (`MOVES`). The copy moves as many
bytes, half read and half written, in the same rounds. `share_of_copy` is its median time over the
op's, and `share_of_large_copy` compares with a copy of 2 GiB. Caches are empty before each call.
Peak memory is what a call allocates above inputs and cotangents, its graph included.

Writes benchmarks/results/kernels_<card>.json after every case. On a CPU it runs small shapes, its
times mean nothing, and it writes to runs/.
"""

import argparse
import dataclasses
import functools
import gc
import itertools
import math
import os
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
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

from benchmarks.common.arguments import device_name, gpu_output, make_parser
from benchmarks.common.records import write_record
from benchmarks.common.tables import Record, make_table, with_notes
from benchmarks.common.timing import Timing, cold

try:
    from fastgn.metrics import environment
except ImportError as error:  # a borrowed machine may lack the trainer's packages
    LACKING = str(error)

    def environment() -> dict[str, Any]:
        """Returns what can be known of versions and hardware without the trainer."""
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
"""Stage of Swin-B at 224 pixels -> (tokens per side, channels, heads)."""
SIDE, WINDOW, HEAD_DIM, CLASSES = 224, 7, 32, 1000
LARGE_COPY = 2 << 30
DIFFERENCE = {torch.bfloat16: 0.03, torch.float32: 1e-3}
"""Largest relative L2 difference between our op and PyTorch's that does not count as an error.

bfloat16 keeps 8 bits, and PyTorch rounds to them after each operator.
"""

SHARE, LEANER = "share of copy bandwidth", "times_less_memory_than"

Outputs = Tensor | tuple[Tensor, ...]


@dataclasses.dataclass(frozen=True)
class Case:
    """One op of fastgn_kernels with inputs of one shape and dtype."""

    op: str
    shape: str
    dtype: torch.dtype
    ours: Callable[..., Outputs]
    eager: Callable[..., Outputs]
    inputs: Mapping[str, Tensor]
    """Name of each tensor input that is differentiated -> the tensor."""
    constants: Mapping[str, Tensor]
    """Keyword arguments of the op that are not differentiated."""
    peers: Mapping[str, Callable[..., Outputs]] = dataclasses.field(default_factory=dict)
    """Name of another implementation of the op -> its function. Only forward and backward are
    timed."""


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
"""Name of an op -> tensors that forward, backward and second order read, "->", tensors they write.

v is the cotangent of the first input's gradient. A g before a tensor's name means its gradient.
"""

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
    """Returns the names of the tensors that an op reads, and of those that it writes.

    order: "forward", "backward" or "second" (the backward of the backward).
    """
    read, written = MOVES[SAME_MOVES.get(op, op)][ORDERS.index(order)].split("->")
    return read.split(), written.split()


def size(name: str, sizes: Mapping[str, int]) -> int:
    """Returns the number of bytes of a tensor. A gradient, such as gx, is as large as its tensor x.

    name: name of the tensor in `MOVES`. sizes: name of a tensor -> its bytes.
    """
    if name == "v":
        return next(iter(sizes.values()))
    while name not in sizes:
        assert name.startswith("g"), f"{name} is none of {', '.join(sizes)}"
        name = name[1:]
    return sizes[name]


def bytes_moved(op: str, order: str, sizes: Mapping[str, int]) -> int:
    """Returns the bytes that one order of differentiation of an op has to read and write.

    sizes: name of a tensor -> its bytes. The op's first input comes first.
    """
    read, written = moves(op, order)
    return sum(size(name, sizes) for name in read + written)


def targets(
    op: str, order: str, share: float, faster: float, leaner: float
) -> list[dict[str, Any]]:
    """Returns the goals for an op in one order of differentiation, and whether they are reached.

    share: bandwidth of the op over that of a copy. faster, leaner: time and peak memory of PyTorch
    over those of our kernel. A kernel that beats PyTorch in neither should be removed.
    """
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


def sdpa(qkv: Tensor, bias: Tensor, mask: Tensor | None = None) -> Tensor:
    """Calls PyTorch's fused attention, which timm uses. Its backward cannot be differentiated."""
    added = bias[None]
    if mask is not None:
        added = (mask[:, None] + added).repeat(qkv.shape[1] // mask.shape[0], 1, 1, 1)
    q, k, v = qkv.unbind()
    return F.scaled_dot_product_attention(q, k, v, added.expand(qkv.shape[1], -1, -1, -1))


def shift_mask(side: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Returns Swin's mask (windows, N, N): -100 between tokens from opposite edges of the image."""
    band = torch.zeros(side, device=device)
    band[-WINDOW:] = 1
    band[-(WINDOW // 2) :] = 2
    region = band[:, None] * 3 + band
    windows = region.unfold(0, WINDOW, WINDOW).unfold(1, WINDOW, WINDOW).reshape(-1, WINDOW**2)
    return torch.where(windows[:, None] != windows[..., None], -100.0, 0.0).to(dtype)


class CaseKey(NamedTuple):
    """Op, stage and dtype that one measurement is made with."""

    op: str
    stage: int
    """Stage of Swin-B whose shapes are used, 0 for an op that exists in no stage."""
    dtype: torch.dtype


def choose_cases(ops: Sequence[str], stages: Sequence[int]) -> list[CaseKey]:
    """Returns the measurements to make: the first one of every op, then the second ones, and so on.

    If time runs out, each op has therefore been measured at least once. stages: stages of Swin-B.
    """
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
        by_op.append([CaseKey(op, stage, dtype) for stage in at for dtype in dtypes])
    return [spec for rank in itertools.zip_longest(*by_op) for spec in rank if spec]


def build(spec: CaseKey, batch: int, device: torch.device) -> Case:
    """Returns the tensors and functions for one measurement, at Swin-B's shapes.

    batch: number of images.
    """
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
        ours, eager = layer_norm, reference.layer_norm
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
    """Returns the outputs of an op as a list, even if there is only one."""
    return [y] if isinstance(y, Tensor) else list(y)


def requests(
    function: Callable[..., Outputs],
    inputs: Sequence[Tensor],
    gys: Sequence[Tensor],
    v: Tensor | None,
) -> dict[str, Callable[[], Sequence[Tensor | None]]]:
    """Returns a function that computes each order of differentiation: name of the order ->
    function.

    The graph is built here, so that each function computes its own order alone. gys: cotangents of
    the outputs. v: cotangent of the first input's gradient. None leaves out the second order.
    """
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
    """Returns the results of all orders of differentiation up to `order`, computed from the inputs.

    gys: cotangents of the outputs. v: cotangent of the first input's gradient. wanted: which
    cotangents and inputs have a gradient of second order. None means that autograd finds out.
    """
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
    """Returns the largest number of bytes that a call allocates, with its results. None on a
    CPU."""
    if not torch.cuda.is_available():
        return None
    run()  # makes the workspaces of libraries, which stay
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return torch.cuda.max_memory_allocated() - before


def copier(moved: int, device: torch.device) -> Callable[[], Tensor]:
    """Returns a function that copies memory on the device: it reads moved / 2 bytes and writes as
    many."""
    source = torch.ones(max(moved // 2, 1), dtype=torch.uint8, device=device)
    to = torch.empty_like(source)
    return lambda: to.copy_(source)


def milliseconds(timing: Timing) -> dict[str, float]:
    """Returns the measured times in milliseconds, in the form that the JSON record has."""
    return {
        "mean": timing.mean * 1e3,
        "std": timing.std * 1e3,
        "median": timing.median * 1e3,
        "n": len(timing.rounds),
    }


def difference(ours: Sequence[Tensor | None], eager: Sequence[Tensor | None]) -> float:
    """Returns the largest relative L2 difference between our results and PyTorch's. None counts as
    zero."""
    errors = [0.0]
    for x, y in zip(ours, eager, strict=True):
        x, y = (torch.zeros(()) if z is None else z.detach().double() for z in (x, y))
        errors.append(float((x.to(y.device) - y).norm() / y.norm().clamp_min(1e-30)))
    return math.nan if any(map(math.isnan, errors)) else max(errors)


class OpBench:
    """Measures ops and collects the results for the JSON record."""

    def __init__(self, device: torch.device, rounds: int, large_copy: Timing, large_bytes: int):
        self.device = device
        self.rounds = rounds
        self.large_bytes_per_s = large_bytes / large_copy.median
        self.meaningful = device.type == "cuda"
        self.rows: list[dict[str, Any]] = []
        self.skipped: list[str] = []
        """Measurements that were not made, each with the reason, one line each."""
        self.failed: list[str] = []
        """Measurements that failed, each with the error, one line each."""

    def skip(self, op: str, what: str, why: str) -> None:
        self.skipped.append(f"{op}: {what}: {why}")
        print(f"skipped: {self.skipped[-1]}", flush=True)

    def fail(self, op: str, what: str, error: Exception) -> None:
        self.failed.append(f"{op}: {what}: {first_line(error)}")
        print(f"FAILED: {self.failed[-1]}", flush=True)

    def measure(self, case: Case) -> None:
        """Measures forward, backward and second order of an op separately."""
        ours, eager, inputs, gys, v = self.prepare(case)
        asked = {"ours": requests(ours, inputs, gys, v), "eager": requests(eager, inputs, gys, v)}
        for name, peer in case.peers.items():
            try:
                asked[name] = requests(bound(peer, case), inputs, gys, None)
                for run in asked[name].values():
                    run()
            except Exception as error:  # the limits of other libraries
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
        """Measures forward, backward and second order of an op in one function, also with
        torch.compile."""
        ours, eager, inputs, gys, v = self.prepare(case)
        arms: dict[str, Callable] = {
            "ours": lambda: through(ours, inputs, gys, v),
            "eager": lambda: through(eager, inputs, gys, v),
        }
        if compiled:
            try:
                arms["compile"] = self.compiled(eager, inputs, gys, v)
            except Exception as error:  # the compiler fails on PyTorch's own operators
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
        """Returns a function, compiled by torch.compile, that computes all three orders of an
        op."""
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
        """Returns our op, PyTorch's version, the inputs, the outputs' cotangents, and v.

        v is the cotangent of the first input's gradient.
        """
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
        """Times all implementations of an op and a copy of as many bytes, and adds the results.

        order: order of differentiation. moved: bytes that it has to move. arms: name of an
        implementation -> function that is timed. peaks: name of an implementation -> its peak
        memory in bytes.
        """
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
    """Returns the function with its constant arguments filled in, so that it takes the inputs
    alone."""
    return lambda *inputs: function(*inputs, **case.constants)


def sizes(case: Case, function: Callable[..., Outputs]) -> dict[str, int]:
    """Returns the number of bytes of each tensor that the op reads or writes, by its name in
    `MOVES`."""
    with torch.no_grad():
        ys = listed(function(*case.inputs.values()))
    tensors = {**case.inputs, **case.constants, **dict(zip(("y", "sum"), ys, strict=False))}
    return {name: x.nbytes for name, x in tensors.items()}


def name_of(dtype: torch.dtype) -> str:
    """Returns a dtype's name without "torch."."""
    return str(dtype).removeprefix("torch.")


def first_line(error: Exception) -> str:
    """Returns an error's class and the first line of its message."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"


HEADER = (
    f"{'op':24} {'shape':30} {'dtype':8} {'order':8} {'ours ms':>16} {'GB/s':>6} {'copy':>5}  "
    "as fast as (times); memory; targets"
)


def line_of(row: Mapping[str, Any]) -> str:
    """Returns the results of one measurement as a line for the terminal."""
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


def table(record: Record) -> str:
    """Returns this benchmark's Markdown table, made from its JSON record.

    It shows each op at the first shape and dtype that was measured.
    """
    ops: dict[str, dict[str, Any]] = {}
    for row in record["rows"]:
        first = ops.setdefault(row["op"], {"shape": row["shape"], "dtype": row["dtype"]})
        if (row["shape"], row["dtype"]) == (first["shape"], first["dtype"]):
            first[row["order"]] = row
    # the record says why an op lacks an order
    shown = [{"op": op, **orders} for op, orders in ops.items() if {*ORDERS} <= orders.keys()]

    def shares(row: Any) -> str:
        return ", ".join(f"{100 * row[order]['share_of_copy']:.0f} %" for order in ORDERS)

    def second(row: Any) -> str:
        faster, leaner = (row["second"][k]["eager"] for k in ("times_as_fast_as", LEANER))
        return f"{faster:.2f} ({leaner:.2f})"

    def compiled(row: Any) -> str:
        ratio = row.get("all", {}).get("times_as_fast_as", {}).get("compile")
        return "" if ratio is None else f"{ratio:.2f}"

    def met(row: Any) -> str:
        judged = [t["met"] for r in record["rows"] if r["op"] == row["op"] for t in r["targets"]]
        return f"{sum(judged)} of {len(judged)}"

    columns = {
        "op": lambda r: r["op"],
        "shape": lambda r: r["shape"],
        "share of copy bandwidth: forward, backward, second": shares,
        "second: eager / fused, time (memory)": second,
        "all: compiled / fused, time": compiled,
        "targets": met,
    }
    note = (
        f"{record['device']}, batch {record['batch_size']}, {shown[-1]['dtype']}, medians of "
        f"{record['rounds']} calls with a cold cache"
    )
    judged = "targets over all shapes, dtypes and orders"
    triton_version = f"triton {record['versions']['triton']}"
    return with_notes(make_table(shown, columns), record, note, judged, triton_version)


def run(args: argparse.Namespace) -> int:
    """Measures all ops, and writes the JSON record after each measurement.

    Returns 1 if an op failed or differs from PyTorch, else 0.
    """
    began, gpu, card = time.perf_counter(), torch.cuda.is_available(), device_name()
    device, output = torch.device("cuda" if gpu else "cpu"), gpu_output(args, "kernels")
    if not gpu:
        print(NO_MEANING)
    torch.manual_seed(0)
    torch._dynamo.config.trace_autograd_ops = True
    large_bytes = LARGE_COPY if gpu else 64 << 20
    large_copy = cold({"copy": copier(large_bytes, device)}, rounds=args.rounds)["copy"]
    bench = OpBench(device, args.rounds, large_copy, large_bytes)
    rate = bench.large_bytes_per_s
    print(f"{card}: a copy of {large_bytes >> 20} MiB moves {rate / 1e9:.0f} GB/s")
    known = environment()
    known["commit"] = known["commit"] or args.commit

    def save(complete: bool) -> None:
        large = {"bytes": large_bytes, "bytes_per_s": rate, "ms": milliseconds(large_copy)}
        content = {
            "device": card,
            "meaningful_times": gpu,
            "complete": complete,
            "batch_size": args.batch_size,
            "rounds": args.rounds,
            "l2_cold": gpu,
            "large_copy": large,
            "skipped": bench.skipped,
            "failed": bench.failed,
            "seconds": time.perf_counter() - began,
            "rows": bench.rows,
        }
        write_record(output, content | known)

    print(HEADER)
    for together in (False, True):  # torch.compile comes last, because it takes longest
        what = "all orders together" if together else "each order"
        for key in choose_cases(args.ops, args.stages):
            name = f"{key.op}, stage {key.stage}, {name_of(key.dtype)}"
            if time.perf_counter() - began > 60 * args.minutes:
                bench.skip(name, what, "--minutes were over")
                continue
            try:
                gc.collect()
                if gpu:
                    torch.cuda.empty_cache()
                case = build(key, args.batch_size, device)
                if together:
                    bench.measure_all(case, not args.no_compile)
                else:
                    bench.measure(case)
            except Exception as error:  # the other cases go on
                bench.fail(name, what, error)
            save(complete=False)
    save(complete=True)
    judged = [t["met"] for row in bench.rows for t in row["targets"]]
    wrong = [row for row in bench.rows if not row["agrees"]]
    print(
        f"{len(bench.rows)} rows, {sum(judged)} of {len(judged)} targets met, "
        f"{len(bench.skipped)} skipped, {len(bench.failed)} failed, {len(wrong)} differ from eager "
        f"-> {output}"
    )
    if not gpu:
        print(NO_MEANING)
    return int(bool(wrong or bench.failed))


def main() -> int:
    """Parses the command line, runs the benchmark, and returns the exit status.

    The status is 1 if an op failed or differs from PyTorch, and else 0.
    """
    gpu = torch.cuda.is_available()
    stages = list(STAGES) if gpu else [3, 4]
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--ops", nargs="+", choices=OPS, metavar="OP", default=OPS, help="default: all")
    add("--stages", nargs="+", type=int, choices=STAGES, default=stages, help="stages of Swin-B")
    add("--batch-size", type=int, default=64 if gpu else 2, help="number of images")
    add("--rounds", type=int, default=30 if gpu else 3)
    add("--no-compile", action="store_true", help="do not measure torch.compile")
    add("--minutes", type=float, default=5, help="begin no case after so many minutes")
    add("--commit", help="commit to record if the checkout does not know its own")
    return run(parser.parse_args())


if __name__ == "__main__":
    sys.exit(main())
