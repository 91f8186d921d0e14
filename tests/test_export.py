"""A trained run as files for RobustBench: rebuilt where fastgn cannot be imported."""

import dataclasses
import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file
from support import ROOT
from support.marks import first_is_quick
from support.runs import tiny_run

from fastgn import export, train
from fastgn.trained import hash_weights, load_trained

NAMES = ["model.py", "model_info.json", "weights.pt", "weights.safetensors"]
REBUILD = """
import importlib.util, sys
sys.modules["fastgn"] = sys.modules["fastgn_kernels"] = None
import torch
folder = sys.argv[1]
spec = importlib.util.spec_from_file_location("definition", folder + "/model.py")
definition = importlib.util.module_from_spec(spec)
spec.loader.exec_module(definition)
model = definition.load(*sys.argv[2:])
assert not model.training
images = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(5))
with torch.no_grad():
    torch.save(model(images), folder + "/logits.pt")
"""
PREACT = ("--model", "preact_resnet18", "--img-size", "16", "--model-kwargs", "width=4")


@pytest.fixture
def rebuilds() -> None:
    """For a test of the check that a process of its own rebuilds the network from the files."""


@pytest.fixture(autouse=True)
def rebuild_nothing_else(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves this check out of the tests of other things, because it takes seconds."""
    if "rebuilds" not in request.fixturenames:
        monkeypatch.setattr(export, "check_same", lambda source, pickled, trained: None)


def trained_run(folder: Path, *more: str) -> Path:
    assert train.main(tiny_run(folder, "--epochs", "1", "--max-updates", "3", *more)) == 0
    return folder


@pytest.fixture(scope="module")
def swin_run(tmp_path_factory) -> Path:
    more = ("--activation", "silu", "--mean", "0.1", "0.2", "0.3", "--std", "0.5", "0.6", "0.7")
    return trained_run(tmp_path_factory.mktemp("export") / "swin", *more)


def exported(run: Path, out: Path, *more: str) -> dict:
    assert export.main(["--checkpoint", str(run), "--robustbench", str(out), *more]) == 0
    return json.loads((out / "model_info.json").read_text())


def refused(capsys, *args: str) -> str:
    capsys.readouterr()
    assert export.main(list(args)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line.removeprefix("fastgn.export: error: ")


def rebuilt_logits(folder: Path, *more: str) -> torch.Tensor:
    """What model.py gives in a process of its own, in which importing fastgn fails."""
    done = subprocess.run(
        [sys.executable, "-I", "-c", REBUILD, str(folder), *more],
        capture_output=True,
        text=True,
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr
    return torch.load(folder / "logits.pt", weights_only=True)


def own_logits(run: Path) -> torch.Tensor:
    images = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        return load_trained(str(run), torch.device("cpu")).model(images)


# ---------------------------------------------------------------------------------------- the files


@pytest.mark.slow
def test_an_export_gives_the_same_logits_without_fastgn(swin_run, tmp_path, rebuilds):
    """Another activation and another normalisation than the network's own: both must come along."""
    exported(swin_run, tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == NAMES
    expected = own_logits(swin_run)
    assert float(expected.std()) > 1e-3
    torch.testing.assert_close(rebuilt_logits(tmp_path / "out"), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.slow
def test_a_network_of_our_own_brings_its_source_along(tmp_path, rebuilds):
    run = trained_run(tmp_path / "run", *PREACT)
    exported(run, tmp_path / "out")
    expected = own_logits(run)
    torch.testing.assert_close(rebuilt_logits(tmp_path / "out"), expected, rtol=1e-6, atol=1e-6)


def test_the_weights_are_the_runs_in_both_forms(swin_run, tmp_path):
    exported(swin_run, tmp_path)
    own = load_trained(str(swin_run), torch.device("cpu")).model.backbone.state_dict()
    forms = (
        load_file(tmp_path / "weights.safetensors"),
        torch.load(tmp_path / "weights.pt", weights_only=True),
    )
    for weights in forms:
        assert weights.keys() == own.keys()
        assert all(torch.equal(weights[k], own[k]) for k in own)
    again = load_trained(str(tmp_path / "weights.safetensors"), torch.device("cpu"))
    assert len(again.classes) == 10


@pytest.mark.slow
def test_keys_with_robustbenchs_prefix_are_taken_too(swin_run, tmp_path):
    """Its loader puts `model.` in front of an ImageNet model's keys; one key too many fails."""
    exported(swin_run, tmp_path)
    space: dict = {"__name__": "model", "__file__": str(tmp_path / "model.py")}
    exec((tmp_path / "model.py").read_text(), space)
    weights = torch.load(tmp_path / "weights.pt", weights_only=True)
    model = space["build"]()
    model.load_state_dict({f"model.{k}": v for k, v in weights.items()})
    assert all(torch.equal(v, weights[k]) for k, v in model.model.state_dict().items())
    with pytest.raises(RuntimeError, match="another"):
        model.load_state_dict(weights | {"another": torch.zeros(1)})
    assert not any(p.endswith(("mean", "std")) for p in model.state_dict())


STUB = {
    "robustbench/model_zoo/enums.py": """
        from enum import Enum

        class BenchmarkDataset(Enum):
            imagenet = "imagenet"

        class ThreatModel(Enum):
            Linf = "Linf"
    """,
    "robustbench/model_zoo/__init__.py": """
        from .enums import BenchmarkDataset, ThreatModel
        model_dicts = {BenchmarkDataset.imagenet: {ThreatModel.Linf: {}}}
    """,
    "robustbench/__init__.py": """
        import torch
        from pathlib import Path
        from .model_zoo import model_dicts
        from .model_zoo.enums import BenchmarkDataset, ThreatModel

        def load_model(model_name, model_dir="./models", dataset="cifar10", threat_model="Linf"):
            dataset, threat_model = BenchmarkDataset(dataset), ThreatModel(threat_model)
            entry = model_dicts[dataset][threat_model][model_name]
            assert isinstance(entry["gdrive_id"], str)
            file = Path(model_dir) / dataset.value / threat_model.value / f"{model_name}.pt"
            assert file.is_file(), "it would be fetched"
            weights = torch.load(file, map_location="cpu")
            model = entry["model"]()
            model.load_state_dict({f"model.{k}": v for k, v in weights.items()}, strict=True)
            return model.eval()

        def benchmark(
            model, n_examples, dataset, threat_model="Linf", *, eps, preprocessing, data_dir
        ):
            images = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(5))
            with torch.no_grad():
                torch.save(model(images), "logits.pt")
            print(n_examples, dataset, eps == 4 / 255, preprocessing, data_dir)
    """,
}
"""What RobustBench does with an export of ImageNet's: without its zoo, attacks and downloads."""


@pytest.mark.slow
def test_the_lines_for_robustbench(swin_run, tmp_path):
    """As they stand there, beside the export and without fastgn."""
    page = (ROOT / "docs" / "evaluation.md").read_text()
    (lines,) = (b for b in re.findall(r"```python\n(.*?)```", page, re.S) if "robustbench" in b)
    (command,) = re.findall(r"`(install -D weights\.pt [^`]*)`", page)
    exported(swin_run, tmp_path / "OUT")
    for name, text in STUB.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(textwrap.dedent(text))
    subprocess.run(command.split(), cwd=tmp_path / "OUT", check=True)
    blocked = "import sys; sys.modules['fastgn'] = sys.modules['fastgn_kernels'] = None\n"
    done = subprocess.run(
        [sys.executable, "-c", blocked + lines],
        capture_output=True,
        text=True,
        cwd=tmp_path / "OUT",
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "5000 imagenet True Res256Crop224 IMAGENET\n"
    found = torch.load(tmp_path / "OUT" / "logits.pt", weights_only=True)
    assert torch.equal(found, own_logits(swin_run))


@pytest.mark.slow
def test_an_export_that_is_not_the_run_is_not_written(
    swin_run, tmp_path, monkeypatch, capsys, rebuilds
):
    monkeypatch.setattr(export, "shortest", lambda values: (0.0, 0.0, 0.0))
    monkeypatch.setattr(export, "DEFINITION", export.DEFINITION.replace("/ self.std", "* 1.0"))
    where = ("--checkpoint", str(swin_run), "--robustbench", str(tmp_path / "out"))
    line = refused(capsys, *where)
    assert "the logits of the exported network differ from those of the trained network by" in line
    assert not (tmp_path / "out").exists()


def test_normalisation_is_read_back_to_the_last_bit():
    values = torch.tensor([0.485, 0.1 + 2**-24, 1 / 3])
    assert torch.equal(torch.tensor(export.shortest(values)), values)
    assert export.shortest(values)[0] == 0.485


# --------------------------------------------------------------------------------------- the record


FIELDS = [
    *("link", "name", "authors", "additional_data", "number_forward_passes", "dataset", "venue"),
    *("architecture", "eps", "clean_acc", "reported", "autoattack_acc", "footnote", "unreliable"),
]


def evaluation(path: Path, norm: str | None = "Linf", **more) -> str:
    results = [
        {"attack": "clean", "eps": 0.0, "accuracy": 0.77761},
        {"attack": "pgd-20", "eps": 4 / 255, "accuracy": 0.6},
        {"attack": "autoattack", "eps": 2 / 255, "accuracy": 0.7},
        {"attack": "autoattack", "eps": 4 / 255, "accuracy": 0.5156},
    ]
    record = {"models": [{"name": "swin", "results": results} | more]}
    path.write_text(json.dumps(record | ({"norm": norm} if norm else {})))
    return str(path)


@pytest.mark.slow
def test_without_an_evaluation_nothing_is_claimed(swin_run, tmp_path):
    info = exported(swin_run, tmp_path)
    assert list(info) == FIELDS
    known = {k: v for k, v in info.items() if v is not None}
    assert known == {
        "name": "swin",
        "additional_data": False,
        "number_forward_passes": 1,
        "architecture": "swin_t",
        "eps": "4/255",
    }


@pytest.mark.parametrize(
    ("source", "count", "expected"),
    [
        ({"data": "cifar10"}, 10, "cifar10"),
        ({"data": "imagefolder", "data_dir": "x"}, 1000, "imagenet"),
        ({"data": None, "data_dir": "x"}, 1000, "imagenet"),
        ({"data": "imagefolder", "data_dir": "x"}, 100, None),
        ({"data": None}, 10, None),
    ],
)
def test_the_data_set_is_the_runs(source, count, expected, swin_run):
    trained = load_trained(str(swin_run), torch.device("cpu"))
    dataset = dataclasses.replace(trained.cfg.dataset, **source)
    trained = dataclasses.replace(
        trained,
        cfg=dataclasses.replace(trained.cfg, dataset=dataset),
        classes=tuple(map(str, range(count))),
    )
    cfg = export.ExportConfig(checkpoint="x", robustbench="y")
    assert export.make_model_info(cfg, trained)["dataset"] == expected


@pytest.mark.parametrize("norm", first_is_quick([None, "Linf"]))
def test_accuracies_are_the_evaluations(norm, swin_run, tmp_path):
    file = evaluation(tmp_path / "e.json", norm, images=48, subset="first 48 of digits")
    info = exported(swin_run, tmp_path / "out", "--evaluation", file, "--dataset", "cifar10")
    assert (info["clean_acc"], info["autoattack_acc"]) == ("77.76", "51.56")
    assert info["reported"] == "51.56" and info["dataset"] == "cifar10"
    assert info["footnote"] == "Accuracies on 48 images (first 48 of digits)."


@pytest.mark.slow
def test_another_radius_or_norm_is_not_taken_for_this_one(swin_run, tmp_path):
    file = ("--evaluation", evaluation(tmp_path / "e.json"))
    info = exported(swin_run, tmp_path / "a", *file, "--eps", "8/255")
    assert (info["clean_acc"], info["autoattack_acc"], info["eps"]) == ("77.76", None, "8/255")
    info = exported(swin_run, tmp_path / "b", *file, "--threat", "L2", "--eps", "4/255")
    assert (info["clean_acc"], info["autoattack_acc"]) == ("77.76", None)


@pytest.mark.slow
def test_what_the_user_says_is_in_the_record(swin_run, tmp_path):
    said = {"name": "A title", "link": "https://x", "authors": "A, B", "venue": "V 2024"}
    args = [a for k, v in said.items() for a in (f"--{k}", v)]
    more = ("--architecture", "Swin-T", "--threat", "L2", "--eps", "0.5", "--additional-data")
    info = exported(swin_run, tmp_path, *args, *more, "True")
    assert {k: info[k] for k in said} == said
    assert (info["architecture"], info["eps"], info["additional_data"]) == ("Swin-T", "0.5", True)


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (
            ["--dataset", "imagenet"],
            "--dataset imagenet has 1000 classes, but swin has 10: leave --dataset out",
        ),
        (["--evaluation", "no.json"], "--evaluation no.json cannot be read: No such file"),
        (["--eps", "4"], "--eps 4 is out of range"),
        (["--eps", "0"], "--eps 0 is out of range: it must be above 0"),
        (["--checkpoint", "nowhere"], "--checkpoint nowhere: there is no such run or file"),
        (["--robustbench", ""], "--robustbench is missing"),
        (["--nam", "x"], "--nam is unknown: did you mean '--name'?"),
    ],
)
def test_mistakes_are_one_line(args, expected, swin_run, tmp_path, capsys):
    where = ["--checkpoint", str(swin_run), "--robustbench", str(tmp_path / "out")]
    assert expected in refused(capsys, *where, *args)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_an_evaluation_of_other_weights_is_one_line(swin_run, tmp_path, capsys):
    trained = load_trained(str(swin_run), torch.device("cpu"))
    own = evaluation(tmp_path / "own.json", weights_sha256=hash_weights(trained.model))
    assert exported(swin_run, tmp_path / "a", "--evaluation", own)["clean_acc"] == "77.76"
    other = evaluation(tmp_path / "other.json", weights_sha256="0" * 64)
    where = ("--checkpoint", str(swin_run), "--robustbench", str(tmp_path / "b"))
    line = refused(capsys, *where, "--evaluation", other)
    assert line.startswith(
        f"--evaluation {other} measured swin with other weights than those of --checkpoint"
    )


@pytest.mark.slow
def test_weights_of_elsewhere_are_exported_too(tmp_path, capsys, rebuilds):
    network = timm.create_model("resnet10t", num_classes=10)
    file = tmp_path / "weights.pth"
    torch.save({"state_dict": network.state_dict()}, file)
    args = ("--model", "resnet10t", "--img-size", "32", "--mean", "0", "0", "0")
    args += ("--std", "1", "1", "1")
    info = exported(file, tmp_path / "out", *args, "--dataset", "cifar10")
    assert (info["dataset"], info["architecture"]) == ("cifar10", "resnet10t")
    assert info["additional_data"] is None, "nobody knows"
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    space = {"__name__": "model", "__file__": str(tmp_path / "out" / "model.py")}
    exec((tmp_path / "out" / "model.py").read_text(), space)
    with torch.no_grad():
        torch.testing.assert_close(space["load"]()(images), network.eval()(images))
    line = refused(capsys, "--checkpoint", str(file), "--robustbench", str(tmp_path / "b"), *args)
    assert line == (
        "--model: the file of weights does not say on which data it was trained: add --dataset "
        "imagenet or --dataset cifar10"
    )


@pytest.mark.parametrize("content", ["1", "[]", "{}", '{"models": [{"name": "swin"}]}'])
def test_what_is_no_evaluation_is_one_line(content, swin_run, tmp_path, capsys):
    file = tmp_path / "e.json"
    file.write_text(content)
    where = ("--checkpoint", str(swin_run), "--robustbench", str(tmp_path / "out"))
    line = refused(capsys, *where, "--evaluation", str(file))
    assert line == f"--evaluation {file} is not an evaluation.json of fastgn.evaluate"


def test_an_evaluation_of_other_models_is_one_line(swin_run, tmp_path, capsys):
    file = evaluation(tmp_path / "e.json")
    record = json.loads(Path(file).read_text())
    record["models"][0]["name"] = "other"
    Path(file).write_text(json.dumps(record))
    where = ("--checkpoint", str(swin_run), "--robustbench", str(tmp_path / "out"))
    line = refused(capsys, *where, "--evaluation", file)
    assert line == f"--evaluation {file} has no model 'swin': its models are other"
