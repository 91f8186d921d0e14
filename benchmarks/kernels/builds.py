"""What ptxas makes of every Triton kernel, on a machine without a GPU.

    python -m benchmarks.kernels.builds  # sm_70, 80 and 90; writes results/kernel_builds.json

A row of `LAUNCHES` is all that an op needs, here and in the tests.

Runs the ops' own launch code against a driver that compiles and launches nothing, so that what is
judged is what would run: its block sizes, warps and pointer alignments. Registers, spills and
shared memory are ptxas' own figures; the widths of loads and stores are read from the PTX.
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
from unittest import mock

import torch
import triton
from fastgn_kernels import (
    ACTIVATIONS,
    activation,
    cross_entropy,
    gradient_norm,
    layer_norm,
    window_attention_qkvpacked,
)
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas

from benchmarks.common.arguments import RESULTS
from fastgn.files import write_json
from fastgn.metrics import environment

RESULT = RESULTS / "kernel_builds.json"

DTYPES = {
    70: (torch.float16, torch.float32),
    80: (torch.bfloat16, torch.float32),
    90: (torch.bfloat16, torch.float32),
}
"""Compute capability (V100, A100, H200) -> what is trained in there."""

SHARED_LIMIT = {70: 96 << 10, 80: 163 << 10, 90: 227 << 10}
"""Compute capability -> the most shared memory a block may have, in bytes."""


@dataclasses.dataclass(frozen=True)
class Build:
    """One kernel as compiled for one card."""

    kernel: str
    capability: int
    constants: str
    """What it was specialised on, the interesting part."""
    warps: int
    registers: int
    spills: int
    """Bytes of spill stores and loads."""
    shared: int
    """Bytes of shared memory a block."""
    load_bytes: int
    """Width of the widest global load of a thread."""
    store_bytes: int
    """Width of the widest global store of a thread."""


def width(ptx: str, access: str) -> int:
    """Bytes of the widest global access, 'ld' or 'st', in a kernel's PTX."""
    widths = [0]
    for line in ptx.splitlines():
        found = re.search(rf"\b{access}\.global[\w.:]*?(?:\.v(\d))?\.[busf](\d+)\b", line)
        if found:
            widths.append(int(found[1] or 1) * int(found[2]) // 8)
    return max(widths)


def inspect(kernel: triton.compiler.CompiledKernel, capability: int, constants: str) -> Build:
    """Asks ptxas about a compiled kernel's PTX."""
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
    """Makes launches on CPU tensors compile for a card and do nothing else; fills the list."""
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
            named = [
                f"{p.name}={v}"
                for p, v in zip(self.params, args, strict=False)
                if p.is_constexpr and isinstance(v, (int, str))
            ]
            named += [f"{k}={v}" for k, v in kwargs.items() if isinstance(v, (int, str))]
            builds.append(inspect(kernel, capability, " ".join(named)))
        return kernel

    pretence = {"runs_triton": lambda x: True, "capability": lambda x: capability}
    # every op's file has its own names for them
    modules = [m for name, m in sys.modules.items() if name.startswith("fastgn_kernels.")]
    with contextlib.ExitStack() as patches:
        patches.enter_context(mock.patch.object(triton.runtime.driver, "_active", driver))
        patches.enter_context(mock.patch.object(triton.runtime.JITFunction, "run", build))
        for module, name in itertools.product(modules, pretence):
            if hasattr(module, name):
                patches.enter_context(mock.patch.object(module, name, pretence[name]))
        yield builds


def all_orders(
    op: Callable,
    *shapes: tuple[int, ...],
    dtype: torch.dtype,
    weights: Sequence[tuple[int, ...]] = (),
) -> None:
    """Launches an op of inputs of these shapes, then weights of float32, its backward, and the
    backward of that: as a gradient penalty has it, where the inner gradient is the first input's
    alone; with the outer one the first input's too; and with all gradients in both."""
    inputs = [torch.empty(shape, dtype=dtype, requires_grad=True) for shape in shapes]
    inputs += [torch.empty(shape, requires_grad=True) for shape in weights]
    y = op(*inputs)
    ys = [y] if isinstance(y, Tensor) else list(y)
    gys = [torch.empty_like(y, requires_grad=True) for y in ys]
    every = len(inputs)
    for inner, outer in dict.fromkeys([(1, every), (1, 1), (every, every)]):
        gxs = torch.autograd.grad(ys, inputs[:inner], gys, create_graph=True)
        vs = [torch.empty_like(g) for g in gxs]
        wanted = [*gys, *inputs[:outer]]
        torch.autograd.grad(gxs, wanted, vs, retain_graph=True, allow_unused=True)


TOKENS, HIDDEN = 2 * 56 * 56, 4 * 128
"""Swin-B's first stage, two images."""

LAUNCHES: dict[str, Callable[[torch.dtype], None]] = {
    f"activation {kind}": functools.partial(
        lambda kind, dtype: all_orders(
            lambda x: activation(x, kind), (TOKENS, HIDDEN), dtype=dtype
        ),
        kind,
    )
    for kind in ACTIVATIONS
} | {
    f"activation {kind} with bias": functools.partial(
        lambda kind, dtype: all_orders(
            lambda x, bias: activation(x, kind, bias), (TOKENS, HIDDEN), (HIDDEN,), dtype=dtype
        ),
        kind,
    )
    for kind in ("gelu", "mish")
}
"""Op -> what launches all its kernels, at Swin-B's shapes."""

LAUNCHES |= {
    "cross_entropy index": lambda dtype: all_orders(
        lambda z: cross_entropy(z, torch.zeros(256, dtype=torch.int64)), (256, 1000), dtype=dtype
    ),
    "cross_entropy soft": lambda dtype: all_orders(
        lambda z: cross_entropy(z, torch.zeros(256, 1000)), (256, 1000), dtype=dtype
    ),
    "cross_entropy 16384 classes": lambda dtype: all_orders(
        lambda z: cross_entropy(z, torch.zeros(8, 16384)), (8, 16384), dtype=dtype
    ),
    "gradient_norm L1": lambda dtype: all_orders(
        lambda g: gradient_norm(g, 1), (32, 3, 224, 224), dtype=dtype
    ),
    "gradient_norm L2": lambda dtype: all_orders(
        lambda g: gradient_norm(g, 2), (32, 3, 224, 224), dtype=dtype
    ),
}

LAYER_NORMS = (64, 128, 192, 256, 384, 512, 768, 1024, 2048, 4096)
"""Swin's and ViT's widths, and the tiles on either side, to the widest."""


def _layer_norms(dtype: torch.dtype, residual: bool = False) -> None:
    for columns in LAYER_NORMS[:-1] if residual else LAYER_NORMS:
        x, weight = (64, columns), (columns,)
        if residual:
            op = lambda x, y, *affine: layer_norm(x, *affine, residual=y)  # noqa: E731
            all_orders(op, x, x, dtype=dtype, weights=(weight, weight))
        else:
            all_orders(layer_norm, x, dtype=dtype, weights=(weight, weight))


def _window_attention(
    dtype: torch.dtype, heads: int, dim: int, masks: int = 0, biased: bool = True
) -> None:
    mask = torch.zeros(masks, 49, 49) if masks else None
    all_orders(
        lambda qkv, bias=None: window_attention_qkvpacked(qkv, bias, mask),
        (3, 64, heads, 49, dim), dtype=dtype, weights=((heads, 49, 49),) if biased else (),
    )  # fmt: skip


LAUNCHES |= {
    "layer_norm": _layer_norms,
    "layer_norm of a sum": functools.partial(_layer_norms, residual=True),
    # Swin-B's first stage, shifted; its third, not shifted; wider heads
    "window_attention": functools.partial(_window_attention, heads=4, dim=32, masks=64),
    "window_attention no mask": functools.partial(_window_attention, heads=16, dim=32),
    "window_attention no bias": functools.partial(_window_attention, heads=4, dim=32, biased=False),
    "window_attention D = 64": functools.partial(_window_attention, heads=4, dim=64, masks=64),
}
"""Those of window_attention launch nothing on a card before sm_80, or in float32."""


def builds_of(launch: Callable[[torch.dtype], None], capability: int) -> Iterator[dict]:
    """A record of each kernel that a row of `LAUNCHES` would launch on a card."""
    for dtype in DTYPES[capability]:
        with compile_only(capability) as builds:
            launch(dtype)
        for build in builds:
            yield {"dtype": str(dtype).removeprefix("torch."), **dataclasses.asdict(build)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ops", nargs="+", choices=LAUNCHES, metavar="OP", help="default: all")
    args = parser.parse_args()

    rows = [
        {"op": op, **build}
        for op in args.ops or LAUNCHES
        for capability in SHARED_LIMIT
        for build in builds_of(LAUNCHES[op], capability)
    ]
    print(f"{'op':28} {'card':5} {'dtype':8} registers spills shared load store  kernel")
    for r in rows:
        print(
            f"{r['op']:28} sm_{r['capability']} {r['dtype']:8} {r['registers']:9} {r['spills']:6} "
            f"{r['shared']:6} {r['load_bytes']:4} {r['store_bytes']:5}  {r['kernel']} "
            f"{r['constants']}"
        )
    if args.ops:
        print(f"not all ops: {RESULT.name} stays as it was")
    else:
        write_json(RESULT, {"builds": rows, **environment()})


if __name__ == "__main__":
    main()
