"""Names the layer in which a loss, or one of its derivatives, stops being finite."""

import re
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

LABEL = "fastgn_layer"
"""Key among the notes of an autograd node that has a hook: the layer that it belongs to."""


class Diagnosis:
    """Watches the layers of a network, forwards and backwards, until a value is not finite.

    Values are looked at layer by layer. Derivatives are looked at node by node of the autograd
    graph, so that a NaN that an operator masks again is no finding. Every look waits for the
    device.
    """

    def __init__(self) -> None:
        self.found: str | None = None

    def run(self, model: nn.Module, loss: Callable[[], Tensor]) -> str | None:
        """Computes a loss and its gradients eagerly; returns what is not finite first, or None.

        model: the network, whose layers are named. loss may itself differentiate, with
        create_graph=True.
        """
        weights = [p for p in model.parameters() if p.requires_grad]
        hooks = [m.register_forward_hook(self.after(name)) for name, m in model.named_modules()]
        try:
            with warnings.catch_warnings():  # PyTorch's, that this mode is slow
                warnings.simplefilter("ignore")
                # the mode notes which node of the first backward has made which of the second
                with torch.autograd.set_detect_anomaly(True, check_nan=False):
                    total = loss()
                    self.watch(nodes_of(total), set())
                    torch.autograd.grad(total, weights, allow_unused=True)
        finally:
            for hook in hooks:
                hook.remove()
        return self.found

    def after(self, name: str) -> Callable[[nn.Module, Any, Any], None]:
        """Returns a forward hook for the layer of this name."""

        def hook(module: nn.Module, inputs: Any, outputs: Any) -> None:
            where = f"layer {name} ({type(module).__name__})" if name else "the network"
            if self.found is None and are_finite(inputs) and not are_finite(outputs):
                self.found = f"{where} gives a value that is not finite"
            self.watch(nodes_of(outputs), set(nodes_of(inputs)), where)

        return hook

    def watch(self, nodes: list[Any], inputs: set[Any], where: str | None = None) -> None:
        """Hooks the nodes that lead from an output back to `inputs`, if no layer inside has."""
        seen = set(inputs)
        while nodes:
            node = nodes.pop()
            if node in seen:
                continue
            seen.add(node)
            if LABEL not in node.metadata:
                node.metadata[LABEL] = where
                node.register_hook(self.look(node.name(), describe(node)))
            nodes += [other for other, _ in node.next_functions if other is not None]

    def look(self, operator: str, where: str) -> Callable[[Any, Any], None]:
        """Returns a hook that looks at the gradients that a node was given and has computed."""

        def hook(computed: Any, given: Any) -> None:
            if self.found is None and are_finite(given) and not are_finite(computed):
                self.found = f"{where} is not finite (in {operator})"

        return hook


def describe(node: Any) -> str:
    """Returns which derivative a node computes: its order, and its layer."""
    order, layer = 0, None
    while node is not None:
        order += 1
        layer = layer or node.metadata.get(LABEL)
        node = node.metadata.get("parent_")
    return f"the {'second ' if order > 1 else ''}derivative of {layer or 'the loss'}"


def nodes_of(values: Any) -> list[Any]:
    """Returns the autograd nodes that have made the tensors in nested values."""
    leaves = (x for x in tree_leaves(values) if isinstance(x, Tensor))
    return [x.grad_fn for x in leaves if x.grad_fn is not None]


def are_finite(values: Any) -> bool:
    """Returns whether every number in the floating-point tensors of nested values is finite."""
    leaves = (x for x in tree_leaves(values) if isinstance(x, Tensor) and x.is_floating_point())
    return all(bool(torch.isfinite(x).all()) for x in leaves)


def missing_derivative(error: BaseException) -> str | None:
    """Returns the operator that an update could not be differentiated twice because of, if any."""
    missing = re.search(r"derivative for (?:aten::)?(\w+) is not implemented", str(error))
    return missing[1].removesuffix("_backward") if missing else None
