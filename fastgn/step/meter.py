"""Counts the operations, bytes and memory of eager code, which may run on fake tensors."""

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

KERNELS = {"fastgn::window_attention", "fastgn::layer_norm"}
"""Ops of fastgn_kernels that stay custom ops in compiled code. The compiler cannot fuse these ops.
Therefore compiling saves fewer bytes and launches if a network uses them."""

CUDA_AUTOCAST_FLOAT32 = {
    **dict.fromkeys(("exp", "log", "pow.Tensor_Scalar", "reciprocal", "rsqrt", "softplus"), False),
    **dict.fromkeys(("layer_norm", "group_norm", "linalg_vector_norm"), False),
    **dict.fromkeys(("softmax.int", "log_softmax.int", "sum", "sum.dim_IntList"), True),
}
"""Operators of classifiers and losses that autocast runs in float32 on CUDA but not on the CPU ->
whether autocast passes them the argument dtype. Source: aten/src/ATen/autocast_mode.h."""


class Meter(TorchDispatchMode):
    """Counts the operations, bytes and memory of the operators that run inside this context.

    Operators of forwards and of backwards are counted. A storage counts as live from the operator
    that returns it until nothing, not even autograd, holds it any more. Storages from before the
    context, such as weights and their gradients, are not counted. Memory that an operator allocates
    and releases inside itself is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0
        """Number of operations of matrix products and convolutions. A multiplication and an
        addition are two operations."""
        self.traffic_bytes = 0
        """Bytes moved if every operator reads its inputs from memory and writes its outputs to
        memory."""
        self.operators = 0
        """Number of operators that read or write memory. Views are not counted."""
        self.live_bytes = 0
        """Bytes of memory that tensors hold now."""
        self.peak_bytes = 0
        """Largest value of live_bytes so far."""
        self.kernels = False
        """Whether window attention or LayerNorm ran as an op of fastgn_kernels."""
        self._sizes: dict[int, int] = {}

    @classmethod
    def is_infra_mode(cls) -> bool:
        """Returns True, so that compiled code stays compiled while this mode is active."""
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
                # reading an expanded tensor reads only the storage that it expands
                min(x.numel() * x.element_size(), _storage(x).nbytes())
                for x in inputs + outputs
            )
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.flops += int(formula(*args, **kwargs, out_val=result))
        self.kernels |= func._schema.name in KERNELS
        return result

    def _watch(self, storage: torch.UntypedStorage) -> None:
        """Adds the bytes of a storage to live_bytes until the storage is released."""
        key, size = storage._cdata, storage.nbytes()
        if key not in self._sizes:  # an operator may return the same storage twice
            self._sizes[key] = size
            self.live_bytes += size
            # the Python object of a storage lives as long as anything holds it, also in C++
            weakref.finalize(storage, self._release, key).atexit = False

    def _release(self, key: int) -> None:
        self.live_bytes -= self._sizes.pop(key)


def _storage(x: Tensor) -> torch.UntypedStorage:
    return x.untyped_storage()


@contextlib.contextmanager
def autocast_as_on_cuda() -> Iterator[None]:
    """Makes autocast on the CPU run the same operators in float32 as autocast on CUDA.

    The tensors that the operators save for the backward then have the same size. On a machine
    without CUDA, fake tensors on a CUDA device would not work, because autograd asks the driver.
    """
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
    """Returns a deep copy of `model` on the CPU. Its tensors have no data, but its weights have
    gradients.

    Must run inside a FakeTensorMode, which makes the tensors fake.
    """
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
