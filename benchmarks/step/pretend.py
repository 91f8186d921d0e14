"""Makes PyTorch, its compiler and Triton believe that this machine has a certain GPU."""

import contextlib
import dataclasses
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils._python_dispatch import TorchDispatchMode

from fastgn.loss_scale import LossScale

CUDA = torch.device("cuda:0")


@dataclasses.dataclass(frozen=True)
class Gpu:
    """Properties of a GPU that a prediction needs."""

    name: str
    capability: tuple[int, int]
    processors: int
    """Number of streaming multiprocessors."""
    bytes_per_s: float
    """Bandwidth of device memory in bytes per second, reads and writes together."""
    flop_per_s: dict[str, float]
    """Precision of the update -> floating-point operations per second of dense matrix products.

    Precisions that the GPU does not support are absent.
    """
    shared_bytes: int
    """Bytes of shared memory per block."""
    l2_bytes: int
    memory_bytes: int
    link_bytes_per_s: float
    """Bytes per second of NVLink in one direction: half of the number in NVIDIA's data sheet."""
    source: str
    """Source of the bandwidth and of the FLOP rates."""

    def precision(self, wanted: str) -> str:
        """Returns `wanted` if the GPU supports this precision, else "fp32"."""
        return wanted if wanted in self.flop_per_s else "fp32"


def _rates(bf16: float, tf32: float, fp32: float) -> dict[str, float]:
    short = dict.fromkeys(("bf16", "bf16-pure", "fp16", "fp16-pure"), bf16)
    return short | {"tf32": tf32, "fp32": fp32}


_HOPPER = "bandwidth and bf16 measured on one; tf32 and fp32 NVIDIA's data sheet"
_MIB, _GB = 1 << 20, 10**9
GPUS = {
    "h200": Gpu(
        *("NVIDIA H200", (9, 0), 132, 4.3e12, _rates(790e12, 494e12, 67e12)),
        *(227 << 10, 50 * _MIB, 141 * _GB, 450e9, _HOPPER),
    ),
    "h100": Gpu(
        *("NVIDIA H100 80GB HBM3", (9, 0), 132, 3.0e12, _rates(798e12, 494e12, 67e12)),
        *(227 << 10, 50 * _MIB, 80 * _GB, 450e9, _HOPPER),
    ),
    "a100": Gpu(
        *("NVIDIA A100-SXM4-80GB", (8, 0), 108, 2.039e12, _rates(312e12, 156e12, 19.5e12)),
        *(163 << 10, 40 * _MIB, 80 * _GB, 300e9),
        "peaks of NVIDIA's data sheet: no A100 reaches them",
    ),
    "v100": Gpu(
        *("Tesla V100-SXM2-32GB", (7, 0), 80, 0.9e12),
        {"fp32": 15.7e12, "fp16": 125e12, "fp16-pure": 125e12},
        *(96 << 10, 6 * _MIB, 32 * _GB, 150e9),
        "peaks of NVIDIA's data sheet: no V100 reaches them",
    ),
}
"""Name of a GPU on the command line -> its properties."""


def run_backward(
    outputs: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    retain_graph: bool | None,
    create_graph: bool,
    inputs: Sequence[Tensor | GradientEdge] = (),
    allow_unreachable: bool = False,
    accumulate_grad: bool = False,
) -> tuple[Tensor | None, ...]:
    """Computes gradients in place of PyTorch's engine, which would need a CUDA driver.

    The arguments are those of torch.autograd's _engine_run_backward.
    """

    def edge(x: Tensor | GradientEdge) -> GradientEdge:
        return get_gradient_edge(x) if isinstance(x, Tensor) else x

    wanted = [edge(x)[:2] for x in inputs]
    roots = [edge(x) for x in outputs]
    order: list[Any] = []  # nodes of the graph, each after all nodes in its next_functions
    todo = [(root.node, False) for root in roots]
    seen = set()
    while todo:
        node, done = todo.pop()
        if done:
            order.append(node)
        elif node not in seen:
            seen.add(node)
            todo.append((node, True))
            todo += [(n, False) for n, _ in node.next_functions if n is not None]
    needed = {node for node, _ in wanted}
    for node in order:
        if any(n in needed for n, _ in node.next_functions):
            needed.add(node)

    buffers: dict[Any, dict[int, Tensor]] = {}

    def add(node: Any, number: int, grad: Tensor | None) -> None:
        if grad is None or node not in needed:
            return
        expected = node._input_metadata[number]
        # operators do not sum the gradient over broadcast dimensions, but autograd's engine does
        if grad.shape != expected.shape:
            grad = grad.sum_to_size(expected.shape)
        grad = grad.to(expected.dtype)
        into = buffers.setdefault(node, {})
        into[number] = into[number] + grad if number in into else grad

    found: dict[Any, Tensor] = {}
    with torch.set_grad_enabled(create_graph), contextlib.ExitStack() as stack:
        _RUNNING.append(needed)
        stack.callback(_RUNNING.pop)
        for root, grad in zip(roots, grads, strict=True):
            add(root.node, root.output_nr, grad)
        for node in reversed(order):
            got = buffers.pop(node, {})
            found |= {(node, number): grad for number, grad in got.items()}
            if not got or not any(n in needed for n, _ in node.next_functions):
                continue
            arguments = [got.get(i) for i in range(len(node._input_metadata))]
            results = _call(node, arguments)
            for (following, number), grad in zip(node.next_functions, results, strict=False):
                if following is not None:
                    add(following, number, grad)
    results = tuple(found.get(key) for key in wanted)
    if not accumulate_grad:
        return results
    for x, grad in zip(inputs, results, strict=True):
        assert isinstance(x, Tensor)
        if grad is not None:
            x.grad = grad if x.grad is None else x.grad + grad
    return ()


_RUNNING: list[set[Any]] = []
"""Autograd nodes of each backward pass that is running. The innermost pass is the last."""


def _call(node: Any, arguments: list[Tensor | None]) -> Sequence[Tensor | None]:
    """Runs an autograd node, and returns the gradients for its next_functions."""
    if not isinstance(node, BackwardCFunction):
        result = node(*arguments)
        return result if isinstance(result, tuple) else (result,)
    # from here on, the node is one of a torch.autograd.Function
    if node.name().startswith("CompiledFunction"):  # compiled code needs zeros, not None
        some = next(g for g in arguments if g is not None)
        for index, expected in enumerate(node._input_metadata):
            if arguments[index] is None:
                arguments[index] = some.new_zeros(expected.shape, dtype=expected.dtype)
    result = node.apply(*arguments)
    result = result if isinstance(result, tuple) else (result,)
    grads = iter([g for g, needs in zip(result, node.needs_input_grad, strict=False) if needs])
    return [None if following is None else next(grads) for following, _ in node.next_functions]


class OnCpu(TorchDispatchMode):
    """Makes operators create new tensors on the CPU, whatever device their arguments name."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        def moved(x: Any) -> Any:
            return torch.device("cpu") if isinstance(x, torch.device) else x

        return func(*map(moved, args), **{k: moved(v) for k, v in (kwargs or {}).items()})


def forget_devices() -> None:
    """Clears what PyTorch has cached about the devices of this machine and about Triton."""
    import torch._inductor.utils as inductor
    import torch.utils._triton as triton
    from torch._inductor.runtime.hints import DeviceProperties

    for known in (*vars(triton).values(), *vars(inductor).values(), DeviceProperties.create):
        if hasattr(known, "cache_clear"):
            known.cache_clear()


@contextlib.contextmanager
def pretend(gpu: Gpu, on_graph: Callable[[Any], Callable]) -> Iterator[FakeTensorMode]:
    """Makes PyTorch believe that this machine has the GPU `gpu`, with the name cuda:0.

    Yields the mode under which tensors have no data. on_graph: takes Inductor's GraphLowering of
    each compiled graph and returns the function that runs in its place, on a list of tensors.
    """
    import torch._dynamo.device_interface as interfaces
    import torch._inductor.fx_passes.fuse_attention as fuse_attention
    import torch._inductor.fx_passes.joint_graph as joint_graph
    import torch._inductor.fx_passes.pad_mm as pad_mm
    import triton
    from fastgn_kernels import dispatch
    from torch._inductor.graph import GraphLowering
    from torch._subclasses import fake_tensor
    from triton.backends.compiler import GPUTarget

    major, minor = gpu.capability
    properties = types.SimpleNamespace(
        **{"name": gpu.name, "major": major, "minor": minor, "total_memory": gpu.memory_bytes},
        **{"multi_processor_count": gpu.processors, "regs_per_multiprocessor": 65536},
        **{"max_threads_per_multi_processor": 2048, "max_threads_per_block": 1024},
        **{"warp_size": 32, "shared_memory_per_block": 48 << 10},
        shared_memory_per_block_optin=gpu.shared_bytes,
        shared_memory_per_multiprocessor=gpu.shared_bytes,
        **{"L2_cache_size": gpu.l2_bytes, "is_integrated": 0, "gcnArchName": "", "uuid": None},
    )
    target = GPUTarget("cuda", 10 * major + minor, 32)
    driver = types.SimpleNamespace(
        get_current_target=lambda: target,
        get_current_device=lambda: 0,
        get_active_torch_device=lambda: CUDA,
        is_active=lambda: True,
    )
    deduce = joint_graph.UniformValueConstantFolder._deduce_value

    def deduce_on_cpu(self: Any, node: Any) -> Any:
        with OnCpu():  # deduce computes a value, and GPU tensors have no data
            return deduce(self, node)

    def compile_to_module(self: GraphLowering) -> Any:
        self.init_wrapper_code()
        self._update_scheduler()
        return types.SimpleNamespace(call=on_graph(self), __file__=__file__)

    interface, worker = interfaces.CudaInterface, interfaces.CudaInterface.Worker
    values: list[tuple[Any, str, Any]] = [
        (torch.autograd, "_engine_run_backward", run_backward),
        (dispatch, "_engine_will_run", lambda node: node in _RUNNING[-1]),
        (torch.cuda, "is_available", lambda: True),
        (torch.cuda, "device_count", lambda: 1),
        (torch.cuda, "current_device", lambda: 0),
        (torch.cuda, "set_device", lambda *_: None),
        (torch.cuda, "_exchange_device", lambda *_: 0),
        (torch.cuda, "_maybe_exchange_device", lambda *_: 0),
        (torch.cuda, "synchronize", lambda *_: None),
        (torch.cuda, "_lazy_init", lambda: None),
        (torch.cuda, "get_rng_state", lambda *_: torch.zeros(16, dtype=torch.uint8)),
        (torch.cuda, "set_rng_state", lambda *_: None),
        (torch.cuda, "is_current_stream_capturing", lambda: False),
        (torch.cuda, "get_device_name", lambda *_: gpu.name),
        (torch.cuda, "get_device_capability", lambda *_: gpu.capability),
        (torch.cuda, "get_device_properties", lambda *_: properties),
        (torch.accelerator, "is_available", lambda: False),  # with True, autograd would use streams
        # PyTorch 2.11 makes a tensor on the GPU in init_gpu_context
        (fake_tensor, "init_gpu_context", lambda *_: None),
        (interface, "is_available", staticmethod(lambda: True)),
        (interface, "current_device", staticmethod(lambda: 0)),
        (interface, "get_device_properties", staticmethod(lambda *_: properties)),
        (interface, "get_compute_capability", staticmethod(lambda *_: 10 * major + minor)),
        (worker, "current_device", staticmethod(lambda: 0)),
        (worker, "get_device_properties", staticmethod(lambda *_: properties)),
        (fuse_attention, "_sfdp_init", lambda *_: None),  # both _init need a real GPU
        (pad_mm, "_pad_mm_init", lambda *_: None),
        (joint_graph.UniformValueConstantFolder, "_deduce_value", deduce_on_cpu),
        (GraphLowering, "compile_to_module", compile_to_module),
        (triton.runtime.driver, "_active", driver),
        (LossScale, "multiply", lambda self, total: total * self.scale),  # makes no new tensor
    ]
    with contextlib.ExitStack() as stack:
        forget_devices()
        stack.callback(forget_devices)
        # no padding of shapes, because Inductor would time matrix products to decide about it
        settings = {"force_disable_caches": True, "shape_padding": False}
        stack.enter_context(torch._inductor.config.patch(settings))
        torch._C._ensureCUDADeviceGuardSet()  # makes device guards do nothing without a GPU
        for owner, name, value in values:
            stack.enter_context(mock.patch.object(owner, name, value))
        yield FakeTensorMode(allow_non_fake_inputs=True)
