"""Writes a trained model for RobustBench, or for any program that has torch and timm.

python -m fastgn.export --checkpoint runs/NAME --robustbench OUT_DIR --eps 4/255
"""

import ast
import inspect
import io
import math
import os
import subprocess
import sys
import tempfile
from fractions import Fraction as Ratio
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # report a mistake of the user before imports that take seconds
    from fastgn.extras import check_start

    check_start("fastgn.export")

import torch
from torch import Tensor

from fastgn.archive import read_archive
from fastgn.config.cli import parse_cli
from fastgn.config.outputs import check_replaced, check_written, read_beginning
from fastgn.config.programs import ExportConfig
from fastgn.errors import UserError, check, print_error, print_line, print_stopped
from fastgn.extras import stop_on_signals
from fastgn.files import check_target, read_json, write_bytes, write_json
from fastgn.models import activations, create
from fastgn.state import ExportHeader, is_number
from fastgn.trained import (
    Trained,
    export_weights,
    hash_weights,
    load_bare_weights,
    load_trained,
)

FILES = ("model.py", "model_info.json", "weights.pt", "weights.safetensors")
"""Names of the files that an export consists of."""
CLASSES = {"cifar10": 10, "imagenet": 1000}
"""Data set of RobustBench on which fastgn can train -> number of its classes."""


DEFINITION = '''"""A network that fastgn has trained, for any program that has torch and timm.

Images are B x 3 x SIDE x SIDE in 0..1, and the network normalises them itself. In the evaluation
of this model, larger images were scaled (bicubic), so that the central crop of SIDE pixels was
CROP_PCT of the shorter side.
"""

from pathlib import Path

import torch
from torch import nn
{imports}
NAME, NETWORK = {name}, {model}
CLASSES, SIDE, CROP_PCT = {classes}, {side}, {crop_pct}
MEAN, STD = {mean}, {std}
ARGUMENTS = {arguments}
{activation}
{own}
class Normalized(nn.Module):
    """Returns the logits of images in 0..1.

    The keys of a state dict are those of the network, with or without the prefix `model.`.
    """

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.register_buffer("mean", torch.tensor(MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(STD).view(1, 3, 1, 1), persistent=False)

    def forward(self, images):
        return self.model((images - self.mean) / self.std)

    def load_state_dict(self, state_dict, strict=True, assign=False):
        named = {{"model." + k.removeprefix("model."): v for k, v in state_dict.items()}}
        return super().load_state_dict(named, strict=strict, assign=assign)


def build():
    """Returns the network with random weights, in eval mode."""
    network = {constructor}
{swap}    return Normalized(network).eval()


def load(path=Path(__file__).with_name("weights.pt")):
    """Returns the trained network on the CPU, in eval mode.

    path: the file weights.pt. No code in it is run.
    """
    model = build()
    model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return model
'''
"""Template of model.py.

Its class Normalized wraps the network and normalises the images. The keys of the weights are those
of the network itself, and Normalized also accepts keys that begin with `model.`. RobustBench's
loader adds this prefix for ImageNet, but not for CIFAR-10."""

SWAP_ACTIVATIONS = """    for parent in list(network.modules()):
        for name, child in parent.named_children():
            if isinstance(child, KINDS):
                setattr(parent, name, ACTIVATION(**ACTIVATION_ARGUMENTS))
"""


def shortest(values: Tensor) -> tuple[float, ...]:
    """Returns float32 values as the shortest decimal numbers that give the same float32 again."""
    return tuple(float(str(v)) for v in values.detach().cpu().flatten().numpy())


def literal(value: Any) -> str:
    """Returns Python text that evaluates to `value` and cannot run anything.

    All values from a checkpoint pass through here before they are written into model.py, because a
    checkpoint may come from a stranger. Raises UserError if the value is not a literal of Python.
    """
    text = repr(value)
    try:
        same = ast.literal_eval(text) == value
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        same = False
    check(
        same,
        f"{text[:80]} cannot be written into model.py: it must be a number, text, list or None",
    )
    return text


def write_definition(trained: Trained) -> str:
    """Returns the text of model.py, which builds the network as `network.build_model` does.

    model.py does not import fastgn. If the network is one of fastgn's own, the text contains the
    source of its class.
    """
    cfg = trained.cfg.architecture.started()
    name = create.check_name(cfg)
    _, arguments = create.create_network(name, cfg, len(trained.classes))
    imports, own, activation, swap = "", "", "", ""
    constructor = f"timm.create_model({literal(name)}, pretrained=False, **ARGUMENTS)"
    if name in create.OWN:
        source = inspect.getsource(sys.modules[create.OWN[name].__module__])
        lines = source.partition('"""\n\n')[2].splitlines()
        own = "\n" + "\n".join(x for x in lines if not x.startswith(("import ", "from "))).strip()
        own += "\n\n"
        imports += "import torch.nn.functional as F\nfrom torch import Tensor\n"
        constructor = f"{create.OWN[name].__name__}(**ARGUMENTS)"
    else:
        imports += "import timm\n"
    if cfg.activation:
        imports += "from timm.layers import get_act_layer\n"
        plain = sorted(
            {c.__name__ for c in activations.list_replaced_classes() if is_from_torch(c)}
        )
        named = ", ".join(
            f"get_act_layer({a!r})" for a in activations.ACTIVATIONS if a != "softplus"
        )
        layer, keywords = activations.parse_activation(cfg.activation)
        kind = cfg.activation.partition(":")[0]
        made = "nn.Softplus" if layer is torch.nn.Softplus else f"get_act_layer({literal(kind)})"
        activation = (
            f"ACTIVATION, ACTIVATION_ARGUMENTS = {made}, {literal(keywords)}\n"
            f"KINDS = tuple({{{', '.join('nn.' + k for k in plain)},\n    {named}}})\n"
        )
        swap = SWAP_ACTIVATIONS
    return DEFINITION.format(
        name=literal(trained.name),
        model=literal(cfg.model),
        classes=literal(len(trained.classes)),
        side=literal(trained.model.img_size),
        crop_pct=literal(trained.model.crop_pct),
        imports=imports,
        mean=literal(shortest(trained.model.mean)),
        std=literal(shortest(trained.model.std)),
        arguments=literal(arguments),
        activation=activation,
        own=own,
        constructor=constructor,
        swap=swap,
    )


def is_from_torch(kind: type) -> bool:
    """Returns whether torch.nn has this class under the same name."""
    return getattr(torch.nn, kind.__name__, None) is kind


def check_same(source: str, pickled: bytes, trained: Trained) -> None:
    """Raises UserError unless the exported network gives the logits of the trained model.

    model.py and weights.pt are used in another process, in a temporary folder and without fastgn.
    This shows that the files are enough to rebuild the network, and protects this process from the
    code in them. The logits of two random images are compared before the export is written.

    source: the text of model.py. pickled: the bytes of weights.pt.
    """
    side = trained.model.img_size
    images = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        theirs = trained.model.cpu()(images)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "model.py").write_text(source, encoding="utf-8")
        (folder / "weights.pt").write_bytes(pickled)
        torch.save(images, folder / "images.pt")
        rebuild(folder)
        mine = read_archive(folder / "logits.pt")
    difference = float((mine - theirs).abs().max())
    check(
        difference <= 1e-4 * max(1.0, float(theirs.abs().max())),
        f"--checkpoint {trained.name}: the logits of the exported network differ from those of the "
        f"trained network by {difference:g}, so nothing was written",
    )


REBUILD = """
import sys
sys.path += sys.argv[1:]
sys.modules["fastgn"] = sys.modules["fastgn_kernels"] = None
import runpy
import torch
model = runpy.run_path("model.py")["load"]()
with torch.no_grad():
    torch.save(model(torch.load("images.pt", weights_only=True)), "logits.pt")
"""
"""Program that runs model.py in a folder, without fastgn, on the images in that folder."""
REBUILD_LIMIT_S = 600
"""Seconds after which the process that runs the exported network is stopped."""
KEPT = ("PATH", "HOME", "TMPDIR", "LANG", "LD_LIBRARY_PATH", "OMP_NUM_THREADS")
"""Environment variables that are passed to the process that runs model.py. Others are not passed,
because they may hold passwords or access tokens."""


def rebuild(folder: Path) -> None:
    """Runs a folder's model.py in an isolated Python process, which writes logits.pt there.

    The logits are those of the images in the folder's images.pt. Raises UserError if the process
    fails or takes too long.
    """
    command = [sys.executable, "-I", "-c", REBUILD, *filter(None, sys.path)]
    env = {k: os.environ[k] for k in KEPT if k in os.environ} | {"HF_HUB_OFFLINE": "1"}
    try:
        done = subprocess.run(
            command, cwd=folder, env=env, capture_output=True, timeout=REBUILD_LIMIT_S
        )
    except subprocess.TimeoutExpired:
        raise UserError(
            f"the exported network gave no logits within {REBUILD_LIMIT_S} s: nothing was written"
        ) from None
    lines = done.stderr.decode(errors="replace").strip().splitlines()
    reason = lines[-1] if lines else "the process that tests this was killed"
    check(
        done.returncode == 0,
        f"the exported network cannot be rebuilt without fastgn ({reason}), so nothing was written",
    )


def format_eps(eps: float) -> str:
    """Returns eps as RobustBench writes it, such as 4/255 for a whole number of 255ths, and 0.5 for
    other values."""
    n = Ratio(eps * 255).limit_denominator(1000)
    return f"{n}/255" if n.denominator == 1 and abs(n / 255 - eps) < 1e-9 else f"{eps:g}"


def read_accuracies(cfg: ExportConfig, trained: Trained) -> dict[str, str | None]:
    """Returns a dict with the keys clean_acc, autoattack_acc and footnote, read from --evaluation.

    The accuracies are texts in per cent with two decimals. The footnote says on how many images
    they were measured. None means that the evaluation did not measure the value. The accuracy under
    AutoAttack is used only if it was measured with --eps and in the norm of --threat.

    Raises UserError if the file is missing or not an evaluation, or if it does not have this model
    with these weights.
    """
    name = trained.name
    out: dict[str, str | None] = {"clean_acc": None, "autoattack_acc": None, "footnote": None}
    if cfg.evaluation is None:
        return out
    record = read_evaluation(Path(cfg.evaluation))
    entries = {entry["name"]: entry for entry in record["models"]}
    check(
        name in entries,
        f"--evaluation {cfg.evaluation} has no model {name!r}: its models are {', '.join(entries)}",
    )
    entry = entries[name]
    check(
        entry.get("weights_sha256") in (None, hash_weights(trained.model)),
        f"--evaluation {cfg.evaluation} measured {name} with other weights than those of "
        f"--checkpoint {cfg.checkpoint}: evaluate this checkpoint first",
    )
    for row in entry["results"]:
        percent = f"{100 * row['accuracy']:.2f}"
        if row["attack"] == "clean":
            out["clean_acc"] = percent
        elif row["attack"] == "autoattack" and record.get("norm", "Linf") == cfg.threat:
            if math.isclose(row["eps"], cfg.eps, rel_tol=1e-6):
                out["autoattack_acc"] = percent
    if "images" in entry:
        out["footnote"] = f"Accuracies on {entry['images']} images ({entry.get('subset', '')})."
    return out


def read_evaluation(path: Path) -> dict[str, Any]:
    """Returns the content of an evaluation.json.

    Raises UserError if an entry that `read_accuracies` needs is missing or has another type.
    """
    try:
        record = read_json(path)
    except UserError as error:
        raise UserError(f"--evaluation {error}") from None

    def is_row(row: Any) -> bool:
        return (
            isinstance(row, dict)
            and isinstance(row.get("attack"), str)
            and is_number(row.get("eps"))
            and is_number(row.get("accuracy"))
            and 0 <= row["accuracy"] <= 1
        )

    def is_entry(entry: Any) -> bool:
        return (
            isinstance(entry, dict)
            and isinstance(entry.get("name"), str)
            and isinstance(entry.get("results"), list)
            and all(map(is_row, entry["results"]))
            and type(entry.get("images", 0)) is int
            and isinstance(entry.get("subset", ""), str)
        )

    entries = record.get("models") if isinstance(record, dict) else None
    check(
        isinstance(entries, list) and all(map(is_entry, entries)),
        f"--evaluation {path} is not an evaluation.json of fastgn.evaluate",
    )
    return record


def make_model_info(cfg: ExportConfig, trained: Trained) -> dict[str, Any]:
    """Returns RobustBench's entry for a model, with the fields in RobustBench's order.

    A field is None if its value is unknown.

    Raises UserError if --dataset has another number of classes than the model, or if the accuracies
    cannot be read.
    """
    own = trained.cfg.dataset.kind
    dataset: str | None = cfg.dataset or ("imagenet" if own == "imagefolder" else own)
    expected = CLASSES.get(str(dataset))
    if expected is None or expected != len(trained.classes):
        check(
            cfg.dataset is None,
            f"--dataset {cfg.dataset} has {expected} classes, but {trained.name} has "
            f"{len(trained.classes)}: leave --dataset out",
        )
        dataset = None
    start = trained.cfg.architecture
    scratch = cfg.model is None and not (start.pretrained or start.initial_checkpoint)
    measured = read_accuracies(cfg, trained)
    position = f"Unfinished: {trained.unfinished}." if trained.unfinished else None
    notes = [note for note in (position, measured["footnote"]) if note is not None]
    return {
        "link": cfg.link,
        "name": cfg.name or trained.name,
        "authors": cfg.authors,
        "additional_data": False
        if cfg.additional_data is None and scratch
        else cfg.additional_data,
        "number_forward_passes": 1,
        "dataset": dataset,
        "venue": cfg.venue,
        "architecture": cfg.architecture or start.model,
        "eps": format_eps(cfg.eps),
        "clean_acc": measured["clean_acc"],
        "reported": measured["autoattack_acc"],
        "autoattack_acc": measured["autoattack_acc"],
        "footnote": " ".join(notes) or None,
        "unreliable": None,
    }


def run(cfg: ExportConfig) -> None:
    """Writes the four files of an export. Each file is written completely or not at all.

    Raises UserError if the model cannot be exported.
    """
    cpu, folder = torch.device("cpu"), Path(cfg.robustbench)
    for file in FILES:
        check_target(folder / file)
        read = [("--checkpoint", cfg.checkpoint), ("--evaluation", cfg.evaluation)]
        check_written({f"--robustbench {cfg.robustbench}: its file": folder / file}, read)
    ours = read_beginning(folder / "model.py").startswith(DEFINITION[:40].encode())
    check_replaced("--robustbench", folder, FILES, ours, "export")
    if cfg.model is None:
        trained = load_trained(cfg.checkpoint, cpu)
    else:
        classes = tuple(map(str, range(CLASSES[str(cfg.dataset)])))
        trained = load_bare_weights(cfg.checkpoint, cfg, classes, cpu)
    if trained.unfinished:
        print_line(f"{trained.name}: {trained.unfinished}")
    info = make_model_info(cfg, trained)
    source = write_definition(trained)
    weights = {k: v.contiguous() for k, v in trained.model.backbone.state_dict().items()}
    pickled = io.BytesIO()
    torch.save(weights, pickled)
    check_same(source, pickled.getvalue(), trained)
    # write model.py first, because another export replaces these files only if it finds model.py
    write_bytes(folder / "model.py", source)
    header = ExportHeader(trained.cfg.to_toml(), list(trained.classes), trained.update)
    export_weights(folder / "weights.safetensors", weights, header)
    write_bytes(folder / "weights.pt", pickled.getvalue())
    write_json(folder / "model_info.json", info)
    print_line(f"written: {folder}: {', '.join(FILES)}", sys.stdout)
    missing = [k for k, v in info.items() if v is None and k not in ("footnote", "unreliable")]
    if missing:
        print(f"model_info.json has no {', '.join(missing)} yet: see --help for the options")


def main(args: list[str] | None = None) -> int:
    """Runs the program and returns its exit status, which is 2 after a mistake of the user."""
    try:
        cfg = parse_cli(ExportConfig, sys.argv[1:] if args is None else args, "fastgn.export")
        with stop_on_signals():
            run(cfg)
    except UserError as error:
        print_error(f"fastgn.export: error: {error}")
        return 2
    except KeyboardInterrupt:
        print_stopped("fastgn.export", "run the same command again")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
