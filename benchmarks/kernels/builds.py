"""Compiles every Triton kernel without a GPU, and records registers, spills and load widths.

    python -m benchmarks.kernels.builds  # for sm_70, sm_80 and sm_90
    python -m benchmarks.kernels.builds --ops window_attention  # keeps the results of other ops

The ops run with a pretended driver that compiles kernels, but does not launch them. They compile
the kernels that a GPU would run, with the same block sizes, warps and pointer alignments.
Registers, spills and shared memory come from ptxas, and load and store widths from the PTX.
For window attention on sm_70, the bytes that it reads and writes are counted as well.

A new op needs one row of `LAUNCHES`, for this program and for the tests.
Writes benchmarks/results/kernel_builds.json.
"""

import argparse
import contextlib
import dataclasses
import functools
import itertools
import os
import re
import subprocess
import sys
import tempfile
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import fastgn_kernels as fused
import torch
import triton
from fastgn_kernels.window_attention import IMPLEMENTATIONS
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas

from benchmarks.common.arguments import RESULTS, finish, open_record, option, program
from benchmarks.common.records import earlier
from benchmarks.common.tables import Record, make_table, with_notes
from benchmarks.kernels import ops

RESULT = RESULTS / "kernel_builds.json"

DTYPES = {
    70: (torch.float16, torch.float32),
    80: (torch.bfloat16, torch.float32),
    90: (torch.bfloat16, torch.float32),
}
"""Compute capability (of V100, A100, H200) -> dtypes in which the kernels are compiled."""

SHARED_LIMIT = {70: 96 << 10, 80: 163 << 10, 90: 227 << 10}
"""Compute capability of a GPU -> largest number of bytes of shared memory per block."""


@dataclasses.dataclass(frozen=True)
class Build:
    """Result of compiling one Triton kernel for one GPU."""

    kernel: str
    capability: int
    constants: str
    """Values of the kernel's compile-time constants, as text."""
    warps: int
    registers: int
    spills: int
    """Bytes of registers that the kernel spills to memory, stores and loads together."""
    shared: int
    """Bytes of shared memory per block."""
    load_bytes: int
    """Number of bytes of the widest load from global memory that a thread makes."""
    store_bytes: int
    """Number of bytes of the widest store to global memory that a thread makes."""


def width(ptx: str, access: str) -> int:
    """Returns the number of bytes of the widest global load or store in a kernel's PTX.

    access: "ld" for loads, "st" for stores.
    """
    widths = [0]
    for line in ptx.splitlines():
        found = re.search(rf"\b{access}\.global[\w.:]*?(?:\.v(\d))?\.[busf](\d+)\b", line)
        if found:
            widths.append(int(found[1] or 1) * int(found[2]) // 8)
    return max(widths)


def inspect(kernel: triton.compiler.CompiledKernel, capability: int, constants: str) -> Build:
    """Returns registers, spills, shared memory and widest accesses of a compiled kernel.

    capability: compute capability of the GPU. constants: the compile-time constants, as text.
    """
    ptx = kernel.asm["ptx"]
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        target = re.search(r"\.target (\w+)", ptx)[1]
        ptxas = get_ptxas(capability).path
        command = [ptxas, "-v", f"--gpu-name={target}", source, "-o", os.devnull]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    number = lambda pattern: sum(int(n) for n in re.findall(pattern, said))  # noqa: E731
    return Build(
        kernel=kernel.metadata.name,
        capability=capability,
        constants=constants,
        warps=kernel.metadata.num_warps,
        registers=number(r"Used (\d+) registers"),
        spills=number(r"(\d+) bytes spill"),
        shared=kernel.metadata.shared,
        load_bytes=width(ptx, "ld"),
        store_bytes=width(ptx, "st"),
    )


@contextlib.contextmanager
def compile_only(capability: int) -> Iterator[list[Build]]:
    """Compiles Triton kernels for a GPU when they are launched on CPU tensors, and runs none.

    Yields a list that receives a Build per kernel. capability: compute capability, such as 90.
    """
    target = GPUTarget("cuda", capability, 32)
    driver = types.SimpleNamespace(
        get_current_target=lambda: target,
        get_current_device=lambda: -capability,
        get_current_stream=lambda device: 0,
        get_active_torch_device=lambda: torch.device("cpu"),
    )
    builds: list[Build] = []
    seen = set()
    run = triton.runtime.JITFunction.run

    def build(self, *args, grid, warmup, **kwargs):
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        if kernel.hash not in seen:
            seen.add(kernel.hash)
            named = [(p.name, v) for p, v in zip(self.params, args, strict=False) if p.is_constexpr]
            numbers = [f"{k}={v}" for k, v in (*named, *kwargs.items()) if isinstance(v, int | str)]
            builds.append(inspect(kernel, capability, " ".join(numbers)))
        return kernel

    pretence = {"runs_triton": lambda x: True, "capability": lambda x: capability}
    # replaces runs_triton and capability in each op's file, because the file imports them by name
    modules = [m for name, m in sys.modules.items() if name.startswith("fastgn_kernels.")]
    with contextlib.ExitStack() as patches:
        patches.enter_context(mock.patch.object(triton.runtime.driver, "_active", driver))
        patches.enter_context(mock.patch.object(triton.runtime.JITFunction, "run", build))
        for module, name in itertools.product(modules, pretence):
            if hasattr(module, name):
                patches.enter_context(mock.patch.object(module, name, pretence[name]))
        yield builds


class Launch(NamedTuple):
    """An op, and the shapes of inputs with which a call launches its kernels."""

    op: Callable
    shapes: Sequence[tuple[int, ...]]
    """Shapes of the first inputs, whose dtype is that for which the kernels are compiled."""
    weights: Sequence[tuple[int, ...]] = ()
    """Shapes of the inputs after those in `shapes`. They are always float32."""

    def all_orders(self, dtype: torch.dtype) -> None:
        """Calls the op, its backward, and the backward of its backward, which launch all kernels.

        First only the gradient of the first input is differentiated again, as for a gradient
        penalty, and then the gradients of all inputs.
        """
        inputs = [torch.empty(shape, dtype=dtype, requires_grad=True) for shape in self.shapes]
        inputs += [torch.empty(shape, requires_grad=True) for shape in self.weights]
        y = self.op(*inputs)
        ys = [y] if isinstance(y, Tensor) else list(y)
        gys = [torch.empty_like(y, requires_grad=True) for y in ys]
        every = len(inputs)
        for inner, outer in dict.fromkeys([(1, every), (1, 1), (every, every)]):
            gxs = torch.autograd.grad(ys, inputs[:inner], gys, create_graph=True)
            vs = [torch.empty_like(g) for g in gxs]
            wanted = [*gys, *inputs[:outer]]
            torch.autograd.grad(gxs, wanted, vs, retain_graph=True, allow_unused=True)


def attention(heads: int, dim: int, masks: int = 0, biased: bool = True) -> Launch:
    """Returns a Launch of window attention: the op, and the shapes of its inputs.

    dim: channels per head. masks: number of windows per image, each with a mask of its own, or 0
    for no masks. biased: whether a bias is added to the attention scores.
    """
    mask = torch.zeros(masks, 49, 49) if masks else None
    op = lambda qkv, bias=None: fused.window_attention_qkvpacked(qkv, bias, mask)  # noqa: E731
    return Launch(op, [(3, 64, heads, 49, dim)], [(heads, 49, 49)] if biased else [])


LAYER_NORMS = (64, 128, 192, 256, 384, 512, 768, 1024, 2048, 4096)
"""Numbers of channels for which the kernels of LayerNorm are compiled: those of Swin and ViT, and
numbers around each size of the kernels' tiles."""
HIDDEN = (2 * 56 * 56, 4 * 128)
"""Shape of the hidden layer of an MLP in Swin-B's first stage: tokens of two images, channels."""

LAUNCHES: dict[str, list[Launch]] = {
    **{
        f"activation {kind}": [Launch(functools.partial(fused.activation, kind=kind), [HIDDEN])]
        for kind in fused.ACTIVATIONS
    },
    **{
        f"activation {kind} with bias": [
            Launch(lambda x, b, kind=kind: fused.activation(x, kind, b), [HIDDEN], [HIDDEN[1:]])
        ]
        for kind in ("gelu", "mish")
    },
    **{
        f"cross_entropy {name}": [
            Launch(
                functools.partial(fused.cross_entropy, targets=targets), [(len(targets), classes)]
            )
        ]
        for name, classes, targets in (
            ("index", 1000, torch.zeros(256, dtype=torch.int64)),
            ("soft", 1000, torch.zeros(256, 1000)),
            ("16384 classes", 16384, torch.zeros(8, 16384)),
        )
    },
    "gradient_norm L1": [Launch(lambda x: fused.gradient_norm(x, 1), [(32, 3, 224, 224)])],
    "gradient_norm L2": [Launch(lambda x: fused.gradient_norm(x, 2), [(32, 3, 224, 224)])],
    "layer_norm": [Launch(fused.layer_norm, [(64, c)], [(c,), (c,)]) for c in LAYER_NORMS],
    "layer_norm of a sum": [
        Launch(
            lambda x, y, *affine: fused.layer_norm(x, *affine, residual=y),
            2 * [(64, c)],
            2 * [(c,)],
        )
        for c in LAYER_NORMS[:-1]
    ],
    # shapes of Swin-B's stage 1 with shifted windows, of stage 3, and of other networks
    "window_attention": [attention(heads=4, dim=32, masks=64)],
    "window_attention no mask": [attention(heads=16, dim=32)],
    "window_attention no bias": [attention(heads=4, dim=32, biased=False)],
    "window_attention D = 64": [attention(heads=4, dim=64, masks=64)],
}
"""Name of an op -> inputs for which its kernels are compiled, mostly at Swin-B's shapes.

On GPUs from sm_80 on, window_attention launches no kernels in float32.
"""


def builds_of(launches: Sequence[Launch], capability: int) -> Iterator[dict]:
    """Yields a dict for the JSON record for each kernel that is compiled.

    capability: compute capability of the GPU, such as 90.
    """
    for dtype in DTYPES[capability]:
        with compile_only(capability) as builds:
            for launch in launches:
                launch.all_orders(dtype)
        for build in builds:
            yield {"dtype": str(dtype).removeprefix("torch."), **dataclasses.asdict(build)}


class Traffic(TorchDispatchMode):
    """Counts the bytes that PyTorch's operators read and write, in `nbytes`."""

    nbytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out, name = func(*args, **(kwargs or {})), func.name()
        if not (func.is_view or re.search("view|empty", name)):
            unread = re.search("copy_|fill_|zero", name) or (kwargs or {}).get("beta") == 0
            self.count(args[bool(unread) :], out)
        return out

    def count(self, *tensors) -> None:
        """Adds the bytes of tensors, which may be in nested lists, to `nbytes`."""
        self.nbytes += sum(x.nbytes for x in tree_leaves(tensors) if isinstance(x, Tensor))


def count_bytes(stage: int, dtype: torch.dtype) -> dict[str, Any]:
    """Returns a dict for the JSON record: the bytes that shifted window attention moves on sm_70.

    Its "products" and "plain" are the bytes of two of the IMPLEMENTATIONS, and "ratio" divides
    them. Each has an entry per order of differentiation. stage: of Swin-B, with 64 images.
    """
    meta = torch.device("meta")
    _, functions, leaves = ops.build("shifted_window_attention", stage, 64, meta, dtype)
    qkv, bias = (x.detach() for x in leaves.values())
    rest = (qkv, bias, functions["ours"].keywords["mask"], 1.0)  # type: ignore[attr-defined]
    backward, second = (qkv[0], qkv, None, *rest[1:], bias, qkv), (qkv, None, qkv[0], *rest)
    orders = ((*rest, qkv[0]), backward, (*second, bias, qkv[0], qkv))
    found: dict[str, dict] = {"products": {}, "plain": {}}
    for name, (i, order) in itertools.product(found, enumerate(ops.ORDERS)):
        with Traffic() as moved, mock.patch.object(triton.JITFunction, "run") as run:
            IMPLEMENTATIONS[name][i](*orders[i])
        for call in run.mock_calls:  # a kernel between products reads and writes in place
            moved.count(2 * [*{*call.args}])
        found[name][order] = moved.nbytes
    ratio = {order: found["products"][order] / found["plain"][order] for order in ops.ORDERS}
    size = {"stage": stage, "dtype": str(dtype).removeprefix("torch.")}
    return size | found | {"ratio": ratio}


def table(record: Record) -> str:
    """Returns this benchmark's Markdown tables, made from its JSON record.

    For each op and GPU, the first shows the number of kernels and the sum of their spills. It also
    shows the most registers, the most shared memory and the widest load among these kernels. The
    second shows the ratios of `count_bytes`.
    """
    groups: dict[tuple[str, int], list[dict]] = {}
    for build in record["builds"]:
        kind = build["op"].partition(" ")[0]
        groups.setdefault((kind, build["capability"]), []).append(build)
    columns = {
        "op": lambda g: g[0]["op"].partition(" ")[0],
        "card": lambda g: f"sm_{g[0]['capability']}",
        "kernels": lambda g: str(len(g)),
        "registers, at most": lambda g: str(max(b["registers"] for b in g)),
        "bytes of spills": lambda g: str(sum(b["spills"] for b in g)),
        "shared KiB, at most": lambda g: f"{max(b['shared'] for b in g) / 1024:.0f}",
        "widest load, bytes": lambda g: str(max(b["load_bytes"] for b in g)),
    }
    note = f"ptxas of triton {record['versions']['triton']}"
    ratios = {"stage": "stage", "dtype": "dtype"} | {o: f"ratio/{o}:.2f" for o in ops.ORDERS}
    builds = with_notes(make_table(list(groups.values()), columns), record, note)
    note = "bytes of window attention on sm_70, as a share of those of PyTorch's operators in fp32"
    return f"{builds}\n\n{with_notes(make_table(record['bytes'], ratios), record, note)}"


@program(option("--ops", nargs="+", default=[""], help="beginnings of the names of ops to build"))
def main(args: argparse.Namespace) -> int:
    """Compiles all kernels for all GPUs, and writes the JSON record."""
    output, head = open_record(args, RESULT.name, ("ops",))
    chosen = [op for op in LAUNCHES if op.startswith(tuple(args.ops))]
    rows = [row for row in earlier(output).get("builds", []) if row["op"] not in chosen]
    for op, capability in itertools.product(chosen, SHARED_LIMIT):
        found = [{"op": op, **build} for build in builds_of(LAUNCHES[op], capability)]
        print(f"{op}, sm_{capability}: {len(found)} kernels", flush=True)
        rows += found
    counted = [count_bytes(*size) for size in itertools.product((1, 2, 3), DTYPES[70])]
    return finish(output, head | {"builds": rows, "bytes": counted}, table)


if __name__ == "__main__":
    sys.exit(main())
