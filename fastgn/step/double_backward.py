"""Compiles losses that themselves differentiate.

The exact step is one graph: forward, input gradient and penalty are traced together, and its
ordinary ``.backward()`` is the second differentiation. ``torch.compile(model)`` with the gradient
taken outside raises; the whole loss has to be inside.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

COMPILER = {
    "trace_autograd_ops": True,  # torch.autograd.grad, instead of breaking the graph at it
    "optimize_ddp": False,  # it would cut the graph between a gradient and its input
    "recompile_limit": 64,  # of all losses of a process together: they share a function's code
}
"""torch._dynamo.config where a DoubleBackward runs."""


@torch.library.custom_op("fastgn::zero", mutates_args=())
def zero(token: Tensor, shape: Sequence[int]) -> Tensor:
    """One zero, expanded to `shape`, that requires grad because `token` does, and whose own
    gradient nobody computes."""
    return token.new_zeros(()).expand(shape)


@zero.register_fake
def _zero_fake(token: Tensor, shape: Sequence[int]) -> Tensor:
    return token.new_empty(()).expand(shape)


zero.register_autograd(lambda ctx, grad: (None, None))


def leaf(x: Tensor, token: Tensor) -> Tensor:
    """`x`, to be differentiated by: ``requires_grad_()`` cannot stand inside a compiled graph, and
    for a leaf made outside the backward computes and keeps a gradient. The sum fuses with what
    comes next."""
    return x + zero(token, x.shape)


class DoubleBackward(nn.Module):
    """See compile_double_backward. `module` is the wrapped one; its parameters are this one's.

    A copy, and what is read from a pickle, has weights and a compiled graph of its own.
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
        self._forget()

    def _forget(self) -> None:
        """Drops what belongs to this object alone."""
        self._compiled: Callable[..., Any] | None = None
        self._tokens: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_compiled": None, "_tokens": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._forget()

    def forward(self, *inputs: Any, **named: Any) -> Any:
        needed = self._needed(inputs, named)
        tokens = [
            self._token(x) if needs else None
            for x, needs in zip(tree_leaves((inputs, named)), needed, strict=True)
        ]
        if self._compiled is None:
            # not a submodule: its parameters would stand in the state dict a second time
            self._compiled = torch.compile(
                self._on_leaves, fullgraph=True, dynamic=False, **self._options
            )
        with (
            torch._dynamo.config.patch(COMPILER),
            torch._functorch.config.patch(
                activation_memory_budget=self._budget,
                # what B and B' share is otherwise kept as well as its own inputs: a fifteenth of
                # the bytes that gradnorm moves (benchmarks/NOTES.md)
                ban_recompute_used_far_apart=False,
            ),
        ):
            return self._compiled(tokens, inputs, named)

    def _needed(self, inputs: tuple, named: dict[str, Any]) -> list[bool]:
        """Returns for each leaf of the inputs, nested or not, whether it is differentiated by and
        does not require grad."""
        needed = []
        for key, value in itertools.chain(enumerate(inputs), named.items()):
            wanted = self._differentiate is None or key in self._differentiate
            needed += [
                wanted and isinstance(x, Tensor) and x.is_floating_point() and not x.requires_grad
                for x in tree_leaves(value)
            ]
        return needed

    def _on_leaves(self, tokens: list[Tensor | None], inputs: tuple, named: dict[str, Any]) -> Any:
        flat, structure = tree_flatten((inputs, named))
        leaves: list[Any] = []
        for index, (x, token) in enumerate(zip(flat, tokens, strict=True)):
            if token is None:
                leaves.append(x)
                continue
            before = [j for j in range(index) if flat[j] is x and tokens[j] is not None]
            # a tensor given twice is one variable
            leaves.append(leaves[before[0]] if before else leaf(x, token))
        inputs, named = tree_unflatten(leaves, structure)
        return self.module(*inputs, **named)

    def _token(self, x: Tensor) -> Tensor:
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
    """Compiles a loss that itself differentiates: gradient penalties, physics-informed residuals,
    forces.

    module: its forward returns the loss (a tensor, or a tuple with it), calling
    ``torch.autograd.grad(..., create_graph=True)`` on the way. Its inputs are tensors, or lists,
    tuples and dictionaries of them, by position or by keyword. The result is called in the same way
    and trained with an ordinary ``.backward()``; wrap it in DistributedDataParallel, not the other
    way round. A copy.deepcopy of it, such as AveragedModel's, has weights of its own.
    differentiate: positions and keywords of the inputs that `module` differentiates with respect
    to; None means every floating-point tensor in the inputs. Those that do not require grad are
    replaced by copies that do, whose own gradient the backward does not compute; where one does,
    its .grad is filled as usual.
    activation_memory_budget: share of the saved activations to keep, the rest is recomputed.
    options: passed on to torch.compile.

    The graph is compiled at the first call, for these shapes: give every batch the same. A graph
    break raises, for a broken graph could train on a wrong gradient.
    """
    return DoubleBackward(module, differentiate, activation_memory_budget, options)


def compilations() -> str:
    """How many graphs this process has compiled, forward and backward, and found in the cache; and
    how many calls could not be CUDA graphs."""
    counters = torch._dynamo.utils.counters["inductor"]
    made, found = (counters[f"fxgraph_cache_{what}"] for what in ("miss", "hit"))
    skipped = f", {counters['cudagraph_skips']} no CUDA graphs" * bool(counters["cudagraph_skips"])
    return f"{made} graphs compiled, {found} found compiled{skipped}"


def graph_count() -> int:
    """Graphs that torch.compile has made in this process: more than a step needs means
    recompilation."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]
