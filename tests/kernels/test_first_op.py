"""Runs each op, module and kind of activation as the first operation of a fresh process.

PyTorch prepares some operators when they first run. Other tests cannot see a fault in that, because
other operators ran before.
"""

import json
import os
import subprocess
import sys

import pytest

SCRIPT = """
import json, os, sys
import fastgn_kernels as kernels
import torch
from fastgn_kernels import modules
from fastgn_kernels.maths import TABLE

def case(name, *values):
    module, _, function = name.partition(".")
    if module == "module":
        return getattr(modules, function)(*values)
    op = getattr(kernels.reference if module == "reference" else kernels, function)
    values = [torch.tensor(v) if isinstance(v, list) else v for v in values]
    return lambda *tensors: op(*tensors, *values)

def run(name, values, shapes):
    tensors = [torch.ones(shape, requires_grad=True) for shape in shapes]
    out = case(name, *values)(*tensors)
    grads = torch.autograd.grad(out.sum(), tensors, create_graph=True, allow_unused=True)
    sum((g * g).sum() for g in grads if g is not None and g.requires_grad).backward()

failed = {}
for number, (label, *what) in enumerate(json.loads(sys.argv[1])):
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            run(*what)
            error = ""
        except BaseException as caught:
            error = repr(caught)
        os.write(write, error[:4000].encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        error = pipe.read().decode()
    status = os.waitpid(child, 0)[1]
    if error or status:
        failed[label] = error or f"exit status {status}"
print(json.dumps(failed))
"""
"""Program that imports torch, runs no operator, and forks a process for each case."""

ATTENTION = [(2, 1, 4, 8)] * 3


def cases() -> list[tuple]:
    """Returns (label, name, further arguments, shapes of the tensors) for each op and module.

    A case runs all three orders, so it begins with what a case of fewer orders would run.
    """
    from fastgn_kernels import ACTIVATIONS

    found: list[tuple] = []
    for room in ("kernels", "reference"):
        found += [(f"{room}.activation", [kind], [(2, 3)]) for kind in ACTIVATIONS]
        found += [
            (f"{room}.layer_norm", [], [(2, 3), (3,), (3,)]),
            (f"{room}.window_attention", [], ATTENTION),
            (f"{room}.cross_entropy", [[0, 2]], [(2, 3)]),
            (f"{room}.gradient_norm", [1], [(2, 3)]),
            (f"{room}.gradient_norm", [2], [(2, 3)]),
        ]
    found += [
        ("kernels.gelu", [], [(2, 3)]),
        ("kernels.silu", [], [(2, 3)]),
        ("kernels.window_attention_qkvpacked", [], [(3, 2, 1, 4, 8)]),
        ("module.FusedGELU", [], [(2, 3)]),
        ("module.FusedSiLU", [], [(2, 3)]),
        ("module.FusedBiasGELU", [3], [(2, 3)]),
        ("module.FusedLayerNorm", [3], [(2, 3)]),
    ]
    return [(f"{name} {values}", name, values, shapes) for name, values, shapes in found]


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked")
def test_every_op_can_be_the_first_one_of_a_process():
    listed = cases()
    assert len({case[0] for case in listed}) == len(listed) > 20
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(listed)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {}
