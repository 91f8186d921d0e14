"""What ptxas makes of every Triton kernel, on a machine without a GPU.

    python benchmarks/kernel_builds.py  # sm_70, 80 and 90; writes results/kernel_builds.json

Runs the ops' own launch code against a driver that compiles and launches nothing, so that what is
judged is what would run: its block sizes, warps and pointer alignments. Registers, spills and
shared memory are ptxas' own figures; the widths of loads and stores are read from the PTX.
"""

import contextlib
import dataclasses
import os
import re
import subprocess
import tempfile
import types
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas

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

    with (
        mock.patch.object(triton.runtime.driver, "_active", driver),
        mock.patch.object(triton.runtime.JITFunction, "run", build),
        mock.patch("fastgn_kernels.dispatch.runs_triton", lambda x: True),
    ):
        yield builds
