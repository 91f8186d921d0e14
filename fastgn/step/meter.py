"""Counts what an eager step does, on tensors with or without data."""

import contextlib
import copy
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

WINDOW_ATTENTION = {
    "fastgn::window_attention": (0, 2),
    "fastgn::window_attention_bwd": (1, 5),
    "fastgn::window_attention_bwd_bwd": (3, 12),
}
"""Op -> (which argument is qkv, how many products of N x D by D x N it takes): an op of its own is
opaque to PyTorch's formulas. The products are those of the bodies, what they recompute included."""

KERNELS = {*WINDOW_ATTENTION, "fastgn::layer_norm"}

CUDA_AUTOCAST_FLOAT32 = {
    **dict.fromkeys(("exp", "log", "pow.Tensor_Scalar", "reciprocal", "rsqrt", "softplus"), False),
    **dict.fromkeys(("layer_norm", "group_norm", "linalg_vector_norm"), False),
    **dict.fromkeys(("softmax.int", "log_softmax.int", "sum", "sum.dim_IntList"), True),
}
"""Operators that autocast takes to float32 on CUDA and not on the CPU, of those that classifiers
and their losses meet -> whether by a dtype argument. Source: aten/src/ATen/autocast_mode.h."""


class Meter(TorchDispatchMode):
    """Counts what runs inside it, below autograd: each operator once, forward or backward.

    A storage is live from the operator that returns it to its release, whoever holds it, autograd
    included; those made before, such as weights and their gradients, are not counted. What an
    operator takes for itself and gives back is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0
        """Of matrix products and convolutions; a multiplication and an addition are two."""
        self.traffic_bytes = 0
        """Read and written if every operator reads its inputs from memory and writes its outputs
        there."""
        self.operators = 0
        """Those that read or write; views do not."""
        self.live_bytes = 0
        self.peak_bytes = 0
        self.kernels = False
        """Whether window attention or LayerNorm ran as an op of fastgn_kernels."""
        self._sizes: dict[int, int] = {}

    @classmethod
    def is_infra_mode(cls) -> bool:
        """A compiled step stays compiled inside: torch.compile gives way to other modes."""
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        inputs, outputs = (
            [x for x in tree_leaves(values) if isinstance(x, Tensor)]
            for values in ((args, kwargs), result)
        )
        known = {_storage(x)._cdata for x in inputs}
        new = [x for x in outputs if _storage(x)._cdata not in known]
        for x in new:
            self._watch(_storage(x))
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        if new or func._schema.is_mutable:
            self.operators += 1
            self.traffic_bytes += sum(
                # an expanded tensor reads what it expands
                min(x.numel() * x.element_size(), _storage(x).nbytes())
                for x in inputs + outputs
            )
        self.flops += _flops(func, args, kwargs, result)
        self.kernels |= func._schema.name in KERNELS
        return result

    def _watch(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._sizes:  # an operator may return one twice
            self._sizes[key] = size
            self.live_bytes += size
            # the storage keeps its Python object as long as anything, C++ included, holds it
            weakref.finalize(storage, self._release, key).atexit = False

    def _release(self, key: int) -> None:
        self.live_bytes -= self._sizes.pop(key)


def _storage(x: Tensor) -> torch.UntypedStorage:
    return x.untyped_storage()


def _flops(func: Any, args: Any, kwargs: Any, result: Any) -> int:
    formula = flop_registry.get(func._overloadpacket)
    if formula is not None:
        return int(formula(*args, **kwargs, out_val=result))
    if func._schema.name in WINDOW_ATTENTION:
        position, products = WINDOW_ATTENTION[func._schema.name]
        qkv = args[position]
        return 2 * products * (qkv.numel() // 3) * qkv.shape[3]
    return 0


@contextlib.contextmanager
def autocast_as_on_cuda() -> Iterator[None]:
    """Makes the CPU's autocast keep in float32 what CUDA's does, and so what they save for the
    backward. Fake tensors on a CUDA device would need one: autograd asks its driver."""
    unset = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)

    def kernel(op: Any, by_dtype: bool) -> Callable[..., Any]:
        def wide(x: Any) -> Any:
            low = isinstance(x, Tensor) and x.dtype in (torch.bfloat16, torch.float16)
            return x.float() if low else x

        def run(*args: Any, **kwargs: Any) -> Any:
            if by_dtype and kwargs.get("dtype") is None and args[0].is_floating_point():
                kwargs["dtype"] = torch.promote_types(args[0].dtype, torch.float32)
            elif not by_dtype:
                args = tuple(wide(x) for x in args)
            with torch._C._ExcludeDispatchKeyGuard(unset):
                return op(*args, **kwargs)

        return run

    with torch.library._scoped_library("aten", "IMPL") as library:
        for name, by_dtype in CUDA_AUTOCAST_FLOAT32.items():
            packet, _, overload = name.partition(".")
            op = getattr(getattr(torch.ops.aten, packet), overload or "default")
            library.impl(name, kernel(op, by_dtype), "AutocastCPU")
        yield


def fake_copy(model: nn.Module) -> nn.Module:
    """A deep copy on the CPU, its tensors fake ones of the FakeTensorMode in force, its gradients
    there."""
    memo: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
        if isinstance(tensor, nn.Parameter):
            fake = nn.Parameter(fake, tensor.requires_grad)
        memo[id(tensor)] = fake
    copied = copy.deepcopy(model, memo)
    for parameter in copied.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.empty_like(parameter)
    return copied
