"""Computes digests of everything that the results of a training depend on.

A record keeps the digests of each result. With them, a program on another machine recognises the
results that it would have got itself. So no table mixes results of different code or options.
"""

import ast
import dataclasses
import functools
import hashlib
import importlib
import inspect
import json
from types import ModuleType
from typing import Any

from fastgn import attacks
from fastgn.config import FIELDS, Config
from fastgn.models import preact_resnet
from fastgn.objectives import base

LOCAL = ("output", "initial_checkpoint", "resume", "data_dir")
"""Options of fastgn.train that say where files lie. They do not change the weights."""


def digest(content: Any) -> str:
    """Returns a digest of ten characters. content: any value that JSON can hold."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:10]


def digests_of(cfg: Config) -> dict[str, str]:
    """Returns digests of the network, of the objective and of everything else in a training.

    The keys are "network", "objective" and "training". The digests cover the options, and the code
    of the objective and of fastgn's own network.
    """
    groups: dict[str, dict[str, Any]] = {}
    for key, value in cfg.flat().items():
        if key not in LOCAL:
            groups.setdefault(FIELDS[key], {})[key] = value
    own = [dataclasses.asdict(options) for options in cfg.objective.own_options]
    own_digest = ("architecture", "objective")  # of which an error message can say that it differs
    rest = {name: g for name, g in groups.items() if name.split(".")[0] not in own_digest}
    return {
        "network": digest([groups["architecture"], code_of(preact_resnet)]),
        "objective": digest([groups["objective"], own, objective_code(cfg.objective.method)]),
        "training": digest(rest),
    }


def objective_code(method: str) -> list[str]:
    """Returns the source code of each module that computes a method's loss or its attack.

    method: value of --method.
    """
    folder, found = "fastgn.objectives.methods", {base, attacks}
    left = [importlib.import_module(f"{folder}.{method.replace('+', '_')}")]
    while left:
        module = left.pop()
        found.add(module)
        used = [value for value in vars(module).values() if inspect.ismodule(value)]
        left += [value for value in used if value.__name__.startswith(folder)]
    return [code_of(module) for module in sorted(found, key=lambda m: m.__name__)]


@functools.cache
def code_of(module: ModuleType) -> str:
    """Returns the source of a module without comments and docstrings, and with empty f-strings."""
    return ast.unparse(Essence().visit(ast.parse(inspect.getsource(module))))


class Essence(ast.NodeTransformer):
    """Removes docstrings and the texts of f-strings from the syntax tree of a module."""

    def visit_Expr(self, node: ast.Expr) -> ast.AST | None:  # noqa: N802 - ast's name
        """Removes a docstring, or a text below a field."""
        return None if isinstance(node.value, ast.Constant) else self.generic_visit(node)

    def visit_JoinedStr(self, node: ast.JoinedStr) -> ast.AST:  # noqa: N802 - ast's name
        """Replaces an f-string by "", because versions of Python unparse f-strings differently.

        The f-strings in these modules are messages, which change no result.
        """
        return ast.Constant("")
