"""Measures time, bandwidth and memory of each op of fastgn_kernels and of its derivatives.

Each op is compared with eager PyTorch, and with a copy of as many bytes on the device.

    python -m benchmarks.kernels.ops  # on a GPU: shapes of Swin-B's first stage, 64 images
    python -m benchmarks.kernels.ops --ops gelu layer_norm --stage 3

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
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import fastgn_kernels
import torch
import torch.nn.functional as F
from fastgn_kernels import ACTIVATIONS, reference
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.common.arguments import DEVICE, MODERN, ON_GPU, open_record, option, program
from benchmarks.common.records import write_record
from benchmarks.common.tables import Column, Record, make_table, with_notes
from benchmarks.common.timing import cold, summary
from fastgn.errors import first_line

NO_MEANING = "NO GPU: small shapes on a CPU, these times mean nothing"

ORDERS = ("forward", "backward", "second")
STAGES = {1: (56, 128, 4), 2: (28, 256, 8), 3: (14, 512, 16), 4: (7, 1024, 32)}
"""Stage of Swin-B at 224 pixels -> (tokens per side, channels, heads)."""
SIDE, WINDOW, HEAD_DIM, CLASSES = 224, 7, 32, 1000
SHORT = torch.bfloat16 if MODERN or not ON_GPU else torch.float16

Outputs = Tensor | tuple[Tensor, ...]
Function = Callable[..., Outputs]


class Op(NamedTuple):
    """Describes how to call one op of fastgn_kernels, and which inputs it is measured with."""

    call: Function
    """Calls the op. Its first argument is fastgn_kernels or `EAGER`."""
    inputs: Sequence[str]
    """Names of the inputs whose gradients are computed. `shapes` returns their shapes."""
    constants: Callable[[int, int], dict[str, Tensor]] = lambda images, side: {}
    """Makes the arguments that get no gradient, such as targets, on the CPU. Takes the number of
    images, and the number of tokens per side of the feature map."""
    dtype: torch.dtype = SHORT


def shift_mask(images: int, side: int) -> dict[str, Tensor]:
    """Returns Swin's mask (windows, N, N): -100 between tokens from opposite edges of the image."""
    band = torch.zeros(side)
    band[-WINDOW:] = 1
    band[-(WINDOW // 2) :] = 2
    region = band[:, None] * 3 + band
    windows = region.unfold(0, WINDOW, WINDOW).unfold(1, WINDOW, WINDOW).reshape(-1, WINDOW**2)
    return {"mask": torch.where(windows[:, None] != windows[..., None], -100.0, 0.0)}


def shapes(images: int, side: int, channels: int, heads: int) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of all inputs whose gradients an op may compute.

    `hidden` is the input of an MLP's activation, and `score_bias` is added to attention scores.
    side: tokens per side of the feature map.
    """
    rows, tokens = images * side**2, WINDOW**2
    return {
        "hidden": (rows, 4 * channels),
        "hidden_bias": (4 * channels,),
        **dict.fromkeys(("x", "residual"), (rows, channels)),
        **dict.fromkeys(("weight", "bias"), (channels,)),
        "qkv": (rows // tokens, tokens, 3, heads, HEAD_DIM),
        "score_bias": (heads, tokens, tokens),
        "logits": (images, CLASSES),
        "pixels": (images, 3, SIDE, SIDE),
    }


def attention(f: Any, qkv: Tensor, bias: Tensor, mask: Tensor | None = None) -> Tensor:
    """Calls window attention. f: fastgn_kernels, or `EAGER` for PyTorch's operators."""
    return f.window_attention_qkvpacked(qkv, bias, mask)


def entropy(f: Any, logits: Tensor, targets: Tensor) -> Tensor:
    """Calls cross-entropy. f: fastgn_kernels, or `EAGER` for PyTorch's operators."""
    return f.cross_entropy(logits, targets, reduction="none")


def eager_activation(x: Tensor, kind: str, *bias: Tensor) -> Tensor:
    """Applies an activation with PyTorch's operators."""
    return F.silu(x) if kind == "silu" else reference.activation(x, kind, *bias)


def eager_layer_norm(x: Tensor, *affine: Tensor, residual: Tensor | None = None) -> Outputs:
    """Normalises x, or x + residual, with F.layer_norm. affine: weight and bias."""
    total = x if residual is None else x + residual
    y = F.layer_norm(total, total.shape[-1:], *affine)
    return y if residual is None else (y, total)


EAGER = types.SimpleNamespace(**vars(reference))
"""PyTorch's version of each op, with the arguments of fastgn_kernels. Networks in PyTorch call
F.layer_norm and F.silu, which the reference avoids because of their higher derivatives."""
EAGER.activation, EAGER.layer_norm = eager_activation, eager_layer_norm
EAGER.window_attention_qkvpacked = lambda qkv, *more: reference.window_attention(
    *qkv.unbind(), *more
)

OPS = {
    **{kind: Op(lambda f, x, kind=kind: f.activation(x, kind), ["hidden"]) for kind in ACTIVATIONS},
    "bias_gelu": Op(lambda f, x, bias: f.activation(x, "gelu", bias), ["hidden", "hidden_bias"]),
    "layer_norm": Op(lambda f, *xs: f.layer_norm(*xs), ["x", "weight", "bias"]),
    "add_layer_norm": Op(
        lambda f, x, r, *affine: f.layer_norm(x, *affine, residual=r),
        ["x", "residual", "weight", "bias"],
    ),
    "window_attention": Op(attention, ["qkv", "score_bias"]),
    "shifted_window_attention": Op(attention, ["qkv", "score_bias"], shift_mask),
    "cross_entropy_index": Op(
        *(entropy, ["logits"]),
        *(lambda images, side: {"targets": torch.randint(CLASSES, (images,))}, torch.float32),
    ),
    "cross_entropy_soft": Op(
        *(entropy, ["logits"]),
        *(lambda images, side: {"targets": torch.rand(images, CLASSES).softmax(1)}, torch.float32),
    ),
    **{
        f"gradient_norm_l{ord}": Op(
            lambda f, x, ord=ord: f.gradient_norm(x, ord), ["pixels"], dtype=torch.float32
        )
        for ord in (1, 2)
    },
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


def build(
    name: str, stage: int, batch: int, device: torch.device, dtype: torch.dtype | None = None
) -> tuple[str, dict[str, Function], dict[str, Tensor]]:
    """Returns the shape (as text), functions and inputs of an op, with the shapes of Swin-B.

    The functions are a dict: "ours" is the op of fastgn_kernels, and "eager" is PyTorch's. The
    inputs are those that get gradients. name: key of OPS. stage: key of STAGES. batch: number of
    images. dtype: dtype of the inputs, or None for that of the op's description.
    """
    op, (side, channels, heads) = OPS[name], STAGES[stage]
    dtype = dtype or op.dtype
    kinds = {"mask": dtype}  # targets keep their own dtypes
    constants = {k: x.to(device, kinds.get(k)) for k, x in op.constants(batch, side).items()}
    sizes = shapes(batch, side, channels, heads)
    inputs = {key: torch.randn(sizes[key], device=device, dtype=dtype) for key in op.inputs}
    shape = " x ".join(map(str, sizes[op.inputs[0]]))
    if "qkv" in inputs:  # has the strides of a linear layer's output
        inputs["qkv"] = inputs["qkv"].permute(2, 0, 3, 1, 4)
        shape = f"{sizes['qkv'][0]} windows x {heads} heads"
    both = {"ours": fastgn_kernels, "eager": EAGER}
    functions = {key: functools.partial(op.call, f, **constants) for key, f in both.items()}
    leaves = {key: x.requires_grad_() for key, x in inputs.items()}
    where = "" if op.inputs[0] in ("logits", "pixels") else f"stage {stage}: "
    return f"{where}{shape}", functions, leaves


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


def measure(name: str, stage: int, batch: int, rounds: int) -> Iterator[dict[str, Any]]:
    """Times an op, its backward and the backward of its backward. Yields a dict for each of them.

    The third dict also has the peak memory of all three together. The dicts are rows of the JSON
    record. name: key of OPS. stage: stage of Swin-B with the inputs' shapes. batch: number of
    images. rounds: number of measured calls of each.
    """
    shape, functions, leaves = build(name, stage, batch, DEVICE)
    inputs = list(leaves.values())
    with torch.no_grad():
        ys = listed(functions["ours"](*inputs))
    gys = [torch.randn_like(y).requires_grad_() for y in ys]
    v = torch.randn_like(inputs[0])
    asked = {who: requests(f, inputs, gys, v) for who, f in functions.items()}
    for order in ORDERS:
        moved = bytes_moved(asked["ours"][order])
        arms: dict[str, Callable] = {who: runs[order] for who, runs in asked.items()}
        source = torch.ones(max(moved // 2, 1), dtype=torch.uint8, device=v.device)
        arms["copy"] = functools.partial(torch.empty_like(source).copy_, source)
        timings = cold(arms, rounds=rounds)
        ms = {who: summary([1e3 * s for s in times]) for who, times in timings.items()}
        share, faster = (ms[who]["median"] / ms["ours"]["median"] for who in ("copy", "eager"))
        row: dict[str, Any] = {
            "op": name,
            "shape": shape,
            "dtype": str(OPS[name].dtype).removeprefix("torch."),
            "order": order,
            "bytes": moved,
            "ms": ms,
            "bytes_per_s": 1e3 * moved / ms["ours"]["median"],
            "share_of_copy": share,
            "times_as_fast_as": {"eager": faster},
        }
        if order == "second" and v.device.type == "cuda":
            peaks = {
                who: peak_bytes(lambda f=f: requests(f, inputs, gys, v)["second"]())
                for who, f in functions.items()
            }
            leaner = {"eager": peaks["eager"] / max(peaks["ours"], 1)}
            row |= {"peak_bytes": peaks, "times_less_memory_than": leaner}
        yield row


def table(record: Record) -> str:
    """Returns this benchmark's Markdown table, made from its JSON record."""
    ops: dict[str, dict[str, Any]] = {}
    for row in record["rows"]:
        ops.setdefault(row["op"], dict(row))[row["order"]] = row
    # an op without all three orders is left out of the table, and the JSON record says why
    shown = [row for row in ops.values() if {*ORDERS} <= row.keys()]
    columns: dict[str, Column] = {
        **{name: name for name in ("op", "shape", "dtype")},
        "share of copy bandwidth: forward, backward, second": lambda r: ", ".join(
            f"{100 * r[order]['share_of_copy']:.0f} %" for order in ORDERS
        ),
        "second: eager / fused, time (memory)": lambda r: (
            f"{r['second']['times_as_fast_as']['eager']:.2f} "
            f"({r['second']['times_less_memory_than']['eager']:.2f})"
        ),
    }
    note = (
        f"{record['device']}, batch {record['batch_size']}, medians of {record['rounds']} calls "
        "with a cold cache"
    )
    triton_version = f"triton {record['versions']['triton']}"
    return with_notes(make_table(shown, columns), record, note, triton_version)


@program(
    option("--ops", nargs="+", choices=OPS, metavar="OP", default=list(OPS), help="default: all"),
    option(
        "--stage", type=int, choices=STAGES, default=1 if ON_GPU else 4,
        help="stage of Swin-B with the inputs' shapes",
    ),
    option("--batch-size", default=64 if ON_GPU else 2, help="number of images"),
    option("--rounds", default=30 if ON_GPU else 3),
)  # fmt: skip
def main(args: argparse.Namespace) -> int:
    """Measures all ops and writes the JSON record after each. Returns 1 if an op failed, else 0."""
    output, head = open_record(args, "kernels_{device}.json", needs_gpu=True)
    head |= {"batch_size": args.batch_size, "rounds": args.rounds, "rows": [], "failed": []}
    print("" if ON_GPU else NO_MEANING)
    torch.manual_seed(0)
    for name in args.ops:
        try:
            gc.collect()
            torch.cuda.empty_cache()
            for row in measure(name, args.stage, args.batch_size, args.rounds):
                head["rows"].append(row)
                print(f"{name}, {row['order']}: {row['share_of_copy']:.0%} of a copy", flush=True)
        except Exception as error:  # goes on with the other ops
            head["failed"].append(f"{name}: {type(error).__name__}: {first_line(error)}")
            print(f"FAILED: {head['failed'][-1]}", flush=True)
        write_record(output, head | {"complete": False})
    write_record(output, head | {"complete": True})
    print(f"{len(head['rows'])} rows, {len(head['failed'])} failed -> {output}")
    print("" if ON_GPU else NO_MEANING)
    return int(bool(head["failed"]))


if __name__ == "__main__":
    sys.exit(main())
