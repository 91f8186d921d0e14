"""Checks the names of timm's auto-augmentation policies before timm is imported.

A policy such as rand-m9-mstd0.5 is a kind (rand) followed by sections, which are parts between
dashes. Most sections are a key and a number. timm ignores sections that it does not understand. For
example, it reads rand-zzz as rand, and replaces the magnitude of rand-mnan by a default.
"""

import re

from fastgn.errors import UserError, check, check_name
from fastgn.fields import Range

AUTOAUGMENT = ("original", "originalr", "v0", "v0r", "3a")
"""Names of timm's AutoAugment policies."""
MAGNITUDE = Range(0, 10)
"""Range of the strength of an operation, such as the 9 in rand-m9."""
SECTIONS: dict[str, dict[str, tuple[type, Range]]] = {
    "rand": {
        "m": (int, MAGNITUDE),
        "n": (int, Range(1, 16)),
        "p": (float, Range(0, 1)),
        "mstd": (float, Range(0, 1000)),
        "mmax": (int, MAGNITUDE),
        "inc": (int, Range(0, 1)),
    },
    "augmix": {
        "m": (int, MAGNITUDE),
        "w": (int, Range(1, 16)),
        "d": (int, Range(1, 16)),
        "a": (float, Range(0, 100, above=True)),
        "b": (int, Range(0, 1)),
        "mstd": (float, Range(0, 1000)),
    },
    "autoaugment": {"mstd": (float, Range(0, 1000))},
}
"""Kind of policy -> key of a section -> (type, range) of the section's number. For example, the
section m9 of rand-m9 has the key m and the number 9."""
SETS = ("tweights", "t3a", "t3aw")
"""Sections without a number, which select a set of operations, such as t3a in rand-m9-t3a."""


def check_policy(policy: str) -> None:
    """Raises UserError unless timm understands every section of an auto-augmentation policy."""
    name, *sections = policy.split("-")
    kinds = {"rand": "rand", "augmix": "augmix"} | dict.fromkeys(AUTOAUGMENT, "autoaugment")
    check_name(name, kinds, f"--aa {policy}")
    known = SECTIONS[kinds[name]]
    seen = set()
    for section in sections:
        if name == "rand" and section in SETS:
            continue
        match = re.fullmatch(r"([a-z]+)(\d+(?:\.\d+)?)", section)
        keys = ", ".join(known)
        if match is None or match[1] not in known:
            raise UserError(
                f"--aa {policy}: section {section!r} should be one of {keys}, then a number, "
                "as in rand-m9-mstd0.5-inc1"
            )
        key, text = match.groups()
        kind, allowed = known[key]
        check(key not in seen, f"--aa {policy}: section {key} is given twice: remove one")
        seen.add(key)
        check(
            (kind is float or "." not in text) and float(text) in allowed,
            f"--aa {policy}: the number after {key} must be "
            f"{'a whole number ' if kind is int else ''}{allowed}, not {text}",
        )
