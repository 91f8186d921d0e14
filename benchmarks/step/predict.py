"""What an update launches and moves on a GPU that is not here: predictions, not measurements.

    python -m benchmarks.step.predict  # Swin-B on an H200, an A100 and a V100; minutes an arm
    python -m benchmarks.step.predict --gpus h200 --methods gradnorm --depths 2 2 2 2

The real `fastgn.step.step.Step` runs one update (of a lazy schedule, one cycle) on tensors without
data on a pretend GPU. Dynamo, AOTAutograd's partitioner and Inductor do what they would do on that
card, up to the scheduler that decides what is one kernel; no code is generated and nothing runs. So
the activations saved between forward and backward count, and so do the optimisations of fastgn.

Bytes: each kernel reads each buffer it takes once and writes each it makes once, by Inductor's own
count. Roofline: the sum over kernels of the longer of bytes / bandwidth and FLOPs / matrix rate.

Not modelled: what caches keep from one kernel to the next; overlap, launch gaps, kernels short of
the roofline; what fastgn's and PyTorch's opaque operators launch and move inside themselves (an
operator counts as one kernel that reads its inputs and writes its outputs: partial sums, padding
and tables are left out); operators that run between the compiled graphs (an attack's steps,
accumulation into .grad), the optimizer, the loader, communication.

Writes benchmarks/results/predict_<model>.json, and keeps the rows that are there already, of the
same network and versions, and not asked for. A trial (another size, batch, depth or compiler's
setting) goes to runs/. Leans on internals of PyTorch 2.11 to 2.15.
"""

import argparse
import contextlib
import dataclasses
import gc
import sys
import time
import types
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.common.arguments import output_for
from benchmarks.common.records import read_json, unfinished, write_record
from fastgn.config.groups import ArchitectureConfig
from fastgn.errors import UserError, check
from fastgn.metrics import environment
from fastgn.models.network import Classifier, build_model
from fastgn.objectives import ObjectiveConfig, build_objective
from fastgn.step.cost import count_cost
from fastgn.step.double_backward import DoubleBackward
from fastgn.step.options import StepOptions
from fastgn.step.precision import PRECISIONS
from fastgn.step.schedule import SCHEDULES, Schedule
from fastgn.step.step import Step

CUDA = torch.device("cuda:0")


@dataclasses.dataclass(frozen=True)
class Gpu:
    """What a prediction needs to know of a card."""

    name: str
    capability: tuple[int, int]
    processors: int
    bytes_per_s: float
    """Of device memory, reads and writes counted."""
    flop_per_s: dict[str, float]
    """Precision of the step -> dense matrix products; what the card cannot do is not there."""
    shared_bytes: int
    l2_bytes: int
    memory_bytes: int
    source: str
    """Of the two rates."""

    def precision(self, wanted: str) -> str:
        """`wanted`, or fp32 where the card has no such arithmetic."""
        return wanted if wanted in self.flop_per_s else "fp32"


GPUS = {
    "h200": Gpu(
        name="NVIDIA H200",
        capability=(9, 0),
        processors=132,
        bytes_per_s=4.3e12,
        flop_per_s={"bf16": 790e12, "bf16-pure": 790e12, "tf32": 494e12, "fp32": 67e12},
        shared_bytes=227 << 10,
        l2_bytes=50 << 20,
        memory_bytes=141 * 10**9,
        source="bandwidth and bf16 measured on one; tf32 and fp32 NVIDIA's data sheet",
    ),
    "h100": Gpu(
        name="NVIDIA H100 80GB HBM3",
        capability=(9, 0),
        processors=132,
        bytes_per_s=3.0e12,
        flop_per_s={"bf16": 798e12, "bf16-pure": 798e12, "tf32": 494e12, "fp32": 67e12},
        shared_bytes=227 << 10,
        l2_bytes=50 << 20,
        memory_bytes=80 * 10**9,
        source="bandwidth and bf16 measured on one; tf32 and fp32 NVIDIA's data sheet",
    ),
    "a100": Gpu(
        name="NVIDIA A100-SXM4-80GB",
        capability=(8, 0),
        processors=108,
        bytes_per_s=2.039e12,
        flop_per_s={"bf16": 312e12, "bf16-pure": 312e12, "tf32": 156e12, "fp32": 19.5e12},
        shared_bytes=163 << 10,
        l2_bytes=40 << 20,
        memory_bytes=80 * 10**9,
        source="peaks of NVIDIA's data sheet: no A100 reaches them",
    ),
    "v100": Gpu(
        name="Tesla V100-SXM2-32GB",
        capability=(7, 0),
        processors=80,
        bytes_per_s=0.9e12,
        flop_per_s={"fp32": 15.7e12},  # its fp16 matrix units serve no precision that fastgn has
        shared_bytes=96 << 10,
        l2_bytes=6 << 20,
        memory_bytes=32 * 10**9,
        source="peaks of NVIDIA's data sheet: no V100 reaches them",
    ),
}


# ------------------------------------------------------------------------------------ the pretence


def run_backward(
    outputs: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    retain_graph: bool | None,
    create_graph: bool,
    inputs: Sequence[Tensor | GradientEdge] = (),
    allow_unreachable: bool = False,
    accumulate_grad: bool = False,
) -> tuple[Tensor | None, ...]:
    """PyTorch's autograd engine, in Python: the one in C++ asks a CUDA driver for its streams."""

    def edge(x: Tensor | GradientEdge) -> GradientEdge:
        return get_gradient_edge(x) if isinstance(x, Tensor) else x

    wanted = [edge(x)[:2] for x in inputs]
    roots = [edge(x) for x in outputs]
    order: list[Any] = []  # every node after those that it leads to
    stack = [(root.node, False) for root in roots]
    seen = set()
    while stack:
        node, done = stack.pop()
        if done:
            order.append(node)
        elif node not in seen:
            seen.add(node)
            stack.append((node, True))
            stack += [(n, False) for n, _ in node.next_functions if n is not None]
    needed = {node for node, _ in wanted}
    for node in order:
        if any(n in needed for n, _ in node.next_functions):
            needed.add(node)

    buffers: dict[Any, dict[int, Tensor]] = {}

    def add(node: Any, number: int, grad: Tensor | None) -> None:
        if grad is None or node not in needed:
            return
        expected = node._input_metadata[number]
        if grad.shape != expected.shape:  # the operators leave broadcasting to the engine
            grad = grad.sum_to_size(expected.shape)
        grad = grad.to(expected.dtype)
        into = buffers.setdefault(node, {})
        into[number] = into[number] + grad if number in into else grad

    found: dict[Any, Tensor] = {}
    with torch.set_grad_enabled(create_graph), running(needed):
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
"""The nodes that each sweep under way goes through, the innermost sweep last."""


@contextlib.contextmanager
def running(nodes: set[Any]) -> Iterator[None]:
    _RUNNING.append(nodes)
    try:
        yield
    finally:
        _RUNNING.pop()


def _call(node: Any, arguments: list[Tensor | None]) -> Sequence[Tensor | None]:
    """The gradients for a node's next_functions."""
    if not isinstance(node, BackwardCFunction):
        result = node(*arguments)
        return result if isinstance(result, tuple) else (result,)
    # one written in Python, which answers for arguments that are no tensors, too
    if node.name().startswith("CompiledFunction"):  # it wants zeros, fastgn's operators do not
        some = next(g for g in arguments if g is not None)
        for index, expected in enumerate(node._input_metadata):
            if arguments[index] is None:
                arguments[index] = some.new_zeros(expected.shape, dtype=expected.dtype)
    result = node.apply(*arguments)
    result = result if isinstance(result, tuple) else (result,)
    grads = iter([g for g, needs in zip(result, node.needs_input_grad, strict=False) if needs])
    return [None if following is None else next(grads) for following, _ in node.next_functions]


class OnCpu(TorchDispatchMode):
    """Operators that make tensors make them on the CPU."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        def moved(x: Any) -> Any:
            return torch.device("cpu") if isinstance(x, torch.device) else x

        return func(*map(moved, args), **{k: moved(v) for k, v in (kwargs or {}).items()})


def forget_devices() -> None:
    """Empties what PyTorch has asked once and keeps for the process: whether Triton has a device
    here, how many processors that has, and the like."""
    import torch._inductor.utils as inductor
    import torch.utils._triton as triton
    from torch._inductor.runtime.hints import DeviceProperties

    for known in (*vars(triton).values(), *vars(inductor).values(), DeviceProperties.create):
        if hasattr(known, "cache_clear"):
            known.cache_clear()


@contextlib.contextmanager
def pretend(gpu: Gpu, on_graph: Callable[[Any], Callable]) -> Iterator[FakeTensorMode]:
    """Makes PyTorch believe that `gpu` is cuda:0, for tensors of the mode that it gives.

    on_graph: torch._inductor.graph.GraphLowering -> what to run in place of its code, a function of
    a list of tensors.
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
        name=gpu.name,
        major=major,
        minor=minor,
        total_memory=gpu.memory_bytes,
        multi_processor_count=gpu.processors,
        regs_per_multiprocessor=65536,
        max_threads_per_multi_processor=2048,
        max_threads_per_block=1024,
        warp_size=32,
        shared_memory_per_block=48 << 10,
        shared_memory_per_block_optin=gpu.shared_bytes,
        shared_memory_per_multiprocessor=gpu.shared_bytes,
        L2_cache_size=gpu.l2_bytes,
        is_integrated=0,
        gcnArchName="",
        uuid=None,
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
        with OnCpu():  # it finds constants by computing one element of them
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
        (torch.accelerator, "is_available", lambda: False),  # streams are the driver's
        (fake_tensor, "init_gpu_context", lambda *_: None),  # 2.11 makes a real tensor there
        (interface, "is_available", staticmethod(lambda: True)),
        (interface, "current_device", staticmethod(lambda: 0)),
        (interface, "get_device_properties", staticmethod(lambda *_: properties)),
        (interface, "get_compute_capability", staticmethod(lambda *_: 10 * major + minor)),
        (worker, "current_device", staticmethod(lambda: 0)),
        (worker, "get_device_properties", staticmethod(lambda *_: properties)),
        (fuse_attention, "_sfdp_init", lambda *_: None),  # these two trace on a real device
        (pad_mm, "_pad_mm_init", lambda *_: None),
        (joint_graph.UniformValueConstantFolder, "_deduce_value", deduce_on_cpu),
        (GraphLowering, "compile_to_module", compile_to_module),
        (triton.runtime.driver, "_active", driver),
    ]
    with contextlib.ExitStack() as stack:
        forget_devices()
        stack.callback(forget_devices)
        settings = {"force_disable_caches": True, "shape_padding": False}  # it times products
        stack.enter_context(torch._inductor.config.patch(settings))
        torch._C._ensureCUDADeviceGuardSet()  # a guard that does nothing, where there is no card
        for owner, name, value in values:
            stack.enter_context(mock.patch.object(owner, name, value))
        yield FakeTensorMode(allow_non_fake_inputs=True)


# -------------------------------------------------------------------------------------- the counts


@dataclasses.dataclass
class Cost:
    """What graphs launch and move; sums, so that costs add up and scale."""

    generated: float = 0
    """Kernels that Inductor writes."""
    extern: float = 0
    """Calls of libraries' kernels and of opaque operators."""
    bytes: float = 0
    flops: float = 0
    seconds: float = 0
    """At the roofline."""
    kept_bytes: float = 0
    """From a forward to its backward."""
    by_kind: Counter[str] = dataclasses.field(default_factory=Counter)
    """Bytes by what a kernel computes."""

    def plus(self, other: "Cost", times: float = 1) -> "Cost":
        """self + times * other."""
        values = {}
        for field in dataclasses.fields(self):
            mine, theirs = getattr(self, field.name), getattr(other, field.name)
            if field.name == "by_kind":
                keys = {**mine, **theirs}
                values["by_kind"] = Counter({k: mine[k] + times * theirs[k] for k in keys})
            else:
                values[field.name] = mine + times * theirs
        return Cost(**values)


def node_flops(node: torch.fx.Node) -> int:
    """Of the products that an ATen or fastgn operator stands for."""
    from torch.utils.flop_counter import flop_registry

    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return 0
    values = lambda tree: torch.fx.map_arg(tree, lambda n: n.meta["val"])  # noqa: E731
    packet = node.target.overloadpacket
    if packet in flop_registry:
        kwargs = {k: v for k, v in values(node.kwargs).items()}
        return flop_registry[packet](*values(node.args), **kwargs, out_val=node.meta["val"])
    return 0


def kind_of(kernel: Any, origins: Sequence[torch.fx.Node]) -> str:
    """What a kernel computes, in the names of ATen's operators."""
    called = getattr(kernel.node, "op_overload", None)
    if called is not None:
        return str(called)
    named = getattr(kernel.node, "python_kernel_name", None)
    if named is not None:
        return str(named)
    targets = (n.target for n in origins)
    packed = (getattr(t, "overloadpacket", t) for t in targets)
    return "+".join(sorted({getattr(p, "__name__", str(p)) for p in packed}))


def graph_cost(lowering: Any, gpu: Gpu, precision: str) -> Cost:
    """The kernels of one graph as Inductor's scheduler has fused them."""
    flops = {n: count for n in lowering.module.graph.nodes if (count := node_flops(n))}
    cost = Cost(flops=sum(flops.values()))
    repeated = repetitions(lowering)
    for kernel in lowering.scheduler.nodes:
        kind = type(kernel).__name__
        if kind == "NopKernelSchedulerNode" or _is_output(kernel.node):
            continue
        inner = [n.node for n in kernel.get_nodes()]
        origins = list(dict.fromkeys(o for n in inner for o in getattr(n, "origins", None) or ()))
        origins = [o for o in origins if o.op == "call_function"]
        work = sum(flops.pop(o, 0) for o in origins)
        names = kernel.get_read_write_buffer_accesses(include_reads=True, include_writes=True)
        moved = sum(names.values()) - sum(repeated[name] for name in names)
        extern = kind == "ExternKernelSchedulerNode"
        cost.extern += extern
        cost.generated += not extern
        cost.bytes += moved
        cost.seconds += max(moved / gpu.bytes_per_s, work / gpu.flop_per_s[precision])
        cost.by_kind[kind_of(kernel, origins)] += moved
    if not lowering.is_backward:
        own = [x for x in lowering.graph_outputs if x.has_tensor_output()]
        own = {x.get_name(): x for x in own if x.get_name() not in lowering.graph_inputs}
        cost.kept_bytes = sum(nbytes(x) for x in own.values())
    return cost


def _is_output(buffer: Any) -> bool:
    """Whether it is one of the outputs of an operator with several: no launch of its own."""
    from torch._inductor.ir import MultiOutput

    return isinstance(buffer, MultiOutput)


def repetitions(lowering: Any) -> Counter[str]:
    """Name of a buffer -> bytes that Inductor counts for it and that are not there: an expanded
    tensor repeats its elements. Those of an operator's outputs count for the operator, too, but for
    outputs that nothing reads: Inductor counts no byte of them."""
    found: Counter[str] = Counter()
    alive = {name for node in lowering.scheduler.nodes for name in node.get_buffer_names()}
    for name, buffer in {**lowering.graph_inputs, **lowering.name_to_buffer}.items():
        if not hasattr(buffer, "has_tensor_output") or not buffer.has_tensor_output():
            continue
        count = 1
        for side in buffer.get_size():
            count *= int(side)
        found[name] = count * buffer.get_dtype().itemsize - nbytes(buffer)
        if _is_output(buffer) and name in alive:
            found[buffer.inputs[0].get_name()] += found[name]
    return found


def nbytes(value: Any) -> int:
    """That a tensor takes in memory."""
    size, stride = value.get_size(), value.get_stride()
    last = sum((int(a) - 1) * int(b) for a, b in zip(size, stride, strict=True))
    return (last + 1) * value.get_dtype().itemsize if all(size) else 0


def without_data(value: Any) -> Any:
    """What a graph returns, as a tensor of the active FakeTensorMode."""
    if not value.has_tensor_output():
        return None
    size, stride = ([int(x) for x in xs] for xs in (value.get_size(), value.get_stride()))
    return torch.empty_strided(size, stride, dtype=value.get_dtype(), device=value.get_device())


def move(model: nn.Module, mode: FakeTensorMode) -> nn.Module:
    """`model` on the pretend GPU, without its data."""
    with mode:
        for module in model.modules():
            for name, value in module._parameters.items():
                if value is not None:
                    empty = torch.empty(value.shape, dtype=value.dtype, device=CUDA)
                    module._parameters[name] = nn.Parameter(empty, value.requires_grad)
            for name, value in module._buffers.items():
                if value is not None:
                    empty = torch.empty(value.shape, dtype=value.dtype, device=CUDA)
                    module._buffers[name] = empty
    return model


# ---------------------------------------------------------------------------------------- the arms


METHODS = ("natural", "gradnorm", "pgd_at", "fgsm_rs")


@dataclasses.dataclass(frozen=True)
class Arm:
    """One way to make an update; names as benchmarks/step/cost.py's."""

    method: str
    schedule: Schedule
    precision: str
    kernels: str
    """"triton" or "reference", see models.build_model."""
    budget: float = 1.0
    """Activation memory budget."""

    @property
    def name(self) -> str:
        name = f"{self.method} {self.schedule}" if self.method == "gradnorm" else self.method
        return name if self.budget == 1 else f"{name}, budget {self.budget:g}"

    @property
    def cycle(self) -> int:
        """Updates until its costs repeat."""
        return self.schedule.cycle


@dataclasses.dataclass(frozen=True)
class Network:
    """What is trained, and on how much at a time."""

    model: str
    img_size: int
    batch: int
    classes: int = 1000
    kwargs: tuple[str, ...] = ()
    """See config.ArchitectureConfig.model_kwargs."""

    def build(self, kernels: str) -> Classifier:
        cfg = ArchitectureConfig(
            model=self.model, img_size=self.img_size, pretrained=False, model_kwargs=self.kwargs
        )
        return build_model(cfg, self.classes, kernels=kernels)[0]


def predict(network: Network, arm: Arm, gpu: Gpu) -> Cost:
    """An update's cost, the mean over a cycle's."""
    total = Cost()

    def on_graph(lowering: Any) -> Callable:
        cost = graph_cost(lowering, gpu, arm.precision)
        outputs = list(lowering.graph_outputs)
        with mode:
            empty = [without_data(x) for x in outputs]

        def run(arguments: list[Tensor]) -> list[Any]:
            nonlocal total
            kept = max(total.kept_bytes, cost.kept_bytes)
            total = dataclasses.replace(total.plus(cost), kept_bytes=kept)
            arguments.clear()
            return list(empty)

        return run

    torch._dynamo.reset()
    model = network.build(arm.kernels)
    objective = build_objective(ObjectiveConfig(method=arm.method))
    with pretend(gpu, on_graph) as mode:
        move(model, mode)
        step = Step(
            model,
            objective,
            StepOptions(
                schedule=arm.schedule, precision=arm.precision, activation_memory_budget=arm.budget
            ),
        )
        shape = (network.batch, 3, network.img_size, network.img_size)
        with mode:
            images = torch.rand(shape, device=CUDA)
            targets = torch.rand(network.batch, network.classes, device=CUDA)  # of mixup
            ramp = torch.ones((), device=CUDA)
            for module in (*step.losses.modules(), step.attack):
                if isinstance(module, DoubleBackward):
                    module.token_like(images)
        for update in range(arm.cycle):
            step([(images, targets)], ramp, update)
    torch._dynamo.reset()
    gc.collect()
    return dataclasses.replace(Cost().plus(total, 1 / arm.cycle), kept_bytes=total.kept_bytes)


# --------------------------------------------------------------------------------------- the report


def depths_of(network: Network) -> tuple[int, ...] | None:
    """Blocks a stage of a Swin; None for another network."""
    backbone = network.build("reference").backbone
    stages = getattr(backbone, "layers", ())
    if type(backbone).__name__ != "SwinTransformer":
        return None
    return tuple(len(stage.blocks) for stage in stages)


def with_depths(network: Network, depths: Sequence[int]) -> Network:
    kwargs = tuple(k for k in network.kwargs if not k.startswith("depths="))
    return dataclasses.replace(network, kwargs=(*kwargs, f"depths={tuple(depths)}"))


def shallower(depths: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...], float] | None:
    """Two Swins with fewer blocks in the deepest stage, and how many times the difference of their
    costs, added to the first's, makes the cost of the Swin with these `depths`; None if it is no
    deeper. Blocks come in pairs, plain and shifted; those of a stage are taken to cost the same."""
    deepest = max(depths)
    if deepest <= 4 or deepest % 2:
        return None
    stage = list(depths).index(deepest)
    few, more = ((*depths[:stage], n, *depths[stage + 1 :]) for n in (2, 4))
    return few, more, (deepest - 2) / 2


def predict_deep(network: Network, arm: Arm, gpu: Gpu, whole: bool) -> tuple[Cost, list | None]:
    """The cost, and the depths that it was extrapolated from, if it was."""
    depths = None if whole else depths_of(network)
    parts = shallower(depths) if depths else None
    if parts is None:
        return predict(network, arm, gpu), None
    few, more, times = parts
    low, high = (predict(with_depths(network, d), arm, gpu) for d in (few, more))
    return low.plus(high.plus(low, -1), times), [few, more]


def row_of(network: Network, arm: Arm, gpu: str, cost: Cost, source: list | None) -> dict[str, Any]:
    """One arm on one card, as the record keeps it."""
    batch = network.batch
    return {
        "prediction": True,
        "gpu": gpu,
        "arm": arm.name,
        "method": arm.method,
        "schedule": str(arm.schedule),
        "precision": arm.precision,
        "kernels": arm.kernels,
        "activation_memory_budget": arm.budget,
        "launches": {"generated": cost.generated, "extern": cost.extern},
        "bytes_an_image": cost.bytes / batch,
        "flops_an_image": cost.flops / batch,
        "kept_bytes_an_image": cost.kept_bytes / batch,
        "roofline_ms": 1e3 * cost.seconds,
        "images_per_s": batch / cost.seconds,
        "largest": [
            {"kernel": kind[:200], "bytes_an_image": moved / batch}
            for kind, moved in cost.by_kind.most_common(20)
        ],
        "extrapolated_from_depths": source,
        "eager": eager(network, arm),
    }


def eager(network: Network, arm: Arm) -> dict[str, float]:
    """The same update by PyTorch's operators, run one by one: how many, and the bytes an image that
    they read and write, counted (fastgn.step.cost)."""
    counted = count_cost(
        network.build("reference"),
        build_objective(ObjectiveConfig(method=arm.method)),
        StepOptions(arm.schedule, arm.precision),
        batch_size=network.batch,
        img_size=network.img_size,
        num_classes=network.classes,
    )
    moved = counted.traffic_bytes + counted.fixed_traffic_bytes / network.batch
    return {"operators": counted.operators, "bytes_an_image": moved}


def compare(rows: Sequence[dict[str, Any]]) -> None:
    """Puts beside each row how many times natural's bytes, time and kept activations it has: of
    natural on the same card and precision, with the kernels that move fewer bytes."""
    for row in rows:
        naturals = [
            r
            for r in rows
            if r["method"] == "natural"
            and all(r[k] == row[k] for k in ("gpu", "precision", "activation_memory_budget"))
        ]
        row["over_natural"] = None
        if naturals:
            best = min(naturals, key=lambda r: r["bytes_an_image"])
            names = ("bytes_an_image", "kept_bytes_an_image", "roofline_ms")
            row["over_natural"] = {"kernels": best["kernels"]} | {
                name: row[name] / best[name] for name in names
            }


def arms_of(args: argparse.Namespace, gpu: Gpu) -> list[Arm]:
    kernels = ("triton", "reference") if args.kernels == "both" else (args.kernels,)
    arms = []
    for wanted in args.precision:
        precision = gpu.precision(wanted)
        for kernel in kernels:
            for method in args.methods:
                kinds = args.schedules if method == "gradnorm" else ["exact"]
                for kind in kinds:
                    arms.append(Arm(method, Schedule(kind), precision, kernel, args.budget))
    return list(dict.fromkeys(arms))


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="swin_b")
    parser.add_argument("--model-kwargs", nargs="*", default=[], metavar="KEY=VALUE")
    parser.add_argument("--depths", nargs="+", type=int, help="of a Swin: fewer for a trial")
    parser.add_argument("--img-size", type=int, default=224)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--gpus", nargs="+", default=list(GPUS), choices=GPUS)
    parser.add_argument(
        "--precision", nargs="+", default=["bf16", "bf16-pure"], choices=PRECISIONS,
        help="fp32 where the card cannot",
    )  # fmt: skip
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument(
        "--schedules", nargs="+", default=["exact", "finite-difference", "lazy", "subset"],
        choices=[s for s in SCHEDULES if s != "exact-eager"], help="of gradnorm",
    )  # fmt: skip
    parser.add_argument("--kernels", default="both", choices=("triton", "reference", "both"))
    parser.add_argument("--budget", type=float, default=1.0, help="activation memory budget")
    parser.add_argument(
        "--try", nargs="*", default=[], dest="trial", metavar="NAME=VALUE",
        help="booleans of torch._functorch.config, to see what they would do",
    )  # fmt: skip
    parser.add_argument(
        "--whole", action="store_true",
        help="lower a deep Swin as it is, rather than two shallow ones to extrapolate from",
    )  # fmt: skip
    parser.add_argument("--output", type=Path)
    args = parser.parse_args(argv)
    check(args.batch_size > 0, f"--batch-size {args.batch_size} must be at least 1")
    check(min(args.depths or [1]) > 0, f"--depths {args.depths}: each must be at least 1")
    check(0 < args.budget <= 1, f"--budget {args.budget} must lie in (0, 1]")
    for setting in args.trial:
        name, _, value = setting.partition("=")
        known = isinstance(getattr(torch._functorch.config, name, None), bool)
        check(
            known and value in ("True", "False"),
            f"--try {setting}: should be the name of a boolean, and =True or =False",
        )
    choices = ("model", "gpus", "precision", "methods", "schedules", "kernels", "whole")
    args.output = output_for(f"predict_{args.model}.json", parser, args, free=choices)
    return args


def key_of(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[k] for k in ("gpu", "arm", "precision", "kernels"))


def kept_rows(record: dict[str, Any], output: Path) -> list[dict[str, Any]]:
    """Those that an earlier call has written there of the same network, by the same versions."""
    same = ("model", "model_kwargs", "img_size", "classes", "batch", "tried", "versions")
    for path in (unfinished(output), output):
        before = read_json(path)
        if all(before.get(k) == record[k] for k in same):
            return before["rows"]
    return []


def run(args: argparse.Namespace) -> None:
    network = Network(
        args.model, args.img_size, args.batch_size, args.classes, tuple(args.model_kwargs)
    )
    if args.depths:
        network = with_depths(network, args.depths)
    output = args.output
    record: dict[str, Any] = {
        "script": "benchmarks/step/predict.py",
        "file": output.name,
        "prediction": True,
        "meaning": "prediction: nothing was measured on these cards",
        "model": args.model,
        "model_kwargs": list(network.kwargs),
        "img_size": args.img_size,
        "classes": args.classes,
        "batch": args.batch_size,
        "tried": args.trial,
        "gpus": {},
        "complete": False,
        **environment(),
        "rows": [],
    }
    record["rows"] = kept_rows(record, output)
    trial = {name: value == "True" for name, _, value in (t.partition("=") for t in args.trial)}
    wanted = [(name, arm) for name in args.gpus for arm in arms_of(args, GPUS[name])]
    for index, (name, arm) in enumerate(wanted):
        began = time.perf_counter()
        with torch._functorch.config.patch(trial):
            cost, source = predict_deep(network, arm, GPUS[name], args.whole)
        row = row_of(network, arm, name, cost, source) | {"commit": record["commit"]}
        rows = [r for r in record["rows"] if key_of(r) != key_of(row)] + [row]
        rows.sort(key=lambda r: (list(GPUS).index(r["gpu"]), METHODS.index(r["method"])))
        compare(rows)
        cards = {r["gpu"]: dataclasses.asdict(GPUS[r["gpu"]]) for r in rows}
        record |= {"gpus": cards, "complete": index + 1 == len(wanted), "rows": rows}
        write_record(output, record)
        print(
            f"prediction, {GPUS[name].name}: {arm.name}, {arm.precision}, {arm.kernels} "
            f"kernels: {cost.generated:.0f} + {cost.extern:.0f} launches, "
            f"{row['bytes_an_image'] / 1e6:.0f} MB and {row['flops_an_image'] / 1e9:.1f} GFLOP "
            f"an image, {row['images_per_s']:.0f} images/s at the roofline; "
            f"{time.perf_counter() - began:.0f} s to lower",
            flush=True,
        )
    print(f"{len(record['rows'])} predictions -> {output}")


def main(argv: Sequence[str] | None = None) -> int:
    """Its exit status: 2 for a mistake of the user's."""
    try:
        run(parse(list(sys.argv[1:] if argv is None else argv)))
    except UserError as error:
        print(f"predict.py: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
