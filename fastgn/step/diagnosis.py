"""Finds out why an update failed: a layer that is not finite, or a missing derivative."""

import re
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

LABEL = "fastgn_layer"
"""Key in the metadata of an autograd node. Its value is a text that names the node's layer."""


class Diagnosis:
    """Looks for the first layer of a network whose output or derivative is not finite.

    Outputs are checked at the end of each layer, so that an infinity inside a layer, as in an
    attention mask, does not count. Derivatives are checked at every node of the autograd graph.
    Every check waits for the device.
    """

    def __init__(self) -> None:
        self.found: str | None = None
        """Text that names the first value that is not finite. None if all were finite so far."""

    def run(self, model: nn.Module, loss: Callable[[], Tensor]) -> str | None:
        """Computes a loss and its gradients without compiling. Returns a text that names the first
        value that is not finite, or None.

        loss: function that computes the loss of `model`. It may differentiate with
        create_graph=True.
        """
        weights = [p for p in model.parameters() if p.requires_grad]
        hooks = [
            m.register_forward_hook(self.make_layer_hook(name)) for name, m in model.named_modules()
        ]
        try:
            with warnings.catch_warnings():  # PyTorch warns that this mode is slow
                warnings.simplefilter("ignore")
                # in this mode, nodes of the second backward store which node created them
                with torch.autograd.set_detect_anomaly(True, check_nan=False):
                    total = loss()
                    self.watch_nodes(find_nodes(total), set())
                    torch.autograd.grad(total, weights, allow_unused=True)
        finally:
            for hook in hooks:
                hook.remove()
        return self.found

    def make_layer_hook(self, name: str) -> Callable[[nn.Module, Any, Any], None]:
        """Returns a forward hook for the layer with this name.

        The hook checks the layer's output. It also adds hooks to the layer's autograd nodes, which
        check the derivatives in the backward.
        """

        def hook(module: nn.Module, inputs: Any, outputs: Any) -> None:
            where = f"layer {name} ({type(module).__name__})" if name else "the network"
            if self.found is None and are_finite(inputs) and not are_finite(outputs):
                self.found = f"{where} gives a value that is not finite"
            self.watch_nodes(find_nodes(outputs), set(find_nodes(inputs)), where)

        return hook

    def watch_nodes(self, nodes: list[Any], inputs: set[Any], where: str | None = None) -> None:
        """Adds a hook to each autograd node on the way from `nodes` back to `inputs`.

        A node that already has a hook is left as it is, because it belongs to a layer inside this
        layer. where: text that names the layer of the nodes. None means the loss itself.
        """
        seen = set(inputs)
        while nodes:
            node = nodes.pop()
            if node in seen:
                continue
            seen.add(node)
            if LABEL not in node.metadata:
                node.metadata[LABEL] = where
                node.register_hook(self.make_node_hook(node.name(), describe_node(node)))
            nodes += [other for other, _ in node.next_functions if other is not None]

    def make_node_hook(self, operator: str, where: str) -> Callable[[Any, Any], None]:
        """Returns a hook that checks the gradients that an autograd node has computed.

        operator: name of the node. where: text from `describe_node` about the node. Both texts
        appear in the result of `run`.
        """

        def hook(computed: Any, given: Any) -> None:
            if self.found is None and are_finite(given) and not are_finite(computed):
                self.found = f"{where} is not finite (in {operator})"

        return hook


def describe_node(node: Any) -> str:
    """Returns a text that names the derivative that an autograd node computes: its order and its
    layer."""
    order, layer = 0, None
    while node is not None:
        order += 1
        layer = layer or node.metadata.get(LABEL)
        node = node.metadata.get("parent_")
    return f"the {'second ' if order > 1 else ''}derivative of {layer or 'the loss'}"


def find_nodes(values: Any) -> list[Any]:
    """Returns the autograd nodes whose outputs are the tensors in nested lists, tuples and
    dicts."""
    leaves = (x for x in tree_leaves(values) if isinstance(x, Tensor))
    return [x.grad_fn for x in leaves if x.grad_fn is not None]


def are_finite(values: Any) -> bool:
    """Returns whether all numbers in the floating-point tensors of nested lists, tuples and dicts
    are finite."""
    leaves = (x for x in tree_leaves(values) if isinstance(x, Tensor) and x.is_floating_point())
    return all(bool(torch.isfinite(x).all()) for x in leaves)


def find_missing_derivative(error: BaseException) -> str | None:
    """Returns the operator whose missing derivative has caused an error, or None for other
    errors."""
    missing = re.search(r"derivative for (?:aten::)?(\w+) is not implemented", str(error))
    return missing[1].removesuffix("_backward") if missing else None
