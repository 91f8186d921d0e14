"""Measures time, bandwidth and memory of each op of fastgn_kernels and of its derivatives.

Each op is compared with eager PyTorch, and with a copy of as many bytes on the device.

    python -m benchmarks.kernels.ops  # on a GPU: Swin-B's shapes, 64 images, within --minutes
    python -m benchmarks.kernels.ops --ops gelu layer_norm

Each op has three orders of differentiation, which are timed separately. `forward` runs the op.
`backward` computes the gradients with respect to all inputs. `second` is what a gradient penalty
needs. It differentiates the gradient of the first input once more, with respect to all inputs and
to the gradients of the outputs. The autograd graph is built before the time is measured.

The bytes of an order count each tensor that the op takes as read once, and each result as written
once, even if a kernel moves more. The copy moves as many bytes, half of them read and half written.
Op, eager PyTorch and copy are timed in turn, several times, with cold caches. `share_of_copy` is
the copy's median time, divided by the op's. Peak memory is what all three orders together allocate,
with their graph and without inputs.

Writes benchmarks/results/kernels_<card>.json after every measurement. On a CPU it runs small
shapes, its times mean nothing, and it writes to runs/.
"""

import argparse
import functools
import gc
import itertools
import math
import sys
import time
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import fastgn_kernels
import torch
from fastgn_kernels import ACTIVATIONS, reference
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.common.arguments import DEVICE, ON_GPU, open_record, option, program
from benchmarks.common.records import describe_error, write_record
from benchmarks.common.tables import Column, Record, make_table, with_notes
from benchmarks.common.timing import cold, summary

NO_MEANING = "NO GPU: small shapes on a CPU, these times mean nothing"

ORDERS = ("forward", "backward", "second")
STAGES = {1: (56, 128, 4), 2: (28, 256, 8), 3: (14, 512, 16), 4: (7, 1024, 32)}
"""Stage of Swin-B at 224 pixels -> (tokens per side, channels, heads)."""
SIDE, WINDOW, HEAD_DIM, CLASSES = 224, 7, 32, 1000
SHORT = (torch.bfloat16,)
DIFFERENCE = {torch.bfloat16: 0.03, torch.float32: 1e-3}
"""Largest relative L2 difference between our op and PyTorch's that does not count as an error.

bfloat16 keeps 8 bits, and PyTorch rounds to them after each operator.
"""

Outputs = Tensor | tuple[Tensor, ...]
Function = Callable[..., Outputs]


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


class Op(NamedTuple):
    """Describes how to call one op of fastgn_kernels, and which inputs it is measured with."""

    call: Function
    """Calls the op. Its first argument is fastgn_kernels or `EAGER`."""
    inputs: Sequence[str]
    """Names of the inputs whose gradients are computed. `shapes` returns their shapes."""
    constants: Callable[[Size, torch.dtype], dict[str, Tensor]] = lambda size, dtype: {}
    """Makes the arguments that get no gradient, such as targets, on the CPU."""
    stages: str = "first"
    """Stages of Swin-B whose shapes are used: "all", "first", or "none" for an op in no stage."""
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


def shapes(size: Size) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of all inputs whose gradients an op may compute.

    `hidden` is the input of an MLP's activation, and `score_bias` is added to attention scores.
    """
    channels, tokens = size.channels, WINDOW**2
    return {
        "hidden": (size.rows, 4 * channels),
        "hidden_bias": (4 * channels,),
        **dict.fromkeys(("x", "residual"), (size.rows, channels)),
        **dict.fromkeys(("weight", "bias"), (channels,)),
        "qkv": (size.windows, tokens, 3, size.heads, HEAD_DIM),
        "score_bias": (size.heads, tokens, tokens),
        "logits": (size.images, CLASSES),
        "pixels": (size.images, 3, SIDE, SIDE),
    }


def attention(f: Any, qkv: Tensor, bias: Tensor, mask: Tensor | None = None) -> Tensor:
    """Calls window attention. f: fastgn_kernels, or `EAGER` for PyTorch's operators."""
    return f.window_attention_qkvpacked(qkv, bias, mask)


def entropy(f: Any, logits: Tensor, targets: Tensor) -> Tensor:
    """Calls cross-entropy. f: fastgn_kernels, or `EAGER` for PyTorch's operators."""
    return f.cross_entropy(logits, targets, reduction="none")


EAGER = types.SimpleNamespace(**vars(reference))
"""PyTorch's version of each op, with the arguments of fastgn_kernels."""
EAGER.window_attention_qkvpacked = lambda qkv, *more: reference.window_attention(
    *qkv.unbind(), *more
)

OPS = {
    # activations differ only in arithmetic, so one shape and dtype is enough for all but gelu
    **{
        kind: Op(lambda f, x, kind=kind: f.activation(x, kind), ["hidden"], dtypes=SHORT)
        for kind in ACTIVATIONS
    },
    "gelu": Op(lambda f, x: f.activation(x, "gelu"), ["hidden"], stages="all"),
    "bias_gelu": Op(lambda f, x, bias: f.activation(x, "gelu", bias), ["hidden", "hidden_bias"]),
    "layer_norm": Op(lambda f, *xs: f.layer_norm(*xs), ["x", "weight", "bias"], stages="all"),
    "add_layer_norm": Op(
        lambda f, x, r, *affine: f.layer_norm(x, *affine, residual=r),
        ["x", "residual", "weight", "bias"],
    ),
    "window_attention": Op(attention, ["qkv", "score_bias"], stages="all"),
    "shifted_window_attention": Op(attention, ["qkv", "score_bias"], shift_mask, "all"),
    "cross_entropy_index": Op(
        *(entropy, ["logits"]),
        *(lambda s, dtype: {"targets": torch.randint(CLASSES, (s.images,))}, "none"),
    ),
    "cross_entropy_soft": Op(
        *(entropy, ["logits"]),
        *(lambda s, dtype: {"targets": torch.rand(s.images, CLASSES).softmax(1)}, "none"),
    ),
    "gradient_norm_l1": Op(lambda f, x: f.gradient_norm(x, 1), ["pixels"], stages="none"),
    "gradient_norm_l2": Op(lambda f, x: f.gradient_norm(x, 2), ["pixels"], stages="none"),
}
"""Name of each op -> its description."""


class Calls(TorchDispatchMode):
    """Collects the tensors that ops of fastgn_kernels take as arguments, in the list `taken`."""

    def __init__(self) -> None:
        super().__init__()
        self.taken: list[Tensor] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "fastgn":
            self.taken += [x for x in args if isinstance(x, Tensor)]
        return function(*args, **(kwargs or {}))


def bytes_moved(run: Callable[[], Sequence[Tensor | None]]) -> int:
    """Returns the bytes of all tensors that an op takes, and of all results that it makes.

    run: function that calls the op once and returns its results. A result that is returned twice is
    counted once. A result that is one of the op's arguments counts only as an argument.
    """
    with Calls() as calls:
        results = run()
    given = {x.data_ptr() for x in calls.taken}
    made = {x.data_ptr(): x.nbytes for x in results if x is not None and x.numel()}
    written = sum(nbytes for pointer, nbytes in made.items() if pointer not in given)
    return sum(x.nbytes for x in calls.taken) + written


class CaseKey(NamedTuple):
    """Identifies a measurement by its op, the stage of Swin-B with its shapes, and its dtype."""

    op: str
    stage: int
    """Stage of Swin-B whose shapes are used, 0 for an op that exists in no stage."""
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.op}, stage {self.stage}, {name_of(self.dtype)}"


def choose_cases(ops: Sequence[str], stages: Sequence[int]) -> list[CaseKey]:
    """Returns all measurements in order: first one of each op, then a second one of each op, etc.

    If time runs out, each op has therefore been measured at least once. stages: numbers of
    Swin-B's stages, whose shapes are used.
    """
    by_op = []
    for name in ops:
        # Swin does not shift the windows of a stage that has only one window
        fitting = [s for s in stages if STAGES[s][0] > WINDOW or not name.startswith("shifted")]
        at = {"all": fitting, "first": stages[:1], "none": [0]}[OPS[name].stages]
        by_op.append([CaseKey(name, stage, dtype) for stage in at for dtype in OPS[name].dtypes])
    return [key for rank in itertools.zip_longest(*by_op) for key in rank if key]


def build(
    key: CaseKey, batch: int, device: torch.device
) -> tuple[str, dict[str, Function], dict[str, Tensor]]:
    """Returns the shape (as text), functions and inputs of one measurement, with Swin-B's shapes.

    The functions are a dict: "ours" is the op of fastgn_kernels, and "eager" is PyTorch's. The
    inputs are those that get gradients. key: op, stage and dtype. batch: number of images.
    """
    op, size = OPS[key.op], Size(batch, *STAGES.get(key.stage, (0, 0, 0)))
    constants = {k: x.to(device) for k, x in op.constants(size, key.dtype).items()}
    inputs = {
        name: torch.randn(shapes(size)[name], device=device, dtype=key.dtype) for name in op.inputs
    }
    shape = " x ".join(map(str, next(iter(inputs.values())).shape))
    if "qkv" in inputs:
        inputs["qkv"] = inputs["qkv"].permute(
            2, 0, 3, 1, 4
        )  # keeps the strides of a linear layer's output
        shape = f"{size.windows} windows x {size.heads} heads"
    both = {"ours": fastgn_kernels, "eager": EAGER}
    functions = {name: functools.partial(op.call, f, **constants) for name, f in both.items()}
    leaves = {name: x.requires_grad_() for name, x in inputs.items()}
    return f"stage {key.stage}: {shape}" if key.stage else shape, functions, leaves


def listed(y: Outputs) -> list[Tensor]:
    """Returns the outputs of an op as a list, even if there is only one."""
    return [y] if isinstance(y, Tensor) else list(y)


def requests(
    function: Function, inputs: Sequence[Tensor], gys: Sequence[Tensor], v: Tensor
) -> dict[str, Callable[[], Sequence[Tensor | None]]]:
    """Returns a dict with one function for each of the keys "forward", "backward" and "second".

    The autograd graph is built here, before the functions are called. function: computes the op's
    outputs from `inputs`. gys: gradients of the loss with respect to the outputs. v: gradient of
    the loss with respect to the first input's gradient.
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


def peak_bytes(run: Callable[[], object]) -> int:
    """Returns the largest number of bytes that a call on a GPU has allocated at a time.

    The results of the call are included, and what was allocated before the call is not.
    """
    run()  # makes libraries allocate their workspaces, which are not to be counted
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return torch.cuda.max_memory_allocated() - before


def difference(ours: Sequence[Tensor | None], eager: Sequence[Tensor | None]) -> float:
    """Returns the largest relative L2 difference of our results to PyTorch's. None means 0."""
    errors = [0.0]
    for x, y in zip(ours, eager, strict=True):
        x, y = (torch.zeros(()) if z is None else z.detach().double() for z in (x, y))
        errors.append(float((x.to(y.device) - y).norm() / y.norm().clamp_min(1e-30)))
    return math.nan if any(map(math.isnan, errors)) else max(errors)


def measure(key: CaseKey, batch: int, rounds: int) -> Iterator[dict[str, Any]]:
    """Times an op, its backward and the backward of its backward. Yields a dict for each of them.

    The third dict also has the peak memory of all three together. The dicts are rows of the JSON
    record. batch: number of images. rounds: number of measured calls of each.
    """
    shape, functions, leaves = build(key, batch, DEVICE)
    inputs = list(leaves.values())
    with torch.no_grad():
        ys = listed(functions["ours"](*inputs))
    gys = [torch.randn_like(y).requires_grad_() for y in ys]
    v = torch.randn_like(inputs[0])
    asked = {name: requests(f, inputs, gys, v) for name, f in functions.items()}
    for order in ORDERS:
        moved = bytes_moved(asked["ours"][order])
        arms: dict[str, Callable] = {name: runs[order] for name, runs in asked.items()}
        off = difference(arms["ours"](), arms["eager"]())
        source = torch.ones(max(moved // 2, 1), dtype=torch.uint8, device=v.device)
        arms["copy"] = functools.partial(torch.empty_like(source).copy_, source)
        timings = cold(arms, rounds=rounds)
        ms = {name: summary([1e3 * s for s in times]) for name, times in timings.items()}
        share, faster = (ms[name]["median"] / ms["ours"]["median"] for name in ("copy", "eager"))
        row: dict[str, Any] = {
            "op": key.op,
            "shape": shape,
            "dtype": name_of(key.dtype),
            "order": order,
            "bytes": moved,
            "ms": ms,
            "bytes_per_s": 1e3 * moved / ms["ours"]["median"],
            "share_of_copy": share,
            "times_as_fast_as": {"eager": faster},
            "relative_difference_to_eager": off if math.isfinite(off) else None,
            "agrees": off <= DIFFERENCE[key.dtype],
        }
        if order == "second" and v.device.type == "cuda":
            peaks = {
                name: peak_bytes(lambda f=f: requests(f, inputs, gys, v)["second"]())
                for name, f in functions.items()
            }
            leaner = {"eager": peaks["eager"] / max(peaks["ours"], 1)}
            row |= {"peak_bytes": peaks, "times_less_memory_than": leaner}
        yield row


def name_of(dtype: torch.dtype) -> str:
    """Returns a dtype's name without "torch."."""
    return str(dtype).removeprefix("torch.")


def table(record: Record) -> str:
    """Returns this benchmark's Markdown table, made from its JSON record.

    It shows each op at the first shape and dtype that was measured.
    """
    ops: dict[str, dict[str, Any]] = {}
    for row in record["rows"]:
        first = ops.setdefault(row["op"], {"shape": row["shape"], "dtype": row["dtype"]})
        if (row["shape"], row["dtype"]) == (first["shape"], first["dtype"]):
            first[row["order"]] = row
    # an op without all three orders is left out of the table, and the JSON record says why
    shown = [{"op": op, **orders} for op, orders in ops.items() if {*ORDERS} <= orders.keys()]

    columns: dict[str, Column] = {
        "op": "op",
        "shape": "shape",
        "share of copy bandwidth: forward, backward, second": lambda r: ", ".join(
            f"{100 * r[order]['share_of_copy']:.0f} %" for order in ORDERS
        ),
        "second: eager / fused, time (memory)": lambda r: (
            f"{r['second']['times_as_fast_as']['eager']:.2f} "
            f"({r['second']['times_less_memory_than']['eager']:.2f})"
        ),
    }
    note = (
        f"{record['device']}, batch {record['batch_size']}, {shown[-1]['dtype']}, medians of "
        f"{record['rounds']} calls with a cold cache"
    )
    triton_version = f"triton {record['versions']['triton']}"
    return with_notes(make_table(shown, columns), record, note, triton_version)


@program(
    option("--ops", nargs="+", choices=OPS, metavar="OP", default=list(OPS), help="default: all"),
    option(
        "--stages", nargs="+", type=int, choices=STAGES, default=list(STAGES) if ON_GPU else [3, 4]
    ),
    option("--batch-size", default=64 if ON_GPU else 2, help="number of images"),
    option("--rounds", default=30 if ON_GPU else 3),
    option("--minutes", default=5.0, help="begin no case after this time"),
)
def main(args: argparse.Namespace) -> int:
    """Measures all ops, and writes the JSON record after each measurement.

    Returns 1 if an op failed or differs from PyTorch, else 0.
    """
    began = time.perf_counter()
    output, head = open_record(args, "kernels_{device}.json", ("minutes",), needs_gpu=True)
    head |= {"batch_size": args.batch_size, "rounds": args.rounds}
    print("" if ON_GPU else NO_MEANING)
    torch.manual_seed(0)
    rows: list[dict[str, Any]] = []
    skipped: list[str] = []
    failed: list[str] = []

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
            for row in measure(key, args.batch_size, args.rounds):
                rows.append(row)
                off = "" if row["agrees"] else ", DIFFERS from eager"
                print(
                    f"{key}, {row['order']}: {row['share_of_copy']:.0%} of a copy{off}", flush=True
                )
        except Exception as error:  # goes on with the other measurements
            failed.append(f"{key}: {describe_error(error)}")
            print(f"FAILED: {failed[-1]}", flush=True)
        save(complete=False)
    save(complete=True)
    wrong = [row for row in rows if not row["agrees"]]
    print(
        f"{len(rows)} rows, {len(skipped)} skipped, {len(failed)} failed, {len(wrong)} differ from "
        f"eager -> {output}"
    )
    print("" if ON_GPU else NO_MEANING)
    return int(bool(wrong or failed))


if __name__ == "__main__":
    sys.exit(main())
