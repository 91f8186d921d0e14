"""Every option of every program: what its range takes, what it refuses, and how soon that is said.

Values are drawn from each field's declared range and beyond it, as flags and as TOML.
"""

import ast
import dataclasses
import math
import resource
import subprocess
import sys
import typing
from pathlib import Path
from typing import Annotated, Any

import pytest
import tomli_w
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from support.runs import tiny_run

from fastgn import config, train
from fastgn.config import FIELDS, Config
from fastgn.config.cli import PROGRAMS, parse_cli, parse_config
from fastgn.config.programs import EvaluateConfig, SweepConfig
from fastgn.errors import UserError
from fastgn.fields import (
    Options,
    Range,
    find_lists,
    find_paths,
    find_ranges,
    format_flag,
    format_number,
    iterate_annotations,
)
from fastgn.listing import KINDS
from fastgn.models import activations, create
from fastgn.objectives import METHODS, build_objective

GROUPS = [*config.GROUPS.values()]
NEEDED = {
    "fastgn.evaluate": ["--checkpoint", "runs/x"],
    "fastgn.export": ["--checkpoint", "runs/x", "--robustbench", "out"],
    "fastgn.sweep": ["--space", "lr=1e-3:1e-2"],
    "fastgn.data.pack": ["source", "output"],
    "fastgn.data.check": ["source"],
}
NUMERIC = [("fastgn.train", name) for group in GROUPS for name in find_ranges(group)]
NUMERIC += [(program, name) for program, kind in PROGRAMS.items() for name in find_ranges(kind)]
SETTINGS = settings(
    max_examples=25,
    derandomize=True,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    phases=(Phase.explicit, Phase.generate),
)


def options_of(program: str, name: str) -> Any:
    """Returns the dataclass that a program's field belongs to."""
    if program != "fastgn.train":
        return PROGRAMS[program]
    return next(group for group in GROUPS if name in find_ranges(group))


def parsed(program: str, *args: str) -> Any:
    kind = Config if program == "fastgn.train" else PROGRAMS[program]
    return parse_cli(kind, [*NEEDED.get(program, []), *args], program)


def kinds_of(program: str, name: str) -> tuple[type, int]:
    """Returns a field's number type and how many numbers it takes on the command line."""
    hint = typing.get_type_hints(options_of(program, name), include_extras=True)[name]
    parts = list(iterate_annotations(hint))
    kind = int if int in parts else float
    return kind, sum(part in (int, float) for part in parts if isinstance(part, type))


def around(allowed: Range, kind: type) -> st.SearchStrategy[float]:
    """Draws numbers inside a range, at its ends and far outside it; NaN and infinity included."""
    if kind is int:
        low, high = math.ceil(allowed.low), math.floor(allowed.high)
        ends = st.sampled_from([low - 1, low, high, high + 1, 0, -1, 10**30, -(10**30)])
        return ends | st.integers(low, high) | st.integers()
    ends = [allowed.low, allowed.high, 0.0, -1.0, math.nan, math.inf, -math.inf, 1e308, -1e308]
    ends += [math.nextafter(e, d) for e in ends[:2] for d in (-math.inf, math.inf)]
    return st.sampled_from(ends) | st.floats(allowed.low, allowed.high) | st.floats()


@st.composite
def numeric_flags(draw: st.DrawFn) -> tuple[str, str, float]:
    program, name = draw(st.sampled_from(NUMERIC))
    allowed = find_ranges(options_of(program, name))[name]
    return program, name, draw(around(allowed, kinds_of(program, name)[0]))


@pytest.mark.slow
@settings(SETTINGS, max_examples=200)
@given(numeric_flags())
def test_a_numeric_flag_takes_its_range_and_nothing_else(drawn: tuple[str, str, float]) -> None:
    program, name, value = drawn
    allowed = find_ranges(options_of(program, name))[name]
    try:
        parsed(program, f"--{format_flag(name)}", *[repr(value)] * kinds_of(program, name)[1])
    except UserError as error:
        line = str(error)
        assert "\n" not in line and f"--{format_flag(name)}" in line, line
        if value not in allowed:
            assert f"--{format_flag(name)} {format_number(value)} is out of range" in line
    else:
        assert value in allowed


@pytest.mark.parametrize("name", [name for program, name in NUMERIC if program == "fastgn.train"])
def test_every_numeric_key_of_a_recipe_takes_its_range_and_nothing_else(name: str) -> None:
    allowed = find_ranges(options_of("fastgn.train", name))[name]
    kind, count = kinds_of("fastgn.train", name)
    hint = typing.get_type_hints(options_of("fastgn.train", name))[name]
    is_tuple = "tuple" in str(hint)

    @SETTINGS
    @given(around(allowed, kind))
    def check(value: float) -> None:
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            return  # TOML's integers have 64 bits
        try:
            Config.from_toml(tomli_w.dumps({name: [value] * count if is_tuple else value}))
        except UserError as error:
            assert "\n" not in str(error) and format_flag(name) in str(error).replace("_", "-")
        else:
            assert value in allowed

    check()


TOML = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
).filter(lambda value: value is not None)


@SETTINGS
@given(st.dictionaries(st.sampled_from(sorted(FIELDS)) | st.text(), TOML, max_size=3))
def test_a_recipe_of_any_toml_is_a_config_or_one_line(values: dict[str, Any]) -> None:
    def without_none(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: without_none(v) for k, v in value.items() if v is not None}
        if isinstance(value, list):
            return [without_none(v) for v in value if v is not None]
        return value

    try:
        text = tomli_w.dumps(without_none(values))
    except (UnicodeEncodeError, ValueError):
        return
    try:
        assert isinstance(Config.from_toml(text), Config)
    except UserError as error:
        assert "\n" not in str(error) and str(error).isprintable()


@pytest.mark.parametrize(
    "args",
    [
        "--picture a.png --curve ./a.png --eps 1/255 2/255",
        "--output runs/x",
        "--report x/../y --output y",
    ],
)
def test_no_file_is_written_over_another(args: str) -> None:
    with pytest.raises(UserError, match="would overwrite the file of --"):
        parsed("fastgn.evaluate", *args.split())


def texts_of(kind: Any) -> list[str]:
    """Returns the fields of an options dataclass that hold a text, or several, and not by default
    an empty one."""
    hints = {name: str(hint) for name, hint in typing.get_type_hints(kind).items()}
    return [
        field.name
        for field in dataclasses.fields(kind)
        if "str" in hints[field.name] and "Literal" not in hints[field.name] and field.default != ""
    ]


@pytest.mark.parametrize("kind", [*GROUPS, *PROGRAMS.values()])
def test_an_empty_text_is_no_default(kind: Any) -> None:
    """As an unset variable of the shell gives it."""
    assert texts_of(kind) or kind.__name__ == "StepConfig" or "objectives" in kind.__module__
    for name in texts_of(kind):
        options = object.__new__(kind)
        for field in dataclasses.fields(kind):
            object.__setattr__(options, field.name, field.default)
        several = "tuple" in str(typing.get_type_hints(kind)[name])
        object.__setattr__(options, name, ("",) if several else "")
        with pytest.raises(UserError, match=f"--{format_flag(name)} has an empty value"):
            Options.__post_init__(options)


def test_the_last_of_two_flags_counts_everywhere() -> None:
    args = ["--recipe", "quickstart_natural", "--recipe=quickstart_gradnorm"]
    cfg = parse_config(args)
    assert (cfg.run.recipe, cfg.objective.method) == ("quickstart_gradnorm", "gradnorm")


LISTS = [("fastgn.train", name) for name in find_lists(Config)]
LISTS += [(program, name) for program, kind in PROGRAMS.items() for name in find_lists(kind)]


def test_which_flags_take_any_number_of_values() -> None:
    """As tyro itself takes them: a field that is left out of `lists` would lose values."""
    assert {"model_kwargs", "opt_betas", "keep_epochs"} == set(find_lists(Config))
    assert {"checkpoint", "eps", "attacks", "model_kwargs"} == set(find_lists(EvaluateConfig))
    assert {"space", "set"} == set(find_lists(SweepConfig))


@pytest.mark.parametrize(("program", "name"), LISTS)
@pytest.mark.parametrize("again", ["--{}", "--{}=", "underscores"])
def test_a_list_that_is_given_twice_is_refused(program: str, name: str, again: str) -> None:
    """tyro keeps the last of two and drops the values before it."""
    first = [f"--{format_flag(name)}", "1"]
    match again:
        case "--{}":
            second = [f"--{format_flag(name)}", "2"]
        case "--{}=":
            second = [f"--{format_flag(name)}=2"]
        case _:
            second = [f"--{name}", "2"]
    kind = Config if program == "fastgn.train" else PROGRAMS[program]
    needed = [] if name in ("checkpoint", "space") else NEEDED.get(program, [])
    with pytest.raises(
        UserError, match=f"^--{format_flag(name)} is given 2 times.* give it once, with"
    ):
        parse_cli(kind, [*needed, *first, "--seed", "1", *second], program)


def test_a_flag_overrides_the_list_of_a_recipe(tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    path.write_text('model_kwargs = ["depths=(1, 1)"]\nkeep_epochs = [1, 2]\nepochs = 3\n')
    cfg = parse_config(["--recipe", str(path), "--model-kwargs", "embed_dim=8", "window_size=2"])
    assert cfg.architecture.model_kwargs == ("embed_dim=8", "window_size=2")
    assert cfg.run.keep_epochs == (1, 2)


@pytest.mark.parametrize("text", ["4/inf", "inf/inf", "nan/2", "1/nan", "-1/inf"])
def test_a_fraction_has_two_finite_parts(text: str) -> None:
    with pytest.raises(UserError, match="is not a number"):
        parsed("fastgn.train", f"--eps={text}")


def test_one_key_in_two_spellings_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "twice.toml"
    path.write_text("min-lr = 1e-6\nmin_lr = 1e-7\n")
    with pytest.raises(UserError, match="a key is given twice, once with - and once with _"):
        parse_config(["--recipe", str(path)])


def test_a_numeric_field_without_a_range_is_found_at_once() -> None:
    @dataclasses.dataclass(frozen=True)
    class Planted(Options):
        good: Annotated[int, Range(1, 2)] = 1
        bad: float = 0.5

    with pytest.raises(AssertionError, match=r"Planted\.bad needs one Range"):
        Planted()


def test_every_program_checks_its_fields() -> None:
    """A class of options that overrides the check without calling it would let all through."""
    for kind in [*GROUPS, *PROGRAMS.values()]:
        assert issubclass(kind, Options)
        for name, allowed in find_ranges(kind).items():
            options = object.__new__(kind)
            for field in dataclasses.fields(kind):
                object.__setattr__(options, field.name, field.default)
            object.__setattr__(options, name, allowed.high * 2 + 1)
            with pytest.raises(UserError, match=f"--{format_flag(name)} .* is out of range"):
                options.__post_init__()


NO_PATHS = set(
    "model model_kwargs activation aa opt attacks name link authors venue architecture space set "
    "list".split()
)
"""Options of text that name no file and no folder."""


@pytest.mark.parametrize("kind", [*GROUPS, *PROGRAMS.values()], ids=lambda kind: kind.__name__)
def test_every_path_is_checked_before_it_is_used(kind: Any) -> None:
    """The system refuses these in a traceback, each call in its own."""
    hints = typing.get_type_hints(kind, include_extras=True)
    texts = {name for name, hint in hints.items() if str in iterate_annotations(hint)}
    assert texts - NO_PATHS == set(find_paths(kind)), (
        "a file or folder is declared Annotated[str, PATH]"
    )
    for name in find_paths(kind):
        for bad in ("x" * 256, "a/" + "é" * 128, "a\0b", "a/" * 2048, "\udcff"):
            options = object.__new__(kind)
            for field in dataclasses.fields(kind):
                object.__setattr__(
                    options,
                    field.name,
                    "x" if field.default is dataclasses.MISSING else field.default,
                )
            many = isinstance(getattr(options, name), tuple)
            object.__setattr__(options, name, (bad,) if many else bad)
            message = f"^--{format_flag(name)} .* is not a valid path: "
            with pytest.raises(UserError, match=message) as refusal:
                options.__post_init__()
            str(refusal.value).encode()


def test_the_longest_names_are_paths() -> None:
    assert parse_config(["--output", "é" * 127 + "/" + "x" * 255]).run.output


def test_a_run_that_is_no_path_is_refused() -> None:
    with pytest.raises(UserError, match="--resume 'xx.* is not a valid path: no name in it"):
        parse_config(["--resume", "x" * 300])


# --------------------------------------------------------------------------------- what is accepted


TRAINED = sorted(
    {name for group in GROUPS for name in find_ranges(group)}
    # the network, the images and the length of a run are the test's own
    - {"img_size", "num_classes", "batch_size", "grad_accum_steps", "global_batch_size", "epochs"}
    - {"warmup_epochs", "max_updates", "eval_images", "workers", "attack_it"}
    # what fits the images and AdamW, or compiled steps alone, is known after the command line
    - {"crop_padding", "momentum", "opt_betas", "activation_memory_budget"}
)


def inside(name: str) -> st.SearchStrategy[float]:
    allowed, (kind, _) = (
        find_ranges(options_of("fastgn.train", name))[name],
        kinds_of("fastgn.train", name),
    )
    if kind is int:
        return st.integers(math.ceil(allowed.low), math.floor(allowed.high))
    return st.floats(
        allowed.low, allowed.high, exclude_min=allowed.above, exclude_max=allowed.below
    )


@st.composite
def flags_inside(draw: st.DrawFn) -> list[str]:
    """Draws a method and some options inside their ranges."""
    method = draw(st.sampled_from(sorted(METHODS)))
    args = ["--method", method]
    for name in draw(st.lists(st.sampled_from(TRAINED), min_size=3, max_size=8, unique=True)):
        _, count = kinds_of("fastgn.train", name)
        values = sorted(draw(inside(name)) for _ in range(count))
        args += [f"--{format_flag(name)}", *map(repr, values)]
    return args


def short_run(folder: Path, args: list[str]) -> list[str]:
    return [*tiny_run(folder, "--max-updates", "1", "--eval-images", "8"), *args]


def is_accepted(args: list[str]) -> bool:
    """Returns whether the command line takes the flags of a short run. A refusal is one line."""
    try:
        parsed("fastgn.train", *short_run(Path("run"), args))
    except UserError as error:
        assert "\n" not in str(error)
        return False
    return True


@pytest.mark.slow
def test_what_is_accepted_trains(tmp_path: Path) -> None:
    """Thirty draws that the command line takes: each trains an update and exports."""
    trained: list[Path] = []

    @settings(SETTINGS, max_examples=30)
    @given(flags_inside())
    def trains(args: list[str]) -> None:
        assume(is_accepted(args))
        folder = tmp_path / str(len(trained))
        assert train.main(short_run(folder, args)) == 0, args
        assert (folder / "model.safetensors").is_file()
        trained.append(folder)

    trains()
    assert len(trained) == 30


# ----------------------------------------------------------------------------------------- methods


@pytest.mark.parametrize("method", METHODS)
def test_what_the_options_say_of_a_method_is_what_it_builds(method: str) -> None:
    for share in (0.5, 1.0):
        cfg = Config().replace(method=method, gn_share=share).objective
        built = build_objective(cfg)
        assert cfg.has_penalty == built.needs_input_gradient
        assert cfg.has_attack == (built.perturb is not None)
        assert cfg.takes_turns == (built.rest is not None)
        assert cfg.allows_differences == built.differences


# -------------------------------------------------------------------------- what there is to choose


@pytest.mark.parametrize(
    "kind",
    [*(k for k in KINDS if k != "recipes"), pytest.param("recipes", marks=pytest.mark.slow)],
)
def test_every_listed_name_is_taken(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        parse_config(["--list", kind])
    assert left.value.code == 0
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert len(names) == len(set(names)) > 5
    if kind in ("recipes", "methods"):
        for name in names:
            parse_config([f"--{kind.removesuffix('s')}", name])
    elif kind == "activations":
        assert set(names) == set(activations.ACTIVATIONS)
    elif kind == "models":
        assert {"swin_b", "preact_resnet18", "resnet50"} <= set(names)
    else:
        assert {"adamw", "sgd", "momentum", "lion"} <= set(names)


def test_a_pattern_lists_what_matches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_config(["--list", "models", "*swin*tiny*"])
    assert "swin_tiny_patch4_window7_224\n" in capsys.readouterr().out
    with pytest.raises(UserError, match="--list models nosuch: no name matches this pattern"):
        parse_config(["--list", "models", "nosuch"])
    with pytest.raises(UserError, match="--list 'recipe': did you mean 'recipes'"):
        parse_config(["--list", "recipe"])


@pytest.mark.parametrize("name", ["swim_b", "*swin*", "no such network at all", "resnet5", "vit"])
def test_an_unknown_model_is_a_short_line(name: str) -> None:
    with pytest.raises(UserError) as caught:
        create.check_name(Config().replace(model=name).architecture)
    assert name in str(caught.value) and len(str(caught.value)) < 320


# ----------------------------------------------------------------------------------------- how soon


def cpu_seconds(*command: str, code: int = 0) -> float:
    """Returns the least CPU time of two runs of a command, which must end with a status."""
    spent = []
    for _ in range(2):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run([sys.executable, *command], capture_output=True, text=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert done.returncode == code, done.stderr
        spent.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return min(spent)


@pytest.mark.slow
def test_mistakes_and_help_cost_less_than_a_third_of_importing_torch() -> None:
    torch_s = cpu_seconds("-c", "import torch")
    for program in ("fastgn.train", *PROGRAMS):
        assert cpu_seconds("-m", program, "--help") <= 0.3 * torch_s, program
        assert cpu_seconds("-m", program, "--nosuch", "1", code=2) <= 0.3 * torch_s, program


@pytest.mark.parametrize("statement", ["import fastgn", "import fastgn.config.cli, fastgn.errors"])
def test_no_torch_until_a_name_is_used(statement: str) -> None:
    heavy = "{'torch', 'timm', 'numpy', 'PIL'}"
    code = f"import sys; {statement}; assert not {heavy} & set(sys.modules), sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_names_of_the_package_are_there_when_asked_for() -> None:
    code = "import fastgn; fastgn.__version__; assert callable(fastgn.compile_double_backward)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_help_into_a_closed_pipe_is_quiet() -> None:
    command = f"{sys.executable} -m fastgn.train --help | head -n 1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout


LIGHT = ["config/*.py", "objectives/__init__.py", "objectives/options.py", "errors.py", "fields.py"]


@pytest.mark.parametrize("module", [p for g in LIGHT for p in Path(train.__file__).parent.glob(g)])
def test_what_the_command_line_reads_imports_nothing_heavy(module: Path) -> None:
    assert not imported_packages(module.read_text()) & {"torch", "timm", "numpy"}


def imported_packages(source: str) -> set[str]:
    """Returns the packages that a module imports anywhere, by their first names."""
    nodes = list(ast.walk(ast.parse(source)))
    names = [a.name for node in nodes if isinstance(node, ast.Import) for a in node.names]
    names += [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
    return {name.partition(".")[0] for name in names}


@pytest.mark.parametrize(
    "line",
    ["import torch.nn", "from torch import Tensor", "import os, torch", "def f():\n import torch"],
)
def test_a_heavy_import_is_found(line: str) -> None:
    assert "torch" in imported_packages(line)
