"""Parses command lines with tyro.

Every mistake is reported in one line, before torch is imported.
"""

import contextlib
import dataclasses
import io
import itertools
import os
import re
import signal
import sys
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import tyro

from fastgn.config import FIELDS, Config, initial_file, load_recipe, run_folder
from fastgn.config.inputs import check_checkpoints, check_data_dir
from fastgn.config.programs import (
    CheckConfig,
    EvaluateConfig,
    ExportConfig,
    PackConfig,
    SweepConfig,
)
from fastgn.errors import UserError, check, check_name, nearest, parse_number, print_error
from fastgn.fields import check_path, find_lists, format_flag, format_number

PROGRAMS: dict[str, type] = {
    "fastgn.evaluate": EvaluateConfig,
    "fastgn.export": ExportConfig,
    "fastgn.sweep": SweepConfig,
    "fastgn.data.pack": PackConfig,
    "fastgn.data.check": CheckConfig,
}
"""Name of a program -> dataclass of its options. fastgn.train uses parse_config instead."""


def check_command_line(program: str) -> None:
    """Parses the program's command line, and ends the program for --help or a mistake. Files and
    folders that do not exist are such mistakes.

    It runs before slow imports such as torch. The program later parses the command line again,
    which takes a tenth of a second.
    """
    args = sys.argv[1:]
    try:
        if program in PROGRAMS:
            options: Any = parse_cli(PROGRAMS[program], args, program)
            if isinstance(options, (EvaluateConfig, ExportConfig)):
                given = options.checkpoint
                check_checkpoints([given] if isinstance(given, str) else given)
            if isinstance(options, EvaluateConfig):
                check_data_dir(options.data, options.data_dir)
        else:
            cfg = parse_config(args)
            check_data_dir(cfg.dataset.data, cfg.dataset.data_dir)
            if cfg.architecture.initial_checkpoint and cfg.run.resume is None:
                initial_file(cfg.architecture.initial_checkpoint)
    except UserError as error:
        print_error(f"{program}: error: {error}")
        sys.exit(2)


def find_flag_value(args: Sequence[str], name: str) -> str | None:
    """Returns the value of the flag --name in a command line that is not parsed yet.

    Returns None if the flag is not given. If it is given several times, the last value is used, as
    tyro does.
    """
    value = None
    for index, arg in enumerate(args):
        if arg == f"--{name}" and index + 1 < len(args):
            value = args[index + 1]
        elif arg.startswith(f"--{name}="):
            value = arg.partition("=")[2]
    return value


Parsed = typing.TypeVar("Parsed")

TYPES = tyro.constructors.ConstructorRegistry()
"""Rules that replace tyro's own for some types of values on the command line."""


@TYPES.primitive_rule
def read_float(field: tyro.constructors.PrimitiveTypeInfo) -> Any:
    """Returns a rule with which tyro reads floats. They may be written as numbers or as fractions
    such as 4/255.

    Returns None for fields of every other type.
    """
    if field.type is not float:
        return None
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="FLOAT",
        instance_from_str=lambda args: parse_number(args[0]) if "/" in args[0] else float(args[0]),
        is_instance=lambda value: isinstance(value, (int, float)),
        str_from_instance=lambda value: [format_number(value)],
    )


def parse_cli(kind: type[Parsed], args: Sequence[str], prog: str, default: Any = None) -> Parsed:
    """Returns an options dataclass, parsed from a command line by tyro.

    Raises UserError for every mistake. Its message is one line, instead of the box that tyro would
    print. --help ends the program with exit status 0.

    kind: the dataclass. prog: name of the program for the help text. default: instance with the
    values of flags that are not given.
    """
    check_working_folder()
    check_given_once(kind, args)
    box = io.StringIO()
    more: dict[str, Any] = {} if default is None else {"default": default}
    more["config"] = (tyro.conf.PositionalMetavarFromFieldName,)
    helping = {"-h", "--help"} & set(args)
    if helping:  # in `--help | head`, end quietly when head closes the pipe
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    try:
        with contextlib.redirect_stderr(box), set_columns(None if helping else 10_000):
            return tyro.cli(kind, args=list(args), prog=prog, registry=TYPES, **more)
    except SystemExit as stop:
        if not stop.code:
            raise
    raise UserError(translate_refusal(box.getvalue(), kind))


def check_given_once(kind: type, args: Sequence[str]) -> None:
    """Raises UserError if a flag that takes any number of values is given twice, because tyro would
    ignore the first values.

    A flag that takes one value may be given twice, and the last value is used. So a user can
    override a flag in a shell alias. kind: dataclass of the program's options.
    """
    given = [arg.partition("=")[0].replace("_", "-") for arg in args]
    for name in map(format_flag, find_lists(kind)):
        times = given.count(f"--{name}")
        check(
            times < 2,
            f"--{name} is given {times} times, and only the last would count: give it once, with "
            f"all values after it (--{name} A B)",
        )


def check_working_folder() -> None:
    """Raises UserError if the working directory was removed, because relative paths then lead
    nowhere."""
    try:
        os.getcwd()
    except OSError:
        raise UserError("the working directory was removed: change to another one") from None


@contextlib.contextmanager
def set_columns(width: int | None) -> Iterator[None]:
    """Makes tyro believe, inside the `with` block, that the terminal has this width in characters.

    In a narrow terminal, tyro would break words of its message in two. If `width` is None, tyro
    uses the true width.
    """
    before = os.environ.get("COLUMNS")
    if width is not None:
        os.environ["COLUMNS"] = str(width)
    try:
        yield
    finally:
        os.environ.pop("COLUMNS", None)
        if before is not None:
            os.environ["COLUMNS"] = before


def translate_refusal(text: str, kind: type) -> str:
    """Returns fastgn's one-line error message for an error that tyro found.

    text: the message that tyro printed, with a box of lines around it. kind: dataclass of the
    program's options.
    """
    # tyro draws a box of lines around its message.
    # If stdout is not in UTF-8, tyro draws only lines of "-" above and below the message.
    lines = [line.strip("│╭╰╮╯ ") for line in text.splitlines()][1:]
    inside = itertools.dropwhile(lambda line: not line.strip("─-"), lines)
    line = " ".join(itertools.takewhile(lambda line: line.strip("─-"), inside))
    line = re.sub(r"^Error parsing [\w.-]+: (?=--)", "", line).removeprefix("Error parsing ")
    if found := re.match(r"Unrecognized options: (--[\w-]+)", line):
        names = FIELDS if kind is Config else [f.name for f in dataclasses.fields(kind)]
        flags = [f"--{format_flag(name)}" for name in names]
        return f"{found[1]} is unknown: {nearest(found[1].replace('_', '-'), flags)}"
    if found := re.match(r"Unrecognized options: (.*)", line):
        return f"{found[1]!r} belongs to no flag: remove it, or see --help for the flags"
    if found := re.match(r"Missing from [\w.]+: (.*)", line):
        names = re.findall(r"(?:^|\(required\) )([A-Z-]+) ", found[1])
        return f"missing: {' and '.join(names)} (see --help)"
    if found := re.match(r"Missing value for argument '(--[\w-]+)'", line):
        return f"{found[1]} has no value: write {found[1]} VALUE"
    if found := re.match(r"invalid choice '(.*)' for argument '(--[\w-]+)'", line):
        valid = re.findall(r"'([^']*)'", line)[2:]
        return f"{found[2]} {found[1]!r}: {nearest(found[1], valid)}"
    if found := re.match(r"(--[\w-]+): no type matching (.*) could be .* from \[(.*)\]", line):
        given = " ".join(re.findall(r"'([^']*)'", found[3]))
        whole = "whole " if "INT" in found[2] else ""
        count = found[2].count("FLOAT") + found[2].count("INT")
        wanted = f"{count} {whole}numbers" if count > 1 else f"a {whole}number"
        return f"{found[1]} {given!r} should be {wanted}"
    if found := re.match(r"(--[\w-]+): invalid literal for int\(\) with base 10: '(.*)'", line):
        return f"{found[1]} {found[2]!r} should be a whole number"
    if found := re.match(r"(--[\w-]+): could not convert string to float: '(.*)'", line):
        return f"{found[1]} {found[2]!r} should be a number, such as 0.5 or 4/255"
    return line


def print_names(args: Sequence[str]) -> typing.NoReturn:
    """Prints the names that `--list KIND [PATTERN]` asks for, and exits.

    args: the arguments after --list, which are KIND and perhaps PATTERN. Raises UserError if the
    kind is unknown or no name matches the pattern.
    """
    from fastgn.listing import KINDS, format_listing

    kinds = ", ".join(KINDS)
    check(
        len(args) in (1, 2),
        f"--list takes one of {kinds}, optionally followed by a pattern such as '*swin*'",
    )
    check_name(args[0], KINDS, f"--list {args[0]!r}")
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    print(format_listing(*args))
    sys.exit(0)


def parse_config(args: Sequence[str] | None = None) -> Config:
    """Returns the config of a training run: the recipe's values, overridden by the flags.

    With ``--resume RUN`` and no recipe, the saved config of RUN takes the recipe's place. Raises
    UserError for every mistake.
    """
    args = list(sys.argv[1:] if args is None else args)
    check_working_folder()
    if "--list" in args:
        print_names(args[args.index("--list") + 1 :])
    recipe, resume = find_flag_value(args, "recipe"), find_flag_value(args, "resume")
    default = Config()
    if recipe is not None:
        default = load_recipe(recipe)
    elif resume not in (None, "auto"):
        check_path("--resume", str(resume))
        folder = run_folder(Path(str(resume)))
        check(
            (folder / "config.toml").is_file(),
            f"--resume {resume}: there is no run in it (no config.toml): give the folder of a run",
        )
        default = load_recipe(str(folder / "config.toml")).replace(output=str(folder))
    return parse_cli(Config, args, "fastgn.train", default)
