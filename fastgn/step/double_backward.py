"""Compiles losses that themselves differentiate, such as a loss with a gradient penalty.

Forward, input gradient and penalty are traced together as one graph. The ordinary ``.backward()``
of that graph is the second differentiation. The whole loss must be inside the graph because
PyTorch raises an error if the gradient of a compiled network is differentiated again.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

COMPILER = {
    "trace_autograd_ops": True,  # otherwise torch.autograd.grad would break the graph
    # otherwise Dynamo would cut the graph at DDP's buckets, between the images and their gradient
    "optimize_ddp": False,
    "recompile_limit": 64,  # this is high, because one function runs all losses of a process
}
"""Settings of torch._dynamo.config while a DoubleBackward runs."""


@torch.library.custom_op("fastgn::zero", mutates_args=())
def zero(token: Tensor, shape: Sequence[int]) -> Tensor:
    """Returns a tensor of zeros with this shape that requires grad because `token` does.

    token: any scalar that requires grad. `leaf` adds these zeros to a tensor, so that the sum
    requires grad inside a compiled graph, which cannot contain ``requires_grad_()``. The backward
    of this op computes nothing. All elements of the returned tensor share the memory of one number.
    """
    return token.new_zeros(()).expand(shape)


@zero.register_fake
def _zero_fake(token: Tensor, shape: Sequence[int]) -> Tensor:
    return token.new_empty(()).expand(shape)


zero.register_autograd(lambda ctx, grad: (None, None))


def leaf(x: Tensor, token: Tensor) -> Tensor:
    """Returns a copy of `x` that requires grad, so that a loss can be differentiated with respect
    to it.

    A compiled graph cannot contain ``x.requires_grad_()``. If ``x.requires_grad_()`` were called
    outside the graph, the backward would compute and keep a gradient of `x`. The copy is the sum of
    `x` and zeros that require grad because `token` does. The compiler fuses the sum with the next
    operator. token: a scalar that requires grad.
    """
    return x + zero(token, x.shape)


class DoubleBackward(nn.Module):
    """Compiles and runs a module whose forward differentiates.

    `compile_double_backward` makes objects of this class. Their parameters are the parameters of
    `module`. A copy and an unpickled object have weights and a compiled graph of their own.
    """

    def __init__(
        self,
        module: nn.Module,
        differentiate: Sequence[int | str] | None,
        budget: float,
        options: dict[str, Any],
    ):
        super().__init__()
        self.module = module
        self._differentiate = differentiate
        self._budget = budget
        self._options = options
        self._drop_compiled()

    def _drop_compiled(self) -> None:
        """Drops the compiled graph, and the scalars that require grad (tokens). This is done in a
        new module and in an unpickled copy, which must make their own."""
        self._compiled: Callable[..., Any] | None = None
        self._tokens: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_compiled": None, "_tokens": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._drop_compiled()

    def forward(self, *inputs: Any, **named: Any) -> Any:
        needed = self._needs_leaf(inputs, named)
        tokens = [
            self.token_like(x) if needs else None
            for x, needs in zip(tree_leaves((inputs, named)), needed, strict=True)
        ]
        if self._compiled is None:
            # compile a method, because a compiled module would be in the state dict a second time
            self._compiled = torch.compile(
                self._run_on_leaves, fullgraph=True, dynamic=False, **self._options
            )
        with (
            torch._dynamo.config.patch(COMPILER),
            torch._functorch.config.patch(
                activation_memory_budget=self._budget,
                # Let the second backward recompute values that both backwards use.
                # For gradnorm this saves a fifteenth of all memory traffic (benchmarks/NOTES.md).
                ban_recompute_used_far_apart=False,
            ),
        ):
            return self._compiled(tokens, inputs, named)

    def _needs_leaf(self, inputs: tuple, named: dict[str, Any]) -> list[bool]:
        """Returns for each value in the inputs whether to replace it with a copy that requires
        grad.

        This is necessary for a tensor with respect to which the module differentiates, if the
        tensor does not require grad yet. named: the inputs that are passed by keyword.
        """
        needed = []
        for key, value in itertools.chain(enumerate(inputs), named.items()):
            wanted = self._differentiate is None or key in self._differentiate
            needed += [
                wanted and isinstance(x, Tensor) and x.is_floating_point() and not x.requires_grad
                for x in tree_leaves(value)
            ]
        return needed

    def _run_on_leaves(
        self, tokens: list[Tensor | None], inputs: tuple, named: dict[str, Any]
    ) -> Any:
        """Runs the module on its inputs, after replacing some of them with copies that require
        grad.

        tokens: for each input, None, or a scalar that requires grad, with which `leaf` makes the
        copy. named: the inputs that are passed by keyword.
        """
        flat, structure = tree_flatten((inputs, named))
        leaves: list[Any] = []
        for index, (x, token) in enumerate(zip(flat, tokens, strict=True)):
            if token is None:
                leaves.append(x)
                continue
            before = [j for j in range(index) if flat[j] is x and tokens[j] is not None]
            # a tensor that is given twice gets only one copy, because it is one variable
            leaves.append(leaves[before[0]] if before else leaf(x, token))
        inputs, named = tree_unflatten(leaves, structure)
        return self.module(*inputs, **named)

    def token_like(self, x: Tensor) -> Tensor:
        """Returns a scalar that requires grad, on the device and of the dtype of `x`."""
        key = x.device, x.dtype
        if key not in self._tokens:
            self._tokens[key] = torch.zeros((), device=x.device, dtype=x.dtype, requires_grad=True)
        return self._tokens[key]


def compile_double_backward(
    module: nn.Module,
    *,
    differentiate: Sequence[int | str] | None = None,
    activation_memory_budget: float = 1.0,
    **options: Any,
) -> nn.Module:
    """Compiles a loss that itself differentiates, such as a gradient penalty, the residual of a
    physics-informed network, or forces that are the gradient of an energy.

    Returns a module that is called like `module` and trained with an ordinary ``.backward()``.
    Wrap the result in DistributedDataParallel, not the other way round. A copy.deepcopy of the
    result, such as the copy in AveragedModel, has weights of its own.

    module: its forward returns the loss, or a tuple with the loss, and calls
    ``torch.autograd.grad(..., create_graph=True)`` on the way. Its inputs are tensors, or lists,
    tuples and dictionaries of tensors, by position or by keyword.
    differentiate: positions and keywords of the inputs that `module` differentiates with respect
    to. None means every floating-point tensor in the inputs. An input that does not require grad
    is replaced by a copy that does, and the backward computes no gradient of the input. If an input
    requires grad, its .grad is filled as usual.
    activation_memory_budget: share of the saved activations to keep. The backward recomputes the
    rest.
    options: passed on to torch.compile.

    The first call compiles the graph for the shapes of its inputs. Give every batch the same
    shapes. A graph break raises an error, because a broken graph could give a wrong gradient.
    """
    return DoubleBackward(module, differentiate, activation_memory_budget, options)


def describe_compilations() -> str:
    """Returns a text with the number of graphs that this process has compiled, and of those that it
    has loaded from the cache on disk.

    If some calls could not use CUDA graphs, the text also has their number.
    """
    counters = torch._dynamo.utils.counters["inductor"]
    made, found = (counters[f"fxgraph_cache_{what}"] for what in ("miss", "hit"))
    skips = counters["cudagraph_skips"]
    skipped = f", {skips} calls without CUDA graphs" if skips else ""
    return f"{made} graphs compiled, {found} loaded from the cache{skipped}"


def count_graphs() -> int:
    """Returns the number of graphs that torch.compile has made in this process.

    A number above what a step needs means that something was compiled again.
    """
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]
