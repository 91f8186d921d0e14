"""Names that users can choose from: recipes, models, methods, activations and optimizers."""

import fnmatch
from collections.abc import Callable
from importlib import resources

from fastgn.config import recipe_names
from fastgn.errors import check
from fastgn.objectives.options import METHODS


def list_recipes() -> dict[str, str]:
    """Returns {name: note} for the recipes. The note is the comment in the first line of the
    recipe's file."""
    folder = resources.files("fastgn").joinpath("recipes")
    first = {n: folder.joinpath(f"{n}.toml").read_text().split("\n")[0] for n in recipe_names()}
    return {name: line.lstrip("# ") if line.startswith("#") else "" for name, line in first.items()}


def list_models() -> dict[str, str]:
    """Returns {name: note} for the networks of timm and fastgn.

    The names include short names, such as swin_b. Their notes give timm's full names.
    """
    import timm  # not at the top of the file, because this import takes seconds

    from fastgn.models.create import ALIASES, OWN

    own = {name: f"short for {full}" for name, full in ALIASES.items()}
    return own | dict.fromkeys(OWN, "for CIFAR") | dict.fromkeys(timm.list_models(), "")


def list_activations() -> dict[str, str]:
    """Returns {name: note} for the activations.

    If a number may follow the name, as in elu:1, the note says which property it sets.
    """
    from fastgn.models.activations import ACTIVATION_ARGUMENT, ACTIVATIONS

    arguments = ACTIVATION_ARGUMENT.items()
    notes = {name: f"or {name}:NUMBER, its {what}" for name, what in arguments}
    return {name: notes.get(name, "") for name in ACTIVATIONS}


def list_optimizers() -> dict[str, str]:
    """Returns {name: note} for timm's optimizers. All notes are empty."""
    import timm.optim

    return dict.fromkeys(map(str, timm.optim.list_optimizers()), "")


KINDS: dict[str, Callable[[], dict[str, str]]] = {
    "recipes": list_recipes,
    "models": list_models,
    "methods": lambda: {name: method.minimises for name, method in METHODS.items()},
    "activations": list_activations,
    "optimizers": list_optimizers,
}
"""Value of --list, such as "models" -> function that returns {name: note} for all such names."""


def format_listing(kind: str, pattern: str = "*") -> str:
    """Returns lines with the names of one kind that match a pattern.

    Each line has one name and its note. Raises UserError if no name matches. kind: value of --list,
    such as "models". pattern: a shell pattern such as '*swin*'.
    """
    found = {n: note for n, note in KINDS[kind]().items() if fnmatch.fnmatch(n, pattern)}
    check(bool(found), f"--list {kind} {pattern}: no name matches this pattern")
    width = min(40, max(map(len, found)))
    return "\n".join(f"{name:{width}}  {note}".rstrip() for name, note in found.items())
