"""Measures time, bandwidth and memory of each op of fastgn_kernels and of its derivatives.

Each op is compared with eager PyTorch, and with a copy of as many bytes on the device.

    python -m benchmarks.kernels.ops  # on a GPU: Swin-B's shapes, 64 images, within --minutes
    python -m benchmarks.kernels.ops --ops gelu layer_norm

A row of the results is one order of differentiation. `forward` runs the op. `backward` computes the
gradients with respect to all inputs. `second` is what a gradient penalty needs: it differentiates
the gradient of the first input once more, with respect to the cotangents of the backward and all
inputs. Each order is timed alone, on a graph that was built before.

The bytes of a row count each tensor that the order needs as read once, and each result as written
once (`Family.moves`), even if a kernel moves more. The copy moves as many bytes in the same rounds:
it reads half of them and writes half. `share_of_copy` is the copy's median time over the op's, and
`share_of_large_copy` compares the bandwidth with a copy of 2 GiB. Caches are cold before each call.
Peak memory is what a call allocates besides inputs and cotangents, including its graph.

Writes benchmarks/results/kernels_<card>.json after every case. On a CPU it runs small shapes, its
times mean nothing, and it writes to runs/.
"""

import argparse
import dataclasses
import functools
import gc
import itertools
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
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
from fastgn.errors import first_line
from fastgn.metrics import environment

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

Outputs = Tensor | tuple[Tensor, ...]
Function = Callable[..., Outputs]


@dataclasses.dataclass(frozen=True)
class Family:
    """Ops that need the same tensors and have the same goals."""

    moves: str
    """Tensors read -> tensors written in the forward; in the backward; in the second order.

    v is the cotangent of the first input's gradient. A g before a tensor's name means its gradient.
    """
    share_of_copy: float = 0.0
    """Goal for the bandwidth: at least this share of a copy's bandwidth. 0 means no goal."""
    faster: float = 0.0
    """Goal: at least so many times as fast as PyTorch in the second order. 0 means no goal."""
    leaner: float = 0.0
    """Goal: PyTorch's peak memory over ours in the second order, at least. 0 means no goal."""


FAMILIES = {
    "activation": Family("x -> y; gy x -> gx; v gy x -> ggy gx", 0.9, 2.5),
    "bias_activation": Family(
        "x bias -> y; gy x bias -> gx gbias; v gy x bias -> ggy gx gbias", 0.9, 2.5
    ),
    "layer_norm": Family(
        "x weight bias -> y; gy x weight -> gx gweight gbias; v gy x weight -> ggy gx gweight",
        *(0.8, 4),
    ),
    # both inputs have the same gradient gx, and the gradient of gsum is v: neither is written twice
    "add_layer_norm": Family(
        "x residual weight bias -> y sum; gy gsum sum weight -> gx gweight gbias; "
        "v gy sum weight -> ggy gx gweight",
        *(0.8, 4),
    ),
    "window_attention": Family(
        "qkv bias -> y; gy qkv bias -> gqkv gbias; v gy qkv bias -> ggy gqkv gbias", 0, 5, 4
    ),
    "shifted_window_attention": Family(
        "qkv bias mask -> y; gy qkv bias mask -> gqkv gbias; v gy qkv bias mask -> ggy gqkv gbias",
        *(0, 5, 4),
    ),
    "cross_entropy": Family(
        "logits targets -> y; gy logits targets -> glogits; v gy logits targets -> ggy glogits"
    ),
    # the second derivative of L1 with respect to x is zero, so it is not written
    "gradient_norm_l1": Family("x -> y; gy x -> gx; v x -> ggy"),
    "gradient_norm_l2": Family("x -> y; gy x y -> gx; v gy x y -> ggy gx"),
}
"""Name of a family -> the tensors that it reads and writes, and its goals."""


class Size(NamedTuple):
    """Sizes from which the shapes of an op's inputs are made."""

    images: int
    side: int
    """Tokens per side of the feature map."""
    channels: int
    heads: int

    @property
    def rows(self) -> int:
        """Number of tokens of all images."""
        return self.images * self.side**2

    @property
    def windows(self) -> int:
        """Number of windows of all images."""
        return self.rows // WINDOW**2


@dataclasses.dataclass(frozen=True)
class Op:
    """One op of fastgn_kernels: how to call it, and which inputs it is measured with."""

    family: str
    ours: Function
    eager: Function
    shapes: Callable[[Size], dict[str, tuple[int, ...]]]
    """Takes the sizes and returns the name and shape of each input that is differentiated."""
    constants: Callable[[Size, torch.dtype], dict[str, Tensor]] = lambda size, dtype: {}
    """Takes sizes and dtype and returns the arguments that are not differentiated, on the CPU."""
    stages: str = "first"
    """Stages of Swin-B at which the op is measured: "all", the "first", or "none"."""
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float32)


def shift_mask(size: Size, dtype: torch.dtype) -> dict[str, Tensor]:
    """Returns Swin's mask (windows, N, N): -100 between tokens from opposite edges of the image."""
    band = torch.zeros(size.side)
    band[-WINDOW:] = 1
    band[-(WINDOW // 2) :] = 2
    region = band[:, None] * 3 + band
    windows = region.unfold(0, WINDOW, WINDOW).unfold(1, WINDOW, WINDOW).reshape(-1, WINDOW**2)
    masked = windows[:, None] != windows[..., None]
    return {"mask": torch.where(masked, -100.0, 0.0).to(dtype)}


def hidden(size: Size) -> dict[str, tuple[int, ...]]:
    """Returns the shape of the input of an MLP's activation."""
    return {"x": (size.rows, 4 * size.channels)}


def tokens(size: Size) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of LayerNorm's inputs."""
    one = (size.channels,)
    return {"x": (size.rows, size.channels), "weight": one, "bias": one}


def eager_attention(qkv: Tensor, bias: Tensor, mask: Tensor | None = None) -> Tensor:
    """Calls PyTorch's version of window attention, which takes query, key and value separately."""
    return reference.window_attention(*qkv.unbind(), bias, mask)


ATTENTION = {
    "ours": window_attention_qkvpacked,
    "eager": eager_attention,
    "shapes": lambda s: {
        "qkv": (s.windows, WINDOW**2, 3, s.heads, HEAD_DIM),
        "bias": (s.heads, WINDOW**2, WINDOW**2),
    },
    "stages": "all",
}


def activation_op(kind: str, **more: Any) -> Op:
    """Returns the description of an activation. more: further fields of Op."""
    ours, eager = (functools.partial(f, kind=kind) for f in (activation, reference.activation))
    return Op("activation", ours, eager, hidden, **more)


def cross_entropy_op(targets: Callable[[Size], Tensor]) -> Op:
    """Returns the description of cross-entropy. targets: function that makes the targets."""
    ours, eager = (
        functools.partial(f, reduction="none") for f in (cross_entropy, reference.cross_entropy)
    )
    shapes = lambda s: {"logits": (s.images, CLASSES)}  # noqa: E731
    constants = lambda s, dtype: {"targets": targets(s)}  # noqa: E731
    return Op("cross_entropy", ours, eager, shapes, constants, "none")


def gradient_norm_op(ord: int) -> Op:
    """Returns the description of the gradient's norm. ord: 1 or 2."""
    ours, eager = (functools.partial(f, ord=ord) for f in (gradient_norm, reference.gradient_norm))
    shapes = lambda s: {"x": (s.images, 3, SIDE, SIDE)}  # noqa: E731
    return Op(f"gradient_norm_l{ord}", ours, eager, shapes, stages="none")


OPS: dict[str, Op] = {
    # the other kinds differ from gelu only in arithmetic, so one shape and dtype is enough for them
    **{kind: activation_op(kind, dtypes=(torch.bfloat16,)) for kind in ACTIVATIONS},
    "gelu": activation_op("gelu", stages="all"),
    "bias_gelu": Op(
        "bias_activation",
        lambda x, bias: activation(x, "gelu", bias),
        lambda x, bias: reference.activation(x, "gelu", bias),
        lambda s: {**hidden(s), "bias": (4 * s.channels,)},
    ),
    "layer_norm": Op("layer_norm", layer_norm, reference.layer_norm, tokens, stages="all"),
    "add_layer_norm": Op(
        "add_layer_norm",
        lambda x, r, weight, bias: layer_norm(x, weight, bias, residual=r),
        lambda x, r, weight, bias: reference.layer_norm(x, weight, bias, residual=r),
        lambda s: {"x": tokens(s)["x"], "residual": tokens(s)["x"], **tokens(s)},
    ),
    "window_attention": Op("window_attention", **ATTENTION),
    "shifted_window_attention": Op("shifted_window_attention", constants=shift_mask, **ATTENTION),
    "cross_entropy_index": cross_entropy_op(lambda s: torch.randint(CLASSES, (s.images,))),
    "cross_entropy_soft": cross_entropy_op(lambda s: torch.rand(s.images, CLASSES).softmax(1)),
    "gradient_norm_l1": gradient_norm_op(1),
    "gradient_norm_l2": gradient_norm_op(2),
}
"""Name of each op -> its description."""


def tensor_bytes(name: str, sizes: Mapping[str, int]) -> int:
    """Returns the number of bytes of a tensor. A gradient, such as gx, is as large as its tensor x.

    name: name of the tensor in `Family.moves`. sizes: name of a tensor -> its bytes.
    """
    if name == "v":
        return next(iter(sizes.values()))
    while name not in sizes:
        assert name.startswith("g"), f"{name} is none of {', '.join(sizes)}"
        name = name[1:]
    return sizes[name]


def bytes_moved(op: str, order: str, sizes: Mapping[str, int]) -> int:
    """Returns the bytes that one order of differentiation of an op has to read and write.

    order: "forward", "backward" or "second" (the backward of the backward). sizes: name of a tensor
    -> its bytes. The op's first input comes first.
    """
    moves = FAMILIES[OPS[op].family].moves.split(";")[ORDERS.index(order)].replace("->", "")
    return sum(tensor_bytes(name, sizes) for name in moves.split())


def targets(
    op: str, order: str, share: float, faster: float, leaner: float
) -> list[dict[str, Any]]:
    """Returns the goals for an op in one order of differentiation, and whether they are reached.

    share: bandwidth of the op over that of a copy. faster, leaner: time and peak memory of PyTorch
    over those of our kernel. A kernel that beats PyTorch in neither should be removed.
    """
    family, twice = FAMILIES[OPS[op].family], order == "second"
    wanted = (
        ("share of copy bandwidth", share, family.share_of_copy),
        ("times as fast as eager", faster, family.faster if twice else 0),
        ("times less peak memory than eager", leaner, family.leaner if twice else 0),
    )
    rows = [
        {"target": name, "value": value, "at_least": least, "met": value >= least}
        for name, value, least in wanted
        if least
    ]
    best = {"target": "better than eager in time or memory", "value": max(faster, leaner)}
    return [*rows, best | {"at_least": 1, "met": best["value"] > 1}]


class CaseKey(NamedTuple):
    """Op, stage and dtype that one measurement is made with."""

    op: str
    stage: int
    """Stage of Swin-B whose shapes are used, 0 for an op that exists in no stage."""
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.op}, stage {self.stage}, {name_of(self.dtype)}"


@dataclasses.dataclass(frozen=True)
class Case:
    """One op of fastgn_kernels with inputs of one shape and dtype."""

    key: CaseKey
    shape: str
    ours: Function
    eager: Function
    inputs: Mapping[str, Tensor]
    """Name of each tensor input that is differentiated -> the tensor."""
    constants: Mapping[str, Tensor]
    """Name of each tensor input that is not differentiated -> the tensor."""


def choose_cases(ops: Sequence[str], stages: Sequence[int]) -> list[CaseKey]:
    """Returns the measurements to make: the first one of every op, then the second ones, and so on.

    If time runs out, each op has therefore been measured at least once. stages: stages of Swin-B.
    """
    by_op = []
    for name in ops:
        # Swin does not shift the windows of a stage that has only one
        fitting = [s for s in stages if STAGES[s][0] > WINDOW or not name.startswith("shifted")]
        at = {"all": fitting, "first": stages[:1], "none": [0]}[OPS[name].stages]
        by_op.append([CaseKey(name, stage, dtype) for stage in at for dtype in OPS[name].dtypes])
    return [key for rank in itertools.zip_longest(*by_op) for key in rank if key]


def build(key: CaseKey, batch: int, device: torch.device) -> Case:
    """Returns the tensors and functions for one measurement, at Swin-B's shapes.

    batch: number of images.
    """
    op, size = OPS[key.op], Size(batch, *STAGES.get(key.stage, (0, 0, 0)))
    constants = {k: x.to(device) for k, x in op.constants(size, key.dtype).items()}
    inputs = {
        name: torch.randn(shape, device=device, dtype=key.dtype)
        for name, shape in op.shapes(size).items()
    }
    shape = " x ".join(map(str, next(iter(inputs.values())).shape))
    if "qkv" in inputs:
        inputs["qkv"] = inputs["qkv"].permute(2, 0, 3, 1, 4)  # strides of a linear layer's output
        shape = f"{size.windows} windows x {size.heads} heads"
    return Case(
        key,
        f"stage {key.stage}: {shape}" if key.stage else shape,
        functools.partial(op.ours, **constants),
        functools.partial(op.eager, **constants),
        {name: x.requires_grad_() for name, x in inputs.items()},
        constants,
    )


def listed(y: Outputs) -> list[Tensor]:
    """Returns the outputs of an op as a list, even if there is only one."""
    return [y] if isinstance(y, Tensor) else list(y)


def requests(
    function: Function, inputs: Sequence[Tensor], gys: Sequence[Tensor], v: Tensor
) -> dict[str, Callable[[], Sequence[Tensor | None]]]:
    """Returns the name of each differentiation order -> a function that computes only this order.

    The graph is built here, before the functions are called. gys: cotangents of the outputs.
    v: cotangent of the first input's gradient.
    """
    ys = listed(function(*inputs))
    gx = torch.autograd.grad(ys, inputs, gys, create_graph=True)[0]
    return {
        "forward": lambda: listed(function(*inputs)),
        "backward": lambda: torch.autograd.grad(ys, inputs, gys, retain_graph=True),
        "second": lambda: torch.autograd.grad(
            gx, [*gys, *inputs], v, retain_graph=True, allow_unused=True
        ),
    }


def through(
    function: Function, inputs: Sequence[Tensor], gys: Sequence[Tensor], v: Tensor, order: str
) -> list[Tensor | None]:
    """Returns the results of all orders of differentiation up to `order`, computed from the inputs.

    gys: cotangents of the outputs. v: cotangent of the first input's gradient.
    """
    found = ys = listed(function(*inputs))
    if order != "forward":
        twice = order == "second"
        gxs = torch.autograd.grad(ys, inputs, gys, create_graph=twice)
        found = [*ys, *gxs]
        if twice:
            found += torch.autograd.grad(gxs[0], [*gys, *inputs], v, allow_unused=True)
    return found


def peak_bytes(run: Callable[[], object]) -> int | None:
    """Returns the most bytes that a call holds at a time with its results, or None on a CPU."""
    if not torch.cuda.is_available():
        return None
    run()  # allocates the workspaces of libraries, which stay allocated
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return torch.cuda.max_memory_allocated() - before


def copier(moved: int, device: torch.device) -> Callable[[], Tensor]:
    """Returns a function that reads moved / 2 bytes on the device and writes as many elsewhere."""
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
    """Returns the largest relative L2 difference of our results to PyTorch's. None counts as 0."""
    errors = [0.0]
    for x, y in zip(ours, eager, strict=True):
        x, y = (torch.zeros(()) if z is None else z.detach().double() for z in (x, y))
        errors.append(float((x.to(y.device) - y).norm() / y.norm().clamp_min(1e-30)))
    return math.nan if any(map(math.isnan, errors)) else max(errors)


def measure(
    case: Case, rounds: int, large_bytes_per_s: float, meaningful: bool
) -> Iterator[dict[str, Any]]:
    """Times forward, backward and second order of an op, and yields a row of the record for each.

    large_bytes_per_s: bandwidth of a large copy. meaningful: whether the times mean something, so
    that the goals are judged.
    """
    op, inputs = case.key.op, list(case.inputs.values())
    functions = {"ours": case.ours, "eager": case.eager}
    with torch.no_grad():
        gys = [torch.randn_like(y).requires_grad_() for y in listed(case.ours(*inputs))]
    v = torch.randn_like(inputs[0])
    asked = {name: requests(f, inputs, gys, v) for name, f in functions.items()}
    for order in ORDERS:
        moved = bytes_moved(op, order, sizes(case))
        arms: dict[str, Callable] = {name: runs[order] for name, runs in asked.items()}
        peaks = {
            name: peak_bytes(functools.partial(through, f, inputs, gys, v, order))
            for name, f in functions.items()
        }
        off = difference(arms["ours"](), arms["eager"]())
        timings = cold({**arms, "copy": copier(moved, v.device)}, rounds=rounds)
        seconds = {name: timing.median for name, timing in timings.items()}
        share, faster = (seconds[name] / seconds["ours"] for name in ("copy", "eager"))
        leaner = peaks["eager"] / max(peaks["ours"], 1) if peaks["ours"] is not None else None
        yield {
            "op": op,
            "shape": case.shape,
            "dtype": name_of(case.key.dtype),
            "order": order,
            "bytes": moved,
            "ms": {name: milliseconds(timing) for name, timing in timings.items()},
            "bytes_per_s": moved / seconds["ours"],
            "share_of_copy": share,
            "share_of_large_copy": moved / seconds["ours"] / large_bytes_per_s,
            "times_as_fast_as": {"eager": faster},
            "peak_bytes": peaks,
            "times_less_memory_than": {} if leaner is None else {"eager": leaner},
            "relative_difference_to_eager": off if math.isfinite(off) else None,
            "agrees": off <= DIFFERENCE[case.key.dtype],
            "targets": targets(op, order, share, faster, leaner) if meaningful else [],
        }


def sizes(case: Case) -> dict[str, int]:
    """Returns the bytes of each tensor of the op, by the tensor's name in `Family.moves`."""
    with torch.no_grad():
        ys = listed(case.ours(*case.inputs.values()))
    tensors = {**case.inputs, **case.constants, **dict(zip(("y", "sum"), ys, strict=False))}
    return {name: x.nbytes for name, x in tensors.items()}


def name_of(dtype: torch.dtype) -> str:
    """Returns a dtype's name without "torch."."""
    return str(dtype).removeprefix("torch.")


def line_of(row: Mapping[str, Any]) -> str:
    """Returns the results of one measurement as a line for the terminal."""
    ms, missed = row["ms"]["ours"], [t["target"] for t in row["targets"] if not t["met"]]
    off = "" if row["agrees"] else f"DIFFERS by {row['relative_difference_to_eager']}"
    return (
        f"{row['op']:24} {row['shape']:30} {row['dtype']:8} {row['order']:8} "
        f"{ms['mean']:8.4f} ± {ms['std']:5.4f} ms, {100 * row['share_of_copy']:4.0f} % of a copy, "
        f"{row['times_as_fast_as']['eager']:.2f} times as fast as eager "
        f"{'; '.join(f'MISSED {name}' for name in missed)} {off}"
    ).rstrip()


def table(record: Record) -> str:
    """Returns this benchmark's Markdown table, made from its JSON record.

    It shows each op at the first shape and dtype that was measured.
    """
    ops: dict[str, dict[str, Any]] = {}
    for row in record["rows"]:
        first = ops.setdefault(row["op"], {"shape": row["shape"], "dtype": row["dtype"]})
        if (row["shape"], row["dtype"]) == (first["shape"], first["dtype"]):
            first[row["order"]] = row
    # if an op lacks an order, its row is left out, and the record says why
    shown = [{"op": op, **orders} for op, orders in ops.items() if {*ORDERS} <= orders.keys()]

    def shares(row: Any) -> str:
        return ", ".join(f"{100 * row[order]['share_of_copy']:.0f} %" for order in ORDERS)

    def second(row: Any) -> str:
        faster, leaner = (
            row["second"][k]["eager"] for k in ("times_as_fast_as", "times_less_memory_than")
        )
        return f"{faster:.2f} ({leaner:.2f})"

    def met(row: Any) -> str:
        judged = [t["met"] for r in record["rows"] if r["op"] == row["op"] for t in r["targets"]]
        return f"{sum(judged)} of {len(judged)}"

    columns = {
        "op": lambda r: r["op"],
        "shape": lambda r: r["shape"],
        "share of copy bandwidth: forward, backward, second": shares,
        "second: eager / fused, time (memory)": second,
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
    began, gpu = time.perf_counter(), torch.cuda.is_available()
    device, output = torch.device("cuda" if gpu else "cpu"), gpu_output(args, "kernels")
    print("" if gpu else NO_MEANING)
    torch.manual_seed(0)
    large_bytes = LARGE_COPY if gpu else 64 << 20
    large_copy = cold({"copy": copier(large_bytes, device)}, rounds=args.rounds)["copy"]
    rate = large_bytes / large_copy.median
    print(f"{device_name()}: a copy of {large_bytes >> 20} MiB moves {rate / 1e9:.0f} GB/s")
    rows: list[dict[str, Any]] = []
    skipped: list[str] = []
    failed: list[str] = []
    head = {
        "device": device_name(),
        "meaningful_times": gpu,
        "batch_size": args.batch_size,
        "rounds": args.rounds,
        "l2_cold": gpu,
        "large_copy": {"bytes": large_bytes, "bytes_per_s": rate, "ms": milliseconds(large_copy)},
        **environment(),
    }

    def save(complete: bool) -> None:
        found = {"skipped": skipped, "failed": failed, "rows": rows, "complete": complete}
        write_record(output, head | found | {"seconds": time.perf_counter() - began})

    for key in choose_cases(args.ops, args.stages):
        if time.perf_counter() - began > 60 * args.minutes:
            skipped.append(f"{key}: --minutes were over")
            continue
        try:
            gc.collect()
            torch.cuda.empty_cache()
            for row in measure(build(key, args.batch_size, device), args.rounds, rate, gpu):
                rows.append(row)
                print(line_of(row), flush=True)
        except Exception as error:  # the other cases are still measured
            failed.append(f"{key}: {type(error).__name__}: {first_line(error)}")
            print(f"FAILED: {failed[-1]}", flush=True)
        save(complete=False)
    save(complete=True)
    judged = [t["met"] for row in rows for t in row["targets"]]
    wrong = [row for row in rows if not row["agrees"]]
    print(
        f"{len(rows)} rows, {sum(judged)} of {len(judged)} targets met, {len(skipped)} skipped, "
        f"{len(failed)} failed, {len(wrong)} differ from eager -> {output}"
    )
    print("" if gpu else NO_MEANING)
    return int(bool(wrong or failed))


def main() -> int:
    """Parses the command line, runs the benchmark, and returns the exit status.

    The status is 1 if an op failed or differs from PyTorch, and else 0.
    """
    gpu = torch.cuda.is_available()
    stages = list(STAGES) if gpu else [3, 4]
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--ops", nargs="+", choices=OPS, metavar="OP", default=list(OPS), help="default: all")
    add("--stages", nargs="+", type=int, choices=STAGES, default=stages, help="stages of Swin-B")
    add("--batch-size", type=int, default=64 if gpu else 2, help="number of images")
    add("--rounds", type=int, default=30 if gpu else 3)
    add("--minutes", type=float, default=5, help="begin no case after so many minutes")
    return run(parser.parse_args())


if __name__ == "__main__":
    sys.exit(main())
