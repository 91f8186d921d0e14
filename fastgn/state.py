"""Declares everything that a checkpoint or an export holds, and checks it when a file is read."""

import copy
import dataclasses
import typing
from collections.abc import Callable
from typing import Annotated, Any, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from fastgn import loss_scale
from fastgn.config import Config
from fastgn.data.identity import Identity
from fastgn.errors import check


@dataclasses.dataclass(frozen=True)
class Key:
    """A condition that the value under one key of a checkpoint or export must meet."""

    expected: str
    """Words for a right value, such as "a finite number", for the error message."""
    fits: Callable[[Any], bool]
    """Function that returns whether a value is as expected."""


def is_number(value: Any) -> bool:
    """Returns whether a value is an int or float, but not a bool, with a magnitude below 2**53."""
    return type(value) in (int, float) and abs(value) < 2**53


def whole(least: int) -> Key:
    """Returns the condition that a value is a whole number of at least `least`."""
    return Key(
        f"a whole number of at least {least}", lambda v: type(v) is int and least <= v < 2**53
    )


def is_texts(value: Any) -> bool:
    """Returns whether a value is a list of strings."""
    return isinstance(value, list) and all(isinstance(v, str) for v in value)


def is_accuracy(value: Any) -> bool:
    """Returns whether a value is a dictionary whose keys are strings and whose values are finite
    numbers."""
    return isinstance(value, dict) and all(
        isinstance(k, str) and is_number(x) for k, x in value.items()
    )


def is_state_dict(value: Any) -> bool:
    """Returns whether a value is a dictionary that has strings as keys and tensors as values.

    It must not be empty.
    """
    return (
        isinstance(value, dict)
        and len(value) > 0
        and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in value.items())
    )


def is_optimizer(value: Any) -> bool:
    """Returns whether a value has the form of an optimizer's state_dict.

    Such a dict maps the number of each parameter to the optimizer's values for it. It also holds
    the parameter groups, which list these numbers.
    """
    if not isinstance(value, dict) or not value.keys() >= {"state", "param_groups"}:
        return False
    state, groups = value["state"], value["param_groups"]
    return (
        isinstance(state, dict)
        and all(type(k) is int and isinstance(v, dict) for k, v in state.items())
        and isinstance(groups, list)
        and all(isinstance(g, dict) and isinstance(g.get("params"), list) for g in groups)
        and all(type(number) is int for g in groups for number in g["params"])
    )


def is_identity(value: Any) -> bool:
    """Returns whether a value has the form of an Identity, which describes a data set.

    It is a dict that maps the name of each split to a dict, whose values are integers and strings.
    """
    return isinstance(value, dict) and all(
        isinstance(name, str)
        and isinstance(split, dict)
        and all(isinstance(k, str) and type(v) in (int, str) for k, v in split.items())
        for name, split in value.items()
    )


NUMBER = Key("a finite number", is_number)
STATE_DICT = Key("tensors by name", is_state_dict)
CONFIG = Key("a recipe's text", lambda v: isinstance(v, str))
CLASSES = Key(
    "a list of different texts, at least 2", lambda v: is_texts(v) and len(set(v)) == len(v) > 1
)


@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that a checkpoint holds. To keep something new, add a field here.

    Fields with a default value were added later, so checkpoints of older versions lack them.
    """

    update: Annotated[int, whole(0)]
    """Number of updates done."""
    best: Annotated[float, NUMBER]
    """Best accuracy of the run's evaluations so far, in 0..1, or -1 before the first evaluation."""
    accuracy: Annotated[dict[str, float], Key("finite numbers by name", is_accuracy)]
    """Accuracies of the last evaluation, in 0..1."""
    sums: Annotated[
        Tensor,
        Key("a tensor of numbers", lambda v: isinstance(v, Tensor) and v.is_floating_point()),
    ]
    """Sums of the logged values over the updates since the last row of metrics.csv. See Run.sums
    for the shape."""
    summed: Annotated[int, whole(0)]
    """Number of updates whose values have been added to `sums`."""
    model: Annotated[dict[str, Tensor], STATE_DICT]
    """state_dict of the network."""
    ema: Annotated[
        dict[str, Tensor] | None,
        Key("tensors by name, or None", lambda v: v is None or is_state_dict(v)),
    ]
    """state_dict of the network with averaged weights. None if the run keeps no moving average."""
    optimizer: Annotated[dict[str, Any], Key("an optimizer's state", is_optimizer)]
    """state_dict of the optimizer."""
    global_batch: Annotated[int, whole(1)]
    """Number of images per update over all ranks."""
    config: Annotated[str, CONFIG]
    """The run's configuration, as TOML."""
    classes: Annotated[list[str], CLASSES]
    """Names of the classes in the order of the network's outputs."""
    epoch: Annotated[float | None, NUMBER] = None
    """Number of epochs done, with a fraction."""
    bad_images: Annotated[list[str], Key("a list of texts", is_texts)] = dataclasses.field(
        default_factory=list
    )
    """One line for each unreadable image that was replaced since the last row of metrics.csv."""
    ranks: Annotated[int | None, whole(1)] = None
    """Number of ranks of the run."""
    evaluation_pending: Annotated[bool, Key("True or False", lambda v: type(v) is bool)] = False
    """Whether the evaluation after the last update must be made again, because a signal ended
    it."""
    data: Annotated[Identity | None, Key("a description of each split's images", is_identity)] = (
        None
    )
    """Digests that identify the run's images. None if the checkpoint is from an older version,
    which did not save them."""
    loss_scale: Annotated[
        Tensor | None,
        Key("the scale of losses in fp16, or None", lambda v: v is None or loss_scale.is_state(v)),
    ] = None
    """Scale of the losses in fp16, and number of updates since it changed (LossScale.state). None
    in other precisions."""

    def saved_config(self) -> Config:
        """Returns the configuration of the run that wrote the checkpoint. Raises UserError if the
        configuration is invalid."""
        return Config.from_toml(self.config)

    def copy_to_host(self) -> "TrainState":
        """Returns a copy in the host's memory, which later updates do not change.

        Tensors that share memory also share it in the copy. A checkpoint of the copy therefore has
        the same content as a checkpoint of the original.
        """
        storages: dict[int, Any] = {}
        found = tree_leaves(vars(self))
        copies = {id(x): copy_tensor(x, storages) for x in found if isinstance(x, Tensor)}
        return TrainState(**copy.deepcopy(vars(self), copies))


def copy_tensor(tensor: Tensor, storages: dict[int, Any]) -> Tensor:
    """Returns a copy of a tensor in the host's memory.

    Tensors that share a storage also share its copy. storages: identity of each storage that was
    copied so far -> the copy. The function adds the tensor's storage if it is missing.
    """
    storage = tensor.untyped_storage()
    if storage._cdata not in storages:
        on_host = storage.device.type == "cpu"
        storages[storage._cdata] = storage.clone() if on_host else storage.cpu()
    place = tensor.storage_offset(), tensor.size(), tensor.stride()
    return torch.empty(0, dtype=tensor.dtype).set_(storages[storage._cdata], *place)


@dataclasses.dataclass(frozen=True)
class ExportHeader:
    """Everything that the header of an exported .safetensors file holds."""

    config: Annotated[str, CONFIG]
    """The run's configuration, as TOML."""
    classes: Annotated[list[str], CLASSES]
    """Names of the classes in the order of the network's outputs."""
    update: Annotated[int | None, whole(0)] = None
    """Number of updates for which the weights were trained."""


Content = TypeVar("Content", TrainState, ExportHeader)


def keys_of(kind: type) -> dict[str, Key]:
    """Returns {name of a field: condition for its value} for TrainState or ExportHeader."""
    hints = typing.get_type_hints(kind, include_extras=True)
    return {name: hint.__metadata__[0] for name, hint in hints.items()}


def read_fields(content: Any, kind: type[Content], where: str) -> Content:
    """Returns the content of a checkpoint or an export's header as a TrainState or ExportHeader.

    Raises UserError if a key is missing, has an unexpected value, or was added by a newer version.
    where: beginning of the error's message.
    """
    check(
        isinstance(content, dict),
        f"{where} holds a {type(content).__name__}, but should hold a dict of named values",
    )
    keys = keys_of(kind)
    unknown = next((k for k in content if k not in keys), None)
    check(
        unknown is None,
        f"{where} holds {str(unknown)[:80]!r}, which this version of fastgn does not know: a newer "
        "version has written it, so update fastgn",
    )
    for field in dataclasses.fields(kind):
        may_lack = field.default is not dataclasses.MISSING or (
            field.default_factory is not dataclasses.MISSING
        )
        if field.name not in content:
            check(may_lack, f"{where} is damaged: it lacks {field.name!r}")
            continue
        key = keys[field.name]
        check(
            key.fits(content[field.name]),
            f"{where} is damaged: {field.name!r} should be {key.expected}",
        )
    return kind(**content)


def as_dict(content: TrainState | ExportHeader) -> dict[str, Any]:
    """Returns {name of a field: its value}, the form in which the content is written into a file.

    A field is left out if its value and its default are both None.
    """
    fields = {f.name: (getattr(content, f.name), f.default) for f in dataclasses.fields(content)}
    return {
        name: v for name, (v, default) in fields.items() if v is not None or default is not None
    }
