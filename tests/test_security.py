"""Files of strangers: they are read, and nothing else. Every hostile file is made here."""

import ast
import io
import json
import math
import os
import pickle
import random
import re
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from support import ROOT
from support.runs import tiny_run
from support.states import differences, read_state, small_state, small_values
from timm.models import list_models
from torch import Tensor, nn

from fastgn import evaluate, export, files, sweep, train
from fastgn.checkpoint import (
    FORMAT,
    Checkpoints,
    find_checkpoint,
)
from fastgn.config import Config
from fastgn.config.groups import ArchitectureConfig
from fastgn.config.programs import EvaluateConfig
from fastgn.data import check
from fastgn.errors import UserError
from fastgn.models import create
from fastgn.models.network import Classifier, build_model
from fastgn.models.weights import load_weights, read_weights
from fastgn.state import ExportHeader, TrainState, keys_of
from fastgn.trained import Trained, load_bare_weights, load_trained, read_saved

PACKAGE = Path(files.__file__).parent
CHECKPOINT = keys_of(TrainState)

# ------------------------------------------------------------------------ one reader a kind of file

READERS: dict[str, set[str]] = {
    "torch.load": {"files.py"},
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
    "zipfile.ZipFile": {"files.py", "data/npz.py"},
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
TINY_KWARGS = ("patch_size=4", "embed_dim=8", "depths=(1, 1)", "num_heads=(1, 2)", "window_size=2")


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


# ----------------------------------------------------------------------- arguments of a constructor

NO_CONSTRUCTORS = (
    *("checkpoint_path", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"),
    *("pretrained_strict", "pretrained_filter_fn", "pretrained_model_args", "model_cfg", "pruned"),
    *("features_only", "feature_cls", "out_indices", "feature_cfg", "kwargs_filter", "variant"),
    *(
        "scriptable",
        "exportable",
        "no_jit",
        "jit",
        "device",
        "dtype",
        "model_name",
        "kwargs",
        "self",
    ),
)


class Bomb:
    """Makes a folder when it is unpickled."""

    def __init__(self, proof: Path):
        self.proof = proof

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.proof),)


@pytest.mark.parametrize("model", ["resnet10t", "swin_t", "preact_resnet18", "test_byobnet"])
@pytest.mark.parametrize("key", NO_CONSTRUCTORS)
def test_arguments_that_are_not_the_constructors_are_refused(key, model, tmp_path):
    bomb, proof = tmp_path / "bomb.pt", tmp_path / "proof"
    torch.save({"state_dict": Bomb(proof)}, bomb)
    cfg = ArchitectureConfig(model=model, model_kwargs=(f"{key}={bomb}",))
    with pytest.raises(UserError, match=f"--model-kwargs {key}: the constructor of .* takes no"):
        build_model(cfg, 10)
    assert not proof.exists()


def test_no_network_of_timms_takes_a_file():
    for name in list_models():
        arguments = create.list_constructor_arguments(name)
        assert not arguments & set(NO_CONSTRUCTORS), name
        assert not [a for a in arguments if re.search("pretrained(?!_window)|checkpoint_|url", a)]


@pytest.mark.parametrize("value", ["1e999", "-1e999", "2**99", "9" * 40, "{1, 2}", "b'x'", "..."])
def test_values_are_plain(value):
    cfg = ArchitectureConfig(model="resnet10t", model_kwargs=(f"stem_width={value}",))
    with pytest.raises(UserError):
        build_model(cfg, 10)


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
    with pytest.raises(UserError, match="is corrupt: its SHA-256 is not"):
        read_saved(path)


# ------------------------------------------------------------ what checkpoints and exports may hold


def save_state(path: Path, state: dict[str, Any]) -> Path:
    torch.save({"format": FORMAT, **state}, path)
    return path


def refused_state(path: Path) -> str:
    with pytest.raises(UserError) as refusal:
        read_state(path)
    line = str(refusal.value)
    assert line.startswith(f"{path}") and line.isprintable(), line
    return line


@pytest.mark.parametrize("key", sorted(CHECKPOINT))
def test_a_missing_key_is_named(key, tmp_path):
    state = small_values(1)
    del state[key]
    path = save_state(tmp_path / "update_00000001.pt", state)
    if key in ("epoch", "bad_images", "data", "ranks"):  # older versions did not write them
        assert not read_state(path)[key]
    else:
        assert refused_state(path) == f"{path} is damaged: it lacks '{key}'"


WRONG: dict[str, Any] = {
    "None": None,
    "text": "x",
    "number": 1.5,
    "negative": -1,
    "true": True,
    "enormous": 2**200,
    "NaN": float("nan"),
    "inf": float("inf"),
    "empty list": [],
    "empty dict": {},
    "list": [1, None],
    "dict": {"a": {"b": object}},
    "tensor": torch.tensor(1),
    "list of lists": [["a"], ["b"]],
    "doubled": ["a", "a"],
    "unnamed": {1: 2},
    "sparse": {"weight": torch.eye(2).to_sparse()},
    "meta": {"weight": torch.empty(2, device="meta")},
    "quantized": {"weight": torch.quantize_per_tensor(torch.ones(2), 1.0, 0, torch.qint8)},
    "nested": {"weight": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])},
    "expanded": {"weight": torch.ones(1).expand(10**12)},
    "complex": {"weight": 1j},
    "set": {"weight": {1}},
    "bytes": b"x",
    "NaN inside": {"weight": float("nan")},
}
FINE = {
    ("epoch", "number"),
    ("epoch", "negative"),
    ("epoch", "None"),
    ("best", "number"),
    ("best", "negative"),
    ("accuracy", "empty dict"),
    ("bad_images", "empty list"),
    ("bad_images", "doubled"),
    ("ema", "None"),
    ("data", "empty dict"),
}
"""What is not wrong after all."""


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("key", sorted(CHECKPOINT))
def test_a_key_of_another_kind_is_named(key, tmp_path):
    path = tmp_path / "update_00000001.pt"
    for kind, value in WRONG.items():
        if (key, kind) in FINE:
            continue
        try:
            save_state(path, small_values(1, **{key: value}))
        except (pickle.PicklingError, AttributeError):
            continue
        line = refused_state(path)
        assert key in line or "weight" in line or "more than tensors" in line, (kind, line)


def test_a_newer_version_is_named(tmp_path):
    path = save_state(tmp_path / "update_00000001.pt", small_values(1) | {"format": FORMAT + 1})
    later = f"has format {FORMAT + 1}, but this version of fastgn reads {FORMAT}: update fastgn"
    assert refused_state(path) == f"{path} {later}: update fastgn"
    save_state(path, small_values(1, later=1))
    assert "holds 'later', which this version of fastgn does not know: a newer" in refused_state(
        path
    )
    with pytest.raises(TypeError, match="later"):  # a key that TrainState does not declare
        small_state(1, later=1)


def test_a_state_that_holds_itself_is_refused(tmp_path):
    loop: list[Any] = []
    loop.append(loop)
    path = save_state(tmp_path / "update_00000001.pt", small_values(1, bad_images=loop))
    assert "contains itself" in refused_state(path)
    deep: Any = []
    for _ in range(300):
        deep = [deep]
    save_state(path, small_values(1, bad_images=deep))
    assert "nested too deeply" in refused_state(path)


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.builds(torch.ones, st.integers(0, 3)),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=6,
)


@given(key=st.sampled_from(sorted(CHECKPOINT)), value=values)
@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_any_value_of_any_key_is_read_or_refused_in_one_line(key, value, tmp_path):
    path = save_state(tmp_path / "update_00000001.pt", small_values(1) | {key: value})
    try:
        state = read_state(path)
    except UserError as error:
        assert str(error).startswith(str(path)) and str(error).isprintable()
    else:
        assert CHECKPOINT[key].fits(state[key])


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


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ("no JSON", "is not JSON"),
        ("[]", "holds a list, not named values"),
        ("{}", "lacks 'config'"),
        ('{"config": 1, "classes": ["a", "b"]}', "'config' should be a recipe's text"),
        ('{"config": "", "classes": "ab"}', "'classes' should be a list of different texts"),
        ('{"config": "", "classes": ["a", "a"]}', "'classes' should be a list of different texts"),
        ('{"config": "", "classes": ["a", "b"], "update": NaN}', "NaN is not a finite number"),
        ('{"config": "", "classes": ["a", "b"], "update": -1}', "'update' should be a whole"),
        ('{"config": "", "classes": ["a", "b"], "x": 1}', "holds 'x', which this version"),
        ('{"config": "x = ", "classes": ["a", "b"]}', "the config in it: it is not TOML"),
        ("[" * 100_000, "is not JSON"),
    ],
)
def test_a_header_that_is_none_is_named(header, expected, tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"weight": torch.ones(1)}, path, metadata={"fastgn": header})
    with pytest.raises(UserError) as refusal:
        read_saved(path)
    assert expected in str(refusal.value) and str(path) in str(refusal.value)
    assert str(refusal.value).isprintable()


def test_what_cannot_be_read_is_named(tmp_path):
    for name in ("a.pt", "a.safetensors", "a.json"):
        path = tmp_path / name
        read = {".pt": read_weights, ".safetensors": read_weights, ".json": files.read_json}[
            path.suffix
        ]
        with pytest.raises(UserError, match=f"^{path} cannot be read: No such file"):
            read(path)
        os.mkfifo(path)  # would be waited for
        with pytest.raises(UserError, match=f"^{path} cannot be read: it is not a file"):
            read(path)


def test_a_class_behind_numpys_names_is_not_run(tmp_path):
    """NumPy's numbers beside tensors are passed over, and none of its functions is called."""
    content = {"state_dict": {"a": torch.ones(2)}, "loss": np.float64(0.5), "seen": np.arange(3)}
    torch.save(content, tmp_path / "with_numpy.pt")
    assert differences(read_weights(tmp_path / "with_numpy.pt"), {"a": torch.ones(2)}) == []
    with pytest.raises(UserError, match="holds more than tensors"):
        save_state(tmp_path / "update_00000001.pt", small_values(1, best=np.float64(0.5)))
        read_state(tmp_path / "update_00000001.pt")
    stream = io.BytesIO()
    torch.save({"a": torch.ones(1), "d": np.dtype([("x", "O")])}, stream)
    (tmp_path / "dtype.pt").write_bytes(stream.getvalue())
    assert list(read_weights(tmp_path / "dtype.pt")) == ["a"]


# ----------------------------------------------------------------------------- weights of elsewhere


@pytest.fixture(scope="module")
def swin() -> Classifier:
    torch.manual_seed(1)
    return build_model(
        ArchitectureConfig(model="swin_t", model_kwargs=TINY_KWARGS, img_size=16), 5
    )[0]


NESTS = [
    (),
    ("net",),
    ("model_state_dict",),
    ("state_dict",),
    ("model",),
    ("model_ema",),
    ("module",),
    ("network",),
    ("model", "state_dict"),
    ("ema", "module"),
]


@pytest.mark.parametrize(
    "prefix",
    ["", "_orig_mod.", "model.", "1.", "module.", "backbone.", "module._orig_mod.1.model.", "a.b."],
)
@pytest.mark.parametrize("nest", NESTS, ids="/".join)
def test_prefixes_and_nests_are_seen_through(nest, prefix, swin, tmp_path):
    weights = swin.backbone.state_dict()
    content: Any = {f"{prefix}{k}": v for k, v in weights.items()}
    for key in reversed(nest):
        content = {key: content, "epoch": 3, "optimizer": {"state": {0: {"m": torch.ones(2)}}}}
    torch.save(content, tmp_path / "weights.pt")
    torch.manual_seed(2)
    start = ArchitectureConfig(
        model="swin_t",
        model_kwargs=TINY_KWARGS,
        img_size=16,
        initial_checkpoint=str(tmp_path / "weights.pt"),
    )
    model, _ = build_model(start, 5)
    assert differences(model.backbone.state_dict(), weights) == []


def test_another_normalisation_is_refused_and_its_own_taken(swin):
    weights = {f"1.{k}": v for k, v in swin.backbone.state_dict().items()}
    mean = torch.tensor((0.485, 0.456, 0.406)).view(1, 3, 1, 1)
    load_weights(swin, weights | {"0.mean": mean}, "FILE")
    with pytest.raises(UserError) as refusal:
        load_weights(swin, weights | {"normalize.mean": 0 * mean + 0.5}, "FILE")
    assert "normalize.mean is [0.5, 0.5, 0.5]" in str(refusal.value)
    assert str(refusal.value).endswith("add --mean 0.5 0.5 0.5")


def test_a_mismatch_shows_a_key_of_each(swin):
    weights = {f"blocks.{k}": v for k, v in swin.backbone.state_dict().items()} | {
        "x": torch.ones(1)
    }
    with pytest.raises(UserError) as refusal:
        load_weights(swin, weights, "FILE")
    assert re.search(
        r"\d+ keys are missing, \d+ unknown: the file has blocks\.\S+ where the network has \S+$",
        str(refusal.value),
    )


def test_another_head_and_size_are_adapted_on_request(swin, tmp_path, capsys):
    save_file(swin.backbone.state_dict(), tmp_path / "weights.safetensors")
    kwargs = (*TINY_KWARGS[:-1], "window_size=4")
    start = ArchitectureConfig(
        model="swin_t",
        model_kwargs=kwargs,
        img_size=32,
        initial_checkpoint=str(tmp_path / "weights.safetensors"),
    )
    with pytest.raises(UserError, match="--adapt-weights"):
        build_model(start, 3)
    torch.manual_seed(5)
    model, report = build_model(ArchitectureConfig(**{**start.__dict__, "adapt_weights": True}), 3)
    (line,) = [x for x in report.format_lines(start) if x.startswith("initial weights: ")]
    assert "head.fc.weight, head.fc.bias are initialised at random" in line
    assert "2 tables resized" in line
    mine, theirs = model.backbone.state_dict(), swin.backbone.state_dict()
    assert torch.equal(mine["patch_embed.proj.weight"], theirs["patch_embed.proj.weight"])
    assert mine["head.fc.weight"].shape == (3, 16)


def test_an_evaluation_needs_the_head_itself(swin, tmp_path):
    save_file(swin.backbone.state_dict(), tmp_path / "weights.safetensors")
    cfg = EvaluateConfig(
        checkpoint=(str(tmp_path / "weights.safetensors"),),
        model="swin_t",
        model_kwargs=TINY_KWARGS,
        img_size=16,
        adapt_weights=True,
        data="digits",
    )
    with pytest.raises(UserError, match="another number of classes than the data"):
        load_bare_weights(cfg.checkpoint[0], cfg, tuple("0123456789"), torch.device("cpu"))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(3, 3)
        self.b = self.a


def test_shared_weights_are_written_and_read(tmp_path):
    weights: dict[str, Tensor] = Tied().state_dict()
    whole = torch.arange(8.0)
    weights |= {"first": whole[:4], "second": whole[4:], "turned": whole.view(2, 4).T}
    path = tmp_path / "model.safetensors"
    files.write_safetensors(path, weights, {})
    read = read_weights(path)
    assert read.keys() == weights.keys()
    assert all(torch.equal(read[k], weights[k]) for k in weights)


def test_a_network_with_shared_weights_ends_its_run(tmp_path):
    """coat_lite_tiny has them, from training to the export and back."""
    torch.manual_seed(0)
    cfg = ArchitectureConfig(model="coat_lite_tiny", img_size=32)
    model, _ = build_model(cfg, 10)
    weights = model.backbone.state_dict()
    assert len({v.data_ptr() for v in weights.values()}) < len(weights)
    path = tmp_path / "model.safetensors"
    config = Config(architecture=cfg)
    metadata = {"config": config.to_toml(), "classes": list("0123456789")}
    assert metadata.keys() <= keys_of(ExportHeader).keys()
    files.write_safetensors(path, weights, metadata)
    again = load_trained(str(path), torch.device("cpu"))
    images = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(again.model(images), model.eval()(images))


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
