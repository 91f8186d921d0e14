"""Files of strangers: they are read, and nothing else. Every hostile file is made here."""

import ast
import json
import math
import os
import random
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from support import ROOT
from support.models import TINY_KWARGS
from support.runs import tiny_run
from support.states import differences, read_state, small_state

from fastgn import evaluate, export, files, sweep, train
from fastgn.checkpoint import Checkpoints, find_checkpoint
from fastgn.config import Config
from fastgn.config.groups import ArchitectureConfig
from fastgn.data import check
from fastgn.errors import UserError
from fastgn.models.network import build_model
from fastgn.models.weights import read_weights
from fastgn.state import TrainState
from fastgn.trained import Trained, read_saved

PACKAGE = Path(files.__file__).parent
# ------------------------------------------------------------------------ one reader a kind of file


READERS: dict[str, set[str]] = {
    "torch.load": {"archive.py"},
    "safetensors.safe_open": {"files.py"},
    "safe_open": {"files.py"},
    "load_file": set(),
    "json.load": set(),
    "json.loads": {"files.py"},
    "tomllib.load": set(),
    "tomllib.loads": {"config/__init__.py"},
    "pickle.load": set(),
    "pickle.loads": set(),
    "pickle.Unpickler": set(),
    "csv.reader": set(),
    "csv.DictReader": set(),
    "zipfile.ZipFile": {"archive.py", "data/npz.py"},
    "tarfile.open": set(),
    "np.load": set(),
    "np.memmap": set(),
    "np.fromfile": set(),
    "np.loadtxt": set(),
    "np.genfromtxt": set(),
    "np.lib.format.open_memmap": set(),
    "np.lib.format.read_array": {"data/npz.py"},
    "np.lib.format.read_array_header_1_0": {"data/npz.py"},
    "np.lib.format.read_array_header_2_0": {"data/npz.py"},
    "np.lib.format.read_magic": {"data/npz.py"},
    "Image.open": {"data/images.py"},
    "open": {"files.py", "checkpoint.py", "metrics.py", "sweep.py"},
    "os.open": {"files.py", "lock.py"},
    "*.read_text": {"analysis/selection.py", "listing.py", "lock.py", "metrics.py", "step/plan.py"},
    "*.read_bytes": set(),
}
"""What opens a file or takes it apart, and the modules that may use it; * stands for any value.

checkpoint.py copies a checkpoint, metrics.py and sweep.py append to a file of their own. The texts
that are read without `files.read_text` are of the package, of the system, or of a lock or W&B."""


def used_names(source: str) -> set[str]:
    """Returns the dotted names that a module uses, and each attribute of whatever it is."""
    nodes = list(ast.walk(ast.parse(source)))
    attributes = [node for node in nodes if isinstance(node, ast.Attribute)]
    names = {node.id for node in nodes if isinstance(node, ast.Name)}
    imported = {
        f"{node.module}.{alias.name}"
        for node in nodes
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    dotted = {ast.unparse(node) for node in attributes}
    return names | imported | dotted | {f"*.{node.attr}" for node in attributes}


def readers_outside(source: str, module: str) -> set[str]:
    return {name for name in used_names(source) if module not in READERS.get(name, {module})}


def test_files_are_read_by_their_readers_alone():
    used: dict[str, set[str]] = {}
    for path in PACKAGE.rglob("*.py"):
        module, source = str(path.relative_to(PACKAGE)), path.read_text()
        assert not readers_outside(source, module), module
        used |= {name: used.get(name, set()) | {module} for name in used_names(source)}
    for name, modules in READERS.items():
        stale = modules - used.get(name, set()) - ({"files.py"} if "safe_open" in name else set())
        assert not stale, f"{stale} may use {name}, and does not"


@pytest.mark.parametrize("name", READERS)
def test_a_reader_elsewhere_is_found(name):
    source = f"def f(path):\n    return {name.replace('*', 'path')}(path)"
    assert name in readers_outside(source, "train.py")
    module, _, last = name.rpartition(".")
    if module not in ("", "*"):
        assert readers_outside(f"from {module} import {last} as read", "train.py") == {name}


# -------------------------------------------------------------------------------- code from strings


HOSTILE = [
    'x"""\nopen("PWNED","w")\n"""',
    "x'''\nopen('PWNED','w')\n'''",
    'x\\"""\nopen("PWNED","w")\n"""',
    'x\nopen("PWNED","w")\n',
    'x\ropen("PWNED","w")\r',
    'x\u2028open("PWNED","w")\u2029',
    "x\x0copen('PWNED','w')",
    "x{__import__('os')}",
    "{0.__class__}",
    "{{}}{}",
    "%s%(name)s",
    "x\\",
    "x\x00y",
    "\x1b]0;PWNED\x07\x1b[2J",
    "\u202exyz",
    "\ud800",
    "'; open('PWNED','w'); '",
]
IN_FILES = [text for text in HOSTILE if "\ud800" not in text]
"""JSON and TOML hold no lone surrogates."""


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run of three updates with all that it leaves behind."""
    folder = tmp_path_factory.mktemp("security") / "run"
    more = ("--max-updates", "3", "--checkpoint-interval", "2", "--activation", "silu")
    assert train.main(tiny_run(folder, *more)) == 0
    return folder


def one_line(capsys, program: str) -> str:
    """The only line on stderr, which is a refusal."""
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{program}: error: ") and line.isprintable(), line
    return line.removeprefix(f"{program}: error: ")


def gift(path: Path, **values: Any) -> Path:
    """An export whose config a stranger has written."""
    network = timm.create_model("resnet10t", num_classes=10)
    config = Config().replace(model="resnet10t", img_size=32, data="digits").to_toml()
    text = "\n".join([config, *(f"{k} = {json.dumps(v)}" for k, v in values.items())])
    lines = {line.partition(" = ")[0]: line for line in text.splitlines() if " = " in line}
    metadata = {"config": "\n".join(lines.values()), "classes": [str(d) for d in range(10)]}
    save_file(network.state_dict(), path, metadata={"fastgn": json.dumps(metadata)})
    return path


@pytest.mark.parametrize("name", [f"resnet18.{name}" for name in IN_FILES] + IN_FILES)
def test_a_models_name_is_no_code(name, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = gift(
        tmp_path / "gift.safetensors",
        model=name,
        model_kwargs=["pretrained_cfg={'architecture':'resnet18'}"],
    )
    args = ["--checkpoint", str(file), "--robustbench", str(tmp_path / "out")]
    assert export.main(args) == 2
    assert "gift.safetensors" in one_line(capsys, "fastgn.export")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["gift.safetensors"]


@pytest.mark.parametrize("text", IN_FILES)
@pytest.mark.parametrize("field", ["activation", "model_kwargs", "mean"])
def test_no_other_text_of_a_config_is_code(field, text, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(export, "check_same", lambda *args: None)
    value: Any = {
        "activation": text,
        "model_kwargs": [f"output_stride={text!r}"],
        "mean": [text, 0.5, 0.5],
    }[field]
    file = gift(tmp_path / "gift.safetensors", **{field: value})
    args = ["--checkpoint", str(file), "--robustbench", str(tmp_path / "out")]
    assert export.main(args) == 2
    assert "gift" in one_line(capsys, "fastgn.export")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["gift.safetensors"]


def shape_of(source: str) -> str:
    """A module's syntax tree with every text and number left out."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant):
            node.value = None
    return ast.dump(tree)


def assigned(source: str, name: str) -> Any:
    """The literal that a module of export assigns to a name in a tuple."""
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Tuple):
            names = [target.id for target in node.targets[0].elts]
            if name in names:
                return ast.literal_eval(node.value.elts[names.index(name)])
    raise AssertionError(name)


@pytest.fixture(scope="module")
def trained() -> Trained:
    cfg = ArchitectureConfig(model="swin_t", model_kwargs=TINY_KWARGS, img_size=16)
    return Trained("run", build_model(cfg, 10)[0], Config(architecture=cfg), tuple("0123456789"))


def check_name_is_a_literal(trained: Trained, name: str) -> None:
    benign = export.write_definition(trained)
    source = export.write_definition(Trained(name, trained.model, trained.cfg, trained.classes))
    assert shape_of(source) == shape_of(benign)
    assert assigned(source, "NAME") == name
    source.encode()


@pytest.mark.parametrize("name", HOSTILE)
def test_a_runs_name_is_no_code(name, trained):
    check_name_is_a_literal(trained, name)


@given(name=st.text(st.characters(), max_size=20))
@settings(max_examples=100, deadline=None)
def test_no_name_is_code(name, trained):
    check_name_is_a_literal(trained, name)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), object(), print, {1: float("inf")}])
def test_what_is_no_literal_never_reaches_a_definition(value):
    with pytest.raises(UserError, match="cannot be written into model.py"):
        export.literal(value)


def test_a_definition_runs_in_a_process_of_its_own(trained, tmp_path, monkeypatch):
    """What it does there is not seen here; it has no fastgn, no token and a time limit."""
    monkeypatch.setenv("HF_TOKEN", "secret")
    code = "import os, pathlib\nimport sys\nsys.stolen = 1\n"
    code += f"pathlib.Path({str(tmp_path / 'seen')!r}).write_text(str(dict(os.environ)))\n"
    with pytest.raises(UserError, match="cannot be rebuilt without fastgn .*fastgn") as refusal:
        export.check_same(code + "import fastgn\n", b"", trained)
    assert "\n" not in str(refusal.value)
    import sys

    assert not hasattr(sys, "stolen")
    assert "secret" not in (tmp_path / "seen").read_text()
    monkeypatch.setattr(export, "REBUILD_LIMIT_S", 0.5)
    with pytest.raises(UserError, match="no logits within 0.5 s"):
        export.check_same("import time\ntime.sleep(60)\n", b"", trained)


def test_the_lowest_timm_reads_weights_alone():
    """Its loaders unpickle with weights_only from 1.0.26 on."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (timms,) = [d for d in project["optional-dependencies"]["train"] if d.startswith("timm")]
    assert tuple(map(int, timms.removeprefix("timm>=").split("."))) >= (1, 0, 26)


# ------------------------------------------------------------------------------- targets of writing


def special(path: Path, kind: str) -> Path:
    match kind:
        case "pipe":
            os.mkfifo(path)
        case "folder":
            path.mkdir()
        case "link":
            (path.parent / "victim").write_text("mine")
            path.symlink_to(path.parent / "victim")
        case "dangling":
            path.symlink_to(path.parent / "nothing")
    return path


KINDS = ["pipe", "folder", "link", "dangling"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("write", [files.write_bytes, files.check_target])
def test_only_plain_files_are_replaced(write, kind, tmp_path):
    path = special(tmp_path / "target", kind)
    before = sorted(tmp_path.iterdir())
    mode = path.lstat()
    with pytest.raises(UserError, match=f"^{path} is a .*: name a plain file$"):
        write(path, *([b"new"] if write is files.write_bytes else []))
    assert sorted(tmp_path.iterdir()) == before and path.lstat() == mode
    if kind == "link":
        assert (tmp_path / "victim").read_text() == "mine"


def test_devices_are_left_alone():
    for name in ("/dev/null", "/dev/full", "/dev/stdout"):
        with pytest.raises(UserError, match=f"^{name} is a "):
            files.check_target(Path(name))


@pytest.mark.parametrize("flag", ["--output", "--report", "--curve", "--picture"])
def test_an_evaluation_refuses_its_target_at_once(flag, run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(evaluate, "load_trained", None)  # nothing is read before
    path = special(tmp_path / "target", "pipe")
    more = ["--eps", "0.01", "0.02", "--attacks", "fgsm", "--output", str(tmp_path / "e.json")]
    assert evaluate.main(["--checkpoint", str(run), *more, flag, str(path)]) == 2
    assert one_line(capsys, "fastgn.evaluate").startswith(f"{path} is a named pipe")


def test_an_export_refuses_its_target_at_once(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(export, "load_trained", None)
    path = special(tmp_path / "model.py", "link")
    assert export.main(["--checkpoint", str(run), "--robustbench", str(tmp_path)]) == 2
    assert one_line(capsys, "fastgn.export").startswith(f"{path} is a symbolic link")


def test_a_check_refuses_its_target_at_once(tmp_path, capsys):
    path = special(tmp_path / "report.json", "pipe")
    assert check.main([str(tmp_path / "nowhere"), "--output", str(path)]) == 2
    assert one_line(capsys, "fastgn.data.check").startswith(f"{path} is a named pipe")


@pytest.mark.parametrize("name", ["s.db", "s.json", "s.png", "s_best.toml"])
def test_a_sweep_refuses_its_targets_at_once(name, tmp_path, capsys):
    pytest.importorskip("optuna")
    path = special(tmp_path / name, "dangling")
    args = ["--study", str(tmp_path / "s.db"), "--space", "lr=1e-3:1e-2:log"]
    assert sweep.main(args) == 2
    assert one_line(capsys, "fastgn.sweep").startswith(f"{path} is a symbolic link")
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_temporary_names_are_new_each_time(tmp_path, monkeypatch):
    seen = set()
    for _ in range(3):
        with files.atomic_open(tmp_path / "file") as file:
            (name,) = [p.name for p in tmp_path.iterdir() if p.name.endswith(".tmp")]
            seen.add(name)
            file.write(b"x")
    assert len(seen) == 3
    # and one that is there already is neither followed nor overwritten
    monkeypatch.setattr(files.secrets, "token_hex", lambda count: "guessed")
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (tmp_path / ".file.guessed.tmp").symlink_to(victim)
    with pytest.raises(UserError, match="cannot be written: File exists"):
        files.write_bytes(tmp_path / "file", b"y")
    assert victim.read_text() == "mine" and (tmp_path / "file").read_bytes() == b"x"


def test_a_name_of_the_greatest_length_can_be_written(tmp_path):
    path = tmp_path / ("ä" * 127)
    files.write_bytes(path, b"x")
    assert path.read_bytes() == b"x"


def test_written_files_have_the_users_mode(tmp_path):
    before = os.umask(0o027)
    try:
        files.write_bytes(tmp_path / "file", b"x")
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640


def test_compiled_code_is_the_users_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    folder = tmp_path / "fastgn" / "compiled"
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    train.keep_compiled()
    assert folder.stat().st_mode & 0o777 == 0o700
    assert os.environ.pop("TORCHINDUCTOR_CACHE_DIR") == str(folder)


# ------------------------------------------------------------------------------ archives of weights


def rezip(source: Path, target: Path, kind: int) -> Path:
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", kind) as new:
        for entry in old.infolist():
            new.writestr(entry.filename, old.read(entry))
    return target


@pytest.mark.parametrize("read", [read_state, read_weights])
def test_an_archive_that_inflates_is_refused_before_it_does(read, tmp_path, monkeypatch):
    state = small_state(1, model={"weight": torch.zeros(5_000_000)})
    path = Checkpoints(tmp_path, 1).save(state)
    bomb = rezip(path, path.with_name("update_00000002.pt"), zipfile.ZIP_DEFLATED)
    assert bomb.stat().st_size < path.stat().st_size / 100
    monkeypatch.setattr(zipfile.ZipFile, "testzip", None)  # nothing is inflated
    with pytest.raises(UserError, match="is compressed, which torch.save never does"):
        read(bomb)


def test_entries_that_overlap_are_refused(tmp_path):
    """A small file that claims a large one many times over."""
    path = Checkpoints(tmp_path, 1).save(small_state(1))
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        entry = max(archive.infolist(), key=lambda e: e.file_size)
    header = content.rfind(entry.filename.encode()) - 46
    assert content[header : header + 4] == b"PK\x01\x02"
    content[header + 20 : header + 28] = (10**9).to_bytes(4, "little") * 2
    path.write_bytes(content)
    with pytest.raises(UserError, match="its entries overlap"):
        read_state(path)


def flipped(content: bytes, count: int) -> list[bytes]:
    """Copies of a file, each with one random bit flipped."""
    draw = random.Random(0)
    out = []
    for _ in range(count):
        copy = bytearray(content)
        copy[draw.randrange(len(copy))] ^= 1 << draw.randrange(8)
        out.append(bytes(copy))
    return out


@pytest.mark.parametrize("name", ["weights.pt", "weights.safetensors"])
def test_no_flipped_bit_changes_a_weight(name, tmp_path):
    draw = torch.Generator().manual_seed(0)
    weights = {f"layer{i}.weight": torch.randn(9, generator=draw) for i in range(6)}
    path = tmp_path / name
    if name.endswith(".pt"):
        torch.save(weights, path)
    else:
        files.write_safetensors(path, weights, {"config": "", "classes": ["a", "b"]})
    assert differences(read_weights(path), weights) == []
    refused = 0
    for version in flipped(path.read_bytes(), 500):
        path.write_bytes(version)
        try:
            read = read_weights(path)
        except UserError as error:
            refused += 1
            assert str(path) in str(error) and "\n" not in str(error)
        else:
            assert differences(read, weights) == []
    assert refused > 150


def test_the_same_weights_give_the_same_file(tmp_path: Path) -> None:
    weights = {name: torch.randn(3, 5) for name in ("b", "a", "é")}
    contents = set()
    for index in range(8):  # with the library's own order each key comes first in half of them
        path = tmp_path / f"{index}.safetensors"
        files.write_safetensors(path, weights, {"classes": ["ü"]})
        contents.add(path.read_bytes())
    assert len(contents) == 1
    read, _ = files.read_safetensors(path)
    assert all(torch.equal(read[name], weights[name]) for name in weights)


@pytest.mark.parametrize("key", ["config", "classes"])
def test_the_digest_covers_the_header(key, run, tmp_path):
    """Another config or another order of classes gives a wrong model, too."""
    content = (run / "model.safetensors").read_bytes()
    path = tmp_path / "model.safetensors"
    old, new = {
        "config": (b"silu", b"gelu"),
        "classes": (b'\\"3\\", \\"4\\"', b'\\"4\\", \\"3\\"'),
    }[key]
    assert old in content
    path.write_bytes(content.replace(old, new))
    with pytest.raises(UserError, match="is corrupt: its content does not have the SHA-256"):
        read_saved(path)


def damaged(run: Path, folder: Path, change: Any) -> Path:
    """A copy of a run's last checkpoint, changed, in a run's folder of its own."""
    state = read_state(find_checkpoint(run))
    change(state)
    folder.mkdir()
    (folder / "config.toml").write_text((run / "config.toml").read_text())
    checkpoints = Checkpoints(folder, 1)
    return checkpoints.save(TrainState(**{k: v for k, v in state.items() if k != "format"}))


def first_moments(state: dict[str, Any]) -> dict[str, Any]:
    return next(m for m in state["optimizer"]["state"].values() if m["exp_avg"].numel() > 1)


def set_key(key: str, value: Any) -> Any:
    return lambda state: state.update({key: value})


UNFIT = {
    "model of another shape": lambda s: s["model"].update(
        {"backbone.head.fc.bias": torch.zeros(7)}
    ),
    "model without a key": lambda s: s["model"].pop("backbone.head.fc.bias"),
    "model with a key more": lambda s: s["model"].update({"other": torch.zeros(1)}),
    "model of complex numbers": lambda s: s["model"].update(
        {"backbone.head.fc.bias": torch.zeros(10, dtype=torch.complex64)}
    ),
    "average of another shape": lambda s: s["ema"].update({"backbone.head.fc.bias": torch.ones(1)}),
    "moments of another shape": lambda s: first_moments(s).update({"exp_avg": torch.zeros(2, 9)}),
    "moments that are text": lambda s: first_moments(s).update({"exp_avg": "x"}),
    "moments of nobody": lambda s: s["optimizer"]["state"].update({10**6: {}}),
    "a weight that is not finite": lambda s: s["model"]["backbone.head.fc.bias"].fill_(math.nan),
    "an average that is not finite": lambda s: s["ema"]["backbone.head.fc.bias"].fill_(math.inf),
    "moments that are not finite": lambda s: first_moments(s)["exp_avg"].fill_(math.nan),
    "a negative square": lambda s: first_moments(s)["exp_avg_sq"].fill_(-1),
    "a negative step": lambda s: first_moments(s)["step"].fill_(-1),
    "no moments": lambda s: s["optimizer"]["state"].clear(),
    "no moments of one weight": lambda s: s["optimizer"]["state"].pop(3),
    "no squares of one weight": lambda s: first_moments(s).pop("exp_avg_sq"),
    "an update after the run's end": lambda s: s.update(update=10, epoch=10 / 29),
    "an update that is no epoch's": set_key("update", 2),
    "an enormous update": set_key("update", 2**52),
    "an epoch before the run": set_key("epoch", -5),
    "an epoch after the run": set_key("epoch", 99.0),
    "a group less": lambda s: s["optimizer"]["param_groups"].pop(),
    "a group of others": lambda s: s["optimizer"]["param_groups"][0]["params"].pop(),
    "sums of another shape": set_key("sums", torch.zeros(2, 4)),
    "classes of others": set_key("classes", ["a", "b"]),
    "a config that is none": set_key("config", "model = "),
    "a config of another network": set_key("config", 'model = "resnet18"'),
    "a config with an unknown key": set_key("config", "modle = 1"),
}


@pytest.mark.parametrize("change", UNFIT.values(), ids=UNFIT)
def test_a_state_that_does_not_fit_is_refused_and_nothing_written(change, run, tmp_path, capsys):
    path = damaged(run, tmp_path / "run", change)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    capsys.readouterr()
    assert train.main(["--resume", str(tmp_path / "run"), "--max-updates", "5"]) == 2
    assert "checkpoint" in one_line(capsys, "fastgn.train")
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    assert path.exists()


def test_an_unfinished_run_says_its_update(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(export, "check_same", lambda *args: None)
    middle = run / "checkpoints" / "update_00000002.pt"
    line = "run: these are the weights of update 2 (epoch 0.069 of 1), before the run's end"
    args = ["--checkpoint", str(middle), "--robustbench", str(tmp_path / "out")]
    assert export.main(args) == 0
    assert capsys.readouterr().err.splitlines() == [line]
    assert read_saved(tmp_path / "out" / "weights.safetensors").update == 2
    info = json.loads((tmp_path / "out" / "model_info.json").read_text())
    assert info["footnote"] == line.replace("run: ", "Unfinished: ") + "."
    assert export.main(["--checkpoint", str(run), *args[2:]]) == 0
    assert capsys.readouterr().err == ""
    assert read_saved(tmp_path / "out" / "weights.safetensors").update == 3
    more = ["--attacks", "clean", "--num-images", "8", "--output", str(tmp_path / "e.json")]
    assert evaluate.main(["--checkpoint", str(middle), *more]) == 0
    assert line.removeprefix("run: ") in capsys.readouterr().out
