"""Creates a network from its name. The network is one of timm's or one of fastgn's own."""

import difflib
import inspect
import math
import re
import sys
from typing import Any

import timm
from timm.models import build_model_with_cfg, model_entrypoint
from torch import nn

from fastgn.config.groups import ArchitectureConfig
from fastgn.config.pairs import model_kwargs
from fastgn.errors import SUGGESTIONS, UserError, check, first_line, nearest
from fastgn.models.activations import parse_activation
from fastgn.models.preact_resnet import PreActResNet18

ALIASES = {
    "swin_t": "swin_tiny_patch4_window7_224",
    "swin_s": "swin_small_patch4_window7_224",
    "swin_b": "swin_base_patch4_window7_224",
    "swin_l": "swin_large_patch4_window7_224",
}
"""Short name -> timm's name of the network."""
OWN = {"preact_resnet18": PreActResNet18}
"""Name of a network that timm does not have -> its class."""


def check_name(cfg: ArchitectureConfig) -> str:
    """Returns the full name of the configured network, without creating the network.

    Raises UserError if the network or the activation is unknown.
    """
    name = ALIASES.get(cfg.model, cfg.model)
    # Check the characters of the whole name, because exported code contains the whole name.
    # timm checks only the part before the first dot.
    plain = re.fullmatch(r"[\w.-]+", name, re.ASCII) is not None
    if name not in OWN and not (plain and timm.is_model(name)):
        matches = timm.list_models(name) if set(name) & set("*?[") else []
        if matches:
            raise UserError(
                f"--model {cfg.model!r} matches {len(matches)} networks, such as "
                f"{', '.join(matches[:SUGGESTIONS])}: name one, or see --list models {cfg.model!r}"
            )
        valid = [*ALIASES, *OWN, *timm.list_models()]
        raise UserError(f"--model {cfg.model!r} is unknown: {nearest(name, valid)}")
    if cfg.activation:
        parse_activation(cfg.activation)
    return name


def create_network(
    name: str, cfg: ArchitectureConfig, num_classes: int
) -> tuple[nn.Module, dict[str, Any]]:
    """Returns a network that does not normalise its input, and its constructor's arguments.

    name: full name from `check_name`. Raises UserError if the constructor refuses the arguments, or
    if pretrained weights cannot be fetched.
    """
    given = model_kwargs(cfg.model_kwargs)
    check_kwargs(name, given)
    kwargs = {"num_classes": num_classes, **given}
    if name in OWN:
        check(
            not cfg.pretrained,
            f"--pretrained: there are no weights of {name} to fetch: leave --pretrained out",
        )
        check(
            not cfg.drop_path,
            f"--drop-path {cfg.drop_path}: {name} has no stochastic depth: leave --drop-path out",
        )
        try:
            kwargs = {"drop_rate": cfg.drop} | kwargs
            return OWN[name](**kwargs), kwargs
        except Exception as error:  # constructors may raise any error for odd arguments
            raise UserError(f"{format_flags(cfg)} cannot be built: {first_line(error)}") from None
    if cfg.pretrained:
        use_cache_if_offline()
    # pass drop_path_rate even if it is 0, because Swin's default is 0.1
    optional: dict[str, Any] = {"drop_rate": cfg.drop, "drop_path_rate": cfg.drop_path}
    optional["img_size"] = cfg.img_size
    optional = {k: v for k, v in optional.items() if v is not None and k not in kwargs}
    while True:
        try:
            network = timm.create_model(name, pretrained=cfg.pretrained, **kwargs, **optional)
            return network, kwargs | optional
        except TypeError as error:
            refused = next((k for k in optional if f"'{k}'" in str(error)), None)
            if refused is None:
                raise UserError(
                    f"{format_flags(cfg)} cannot be built: {first_line(error)}"
                ) from None
            check(
                refused != "drop_path_rate" or not cfg.drop_path,
                f"--drop-path {cfg.drop_path}: {name} has no stochastic depth: leave "
                "--drop-path out",
            )
            check(
                refused != "drop_rate" or not cfg.drop,
                f"--drop {cfg.drop}: {name} has no dropout: leave --drop out",
            )
            del optional[refused]
        except OSError as error:
            raise UserError(
                f"--pretrained: the hub gave no weights of {name} ({first_line(error)}): get them "
                "from elsewhere and add --initial-checkpoint FILE"
            ) from None
        except Exception as error:  # constructors may raise any error for odd arguments
            what_failed = (
                "--pretrained" if cfg.pretrained else f"{format_flags(cfg)} cannot be built"
            )
            raise UserError(f"{what_failed}: {first_line(error)}") from None


def format_flags(cfg: ArchitectureConfig) -> str:
    """Returns the command-line flags that describe a network, for messages."""
    if not cfg.model_kwargs:
        return f"--model {cfg.model}"
    return f"--model {cfg.model} --model-kwargs {' '.join(cfg.model_kwargs)}"


NEVER_GIVEN = ("features_only", "out_indices", "device", "dtype", "kwargs")
"""Constructor arguments that --model-kwargs may not set.

With them the network would not be an ordinary classifier.
"""


def list_constructor_arguments(name: str) -> set[str]:
    """Returns the names of the arguments that the classes of a network and of its blocks take.

    Arguments of timm's own factories are excluded, because some of them name files to load.
    """
    if name in OWN:
        return set(inspect.signature(OWN[name]).parameters)
    module = sys.modules[model_entrypoint(name.partition(".")[0]).__module__]
    classes = [c for c in vars(module).values() if inspect.isclass(c)]
    # the functions that build EfficientNets take these two arguments, but no class takes them
    found = {"bn_eps", "bn_momentum"}
    for kind in {k for c in classes for k in c.__mro__ if k.__module__.startswith("timm.models.")}:
        found |= set(inspect.signature(kind).parameters)
    factories = set(inspect.signature(timm.create_model).parameters)
    factories |= set(inspect.signature(build_model_with_cfg).parameters)
    return found - factories - set(NEVER_GIVEN)


def check_kwargs(name: str, given: dict[str, Any]) -> None:
    """Raises UserError unless --model-kwargs are plain values that the network's constructor takes.

    name: full name of the network. given: the arguments in --model-kwargs.

    A checkpoint holds such arguments too. A checkpoint from a stranger must not make timm open
    other files.
    """
    known = list_constructor_arguments(name) if given else set()
    for key, value in given.items():
        close = difflib.get_close_matches(key, sorted(known), n=1)
        check(
            key in known,
            f"--model-kwargs {key}: the constructor of {name} takes no such argument"
            + (f"; did you mean {close[0]!r}?" if close else ""),
        )
        check(
            is_plain(value),
            f"--model-kwargs {key}: {value!r:.80} must be a number, text, list or None",
        )


def is_plain(value: Any) -> bool:
    """Returns whether a value is None, a string, a bool, a finite number, or a list or dict of
    these."""
    if isinstance(value, (tuple, list)):
        return all(is_plain(item) for item in value)
    if isinstance(value, dict):
        return all(isinstance(k, str) and is_plain(v) for k, v in value.items())
    if isinstance(value, (int, float)):
        return math.isfinite(value) and abs(value) < 2**31
    return value is None or isinstance(value, str)


def use_cache_if_offline() -> None:
    """Makes the client of the Hugging Face hub use its cache if the hub does not answer in 5
    seconds.

    Otherwise the client retries for 47 s, or for minutes if the network drops packets.
    """
    from huggingface_hub import constants, get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=5)
    except Exception:  # the class of the error depends on the HTTP library that the client uses
        constants.HF_HUB_OFFLINE = True
