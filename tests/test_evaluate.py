"""python -m fastgn.evaluate: the table, the JSON, the picture, and AutoAttack as its authors have
it."""

import dataclasses
import functools
import json
import re
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from pyautoattack import AutoAttack
from support.marks import pretend_card
from support.runs import tiny_run

from fastgn import attacks, evaluate
from fastgn.analysis import outcomes, selection
from fastgn.analysis.attacker import Attacker
from fastgn.analysis.model_checks import check_model
from fastgn.analysis.parts import Parts
from fastgn.config.cli import parse_cli
from fastgn.config.groups import DatasetConfig
from fastgn.config.programs import AUTOATTACK_PARTS, EvaluateConfig
from fastgn.distributed import World
from fastgn.errors import UserError
from fastgn.state import ExportHeader
from fastgn.train import main as train_main
from fastgn.trained import export_weights, load_bare_weights, load_trained, read_saved


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A digits model that has learned something."""
    folder = tmp_path_factory.mktemp("evaluate") / "tiny"
    more = ("--epochs", "6", "--method", "natural", "--no-model-ema", "--smoothing", "0")
    assert train_main(tiny_run(folder, *more, "--eval-interval", "6")) == 0
    return folder


def test_a_card_without_bf16_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    card = pretend_card(monkeypatch, "Tesla V100", (7, 0))
    args = ["--checkpoint", "runs/x", "--precision", "bf16"]
    cfg = parse_cli(EvaluateConfig, args, "fastgn.evaluate")
    with pytest.raises(UserError, match="--precision bf16 needs .* 8.0.*: use --precision fp32"):
        evaluate.run(cfg, World(0, 1, card))


def test_table_json_and_order(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    output = tmp_path / "evaluation.json"
    (last,) = (run / "checkpoints").glob("update_*174.pt")
    args = ["--checkpoint", str(run), str(last), "--eps", "1/255", "0.05", "--num-images", "64"]
    attack_names = ["--attacks", "clean", "fgsm", "pgd-5"]
    assert evaluate.main([*args, *attack_names, "--output", str(output)]) == 0
    out = capsys.readouterr().out
    record = json.loads(output.read_text())
    results = record["models"][0]["results"]
    assert (
        record["models"][0]["results"][0]["accuracy"]
        == record["models"][1]["results"][0]["accuracy"]
    )
    assert [(r["attack"], round(r["eps"], 4)) for r in results] == [
        ("clean", 0.0),
        ("fgsm", 0.0039),
        ("fgsm", 0.05),
        ("pgd-5", 0.0039),
        ("pgd-5", 0.05),
        ("worst case", 0.0039),
        ("worst case", 0.05),
    ]
    accuracy = [r["accuracy"] for r in results]
    assert accuracy[0] > 0.4 and accuracy[0] >= accuracy[3] >= accuracy[4]
    assert record["models"][0]["subset"] == "first 64 of 360"
    assert record["norm"] == "Linf" and "versions" in record
    for word in ("1/255", "0.05", "fgsm", f"{accuracy[4]:.1%}", "eps in 0..1 pixel units"):
        assert word in out


CPU = torch.device("cpu")


def trained_and_images(run: Path, count: int) -> tuple:
    cfg = evaluate.EvaluateConfig(checkpoint=(str(run),), num_images=count)
    trained = load_trained(str(run), CPU)
    return trained.model, *next(iter(selection.select_images(trained, cfg, CPU)))


def record_of(output: Path, *args: str) -> dict:
    assert evaluate.main([*args, "--output", str(output)]) == 0
    return json.loads(output.read_text())


def test_autoattack_is_its_authors_image_for_image(run: Path, tmp_path: Path) -> None:
    """The standard version, at a radius where few images stay, so that it ends in seconds."""
    model, images, labels = trained_and_images(run, 16)
    theirs, _ = AutoAttack(model, eps=0.3, seed=0).run_standard_evaluation(images, labels)
    options = {"eps": 0.3, "batch_size": 16, "seed": 0, "device": CPU}
    assert torch.equal(attacks.autoattack(model, images, labels, **options), theirs)
    args = ["--checkpoint", str(run), "--num-images", "16", "--batch-size", "16", "--eps", "0.3"]
    record = record_of(tmp_path / "e.json", *args, "--attacks", "autoattack")
    (row,) = record["models"][0]["results"]
    right = (model(theirs).argmax(1) == labels).tolist()
    assert [bit == "1" for bit in row["correct"]] == right
    assert sum(right) < int((model(images).argmax(1) == labels).sum())


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_its_attacks_one_by_one_are_its_authors(run: Path, tmp_path: Path, norm: str) -> None:
    eps = {"Linf": 0.005, "L2": 0.1}[norm]
    model, images, labels = trained_and_images(run, 16)
    direct = AutoAttack(
        model, norm=norm, eps=eps, seed=3, version="custom", attacks=["apgd-ce"]
    ).run_standard_evaluation(images, labels)[0]
    args = ["--checkpoint", str(run), "--num-images", "16", "--eps", str(eps), "--norm", norm]
    record = record_of(tmp_path / "e.json", *args, "--attacks", "apgd-ce", "--seed", "3")
    assert record["norm"] == norm
    expected = (model(direct).argmax(1) == labels).tolist()
    bits = record["models"][0]["results"][0]["correct"]
    assert [bit == "1" for bit in bits] == expected and 0 < sum(expected) < 16


@pytest.mark.parametrize(
    ("norm", "named", "step"),
    [
        ("Linf", "", 2.5 * 0.05 / 7),
        ("L2", "", 2.5 * 1.0 / 7),
        ("Linf", "@1/255", 1 / 255),
        ("Linf", "@eps/4", 0.05 / 4),
        ("L2", "@0.3", 0.3),
    ],
)
def test_pgd_against_a_loop_image_by_image(run: Path, norm: str, named: str, step: float) -> None:
    """Madry's PGD as its text has it, from the same start, one image after the other."""
    model, images, labels = trained_and_images(run, 6)
    eps, steps = {"Linf": 0.05, "L2": 1.0}[norm], 7
    attacker = Attacker(norm, 0, 6, CPU)
    got = attacker.attack(model, images, labels, range(6), f"pgd-{steps}{named}", eps)
    (start,) = attacker.draw_starts(range(6), images.shape[1:], eps, 1)
    for i in range(6):
        x, y = images[i : i + 1], labels[i : i + 1]
        at = (x + start[i]).clamp(0, 1)
        for _ in range(steps):
            at.requires_grad_()
            loss = torch.nn.functional.cross_entropy(model(at), y)
            (g,) = torch.autograd.grad(loss, at)
            with torch.no_grad():
                if norm == "Linf":
                    at = (at + step * g.sign()).clamp(x - eps, x + eps)
                else:
                    at = at + step * g / g.norm()
                    at = x + (at - x) * min(1.0, eps / float((at - x).norm()))
                at = at.clamp(0, 1)
        assert torch.allclose(got[i : i + 1], at, atol=1e-5)


def test_restarts_and_the_margin(run: Path, tmp_path: Path) -> None:
    """More starts fool no fewer; the worst case is every attack's at once, image by image."""
    args = ["--checkpoint", str(run), "--num-images", "96", "--eps", "0.02"]
    names = ["clean", "pgd-3", "pgd-3x4", "pgd-3-margin"]
    results = record_of(tmp_path / "e.json", *args, "--attacks", *names)["models"][0]["results"]
    rows = {r["attack"]: r["correct"] for r in results}
    assert [*rows] == [*names, outcomes.WORST]
    assert all(b <= a for a, b in zip(rows["pgd-3"], rows["pgd-3x4"], strict=True))
    for i, bit in enumerate(rows[outcomes.WORST]):
        assert (bit == "1") == all(rows[name][i] == "1" for name in names[1:])
    assert rows["pgd-3"] != rows["clean"] != rows["pgd-3-margin"]


@pytest.mark.slow
def test_successive_attacks_get_what_those_before_them_left(run: Path, tmp_path: Path) -> None:
    """Each radius has its own survivors, and the last attack's are the worst case of all."""
    seen: dict[tuple[str, float], int] = {}
    attack = Attacker.attack

    def counted(self, model, images, labels, ids, name, eps):
        seen[name, eps] = len(ids)
        return attack(self, model, images, labels, ids, name, eps)

    names = ["pgd-3", "pgd-3-margin", "apgd-ce+t"]
    args = ["--checkpoint", str(run), "--num-images", "32", "--eps", "0.005", "0.01"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Attacker, "attack", counted)
        record = record_of(tmp_path / "e.json", *args, "--attacks", *names, "--successive")
    results = record["models"][0]["results"]
    left = {(r["attack"], r["eps"]): r["correct"].count("1") for r in results}
    texts = {(r["attack"], r["eps"]): r["correct"] for r in results}
    for eps in (0.005, 0.01):
        assert seen["pgd-3-margin", eps] == left["pgd-3", eps] < seen["pgd-3", eps]
        assert seen["apgd-ce+t", eps] == left["pgd-3-margin", eps]
        assert texts["apgd-ce+t", eps] == texts[outcomes.WORST, eps]


@pytest.mark.slow
def test_apgd_ce_and_t_are_both_run(run: Path) -> None:
    assert AUTOATTACK_PARTS["apgd-ce+t"] == ("apgd-ce", "apgd-t")
    model, images, labels = trained_and_images(run, 32)
    attacker, ids = Attacker("Linf", 0, 32, CPU), range(32)
    clean = attacker.find_correct(model, images, labels, ids, "clean", 0.0, None)
    left = clean
    for name in ("apgd-ce", "apgd-t"):
        left = attacker.find_correct(model, images, labels, ids, name, 0.01, left)
    assert left == attacker.find_correct(model, images, labels, ids, "apgd-ce+t", 0.01, clean)
    assert 0 < sum(left) < sum(clean)


def test_a_killed_evaluation_goes_on(run: Path, tmp_path: Path, monkeypatch) -> None:
    """Only what is missing is attacked again, and nothing of it is left; other settings start
    anew."""
    args = ["--checkpoint", str(run), "--num-images", "40", "--batch-size", "10", "--eps", "0.02"]
    args += ["--attacks", "clean", "pgd-3"]
    whole = record_of(tmp_path / "whole.json", *args)
    calls: list[tuple[str, float]] = []
    real = Attacker.find_correct

    def stop_at(limit: int):
        def correct(self, model, images, labels, ids, name, eps, clean):
            if len(calls) == limit:
                raise KeyboardInterrupt
            calls.append((name, eps))
            return real(self, model, images, labels, ids, name, eps, clean)

        return correct

    monkeypatch.setattr(Attacker, "find_correct", stop_at(5))
    assert evaluate.main([*args, "--output", str(tmp_path / "e.json")]) == 130
    assert not (tmp_path / "e.json").exists()
    monkeypatch.setattr(Attacker, "find_correct", stop_at(100))
    before = len(calls)
    record = record_of(tmp_path / "e.json", *args)
    assert len(calls) - before == 3, "8 in all, 5 of them saved"
    for one, other in zip(record["models"], whole["models"], strict=True):
        for row in one["results"] + other["results"]:
            del row["seconds"]
        assert one == other
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_a_list_of_images(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    wanted = [7, 3, 200]
    file = tmp_path / "list.txt"
    file.write_text("".join(f"{i}\n" for i in wanted))
    args = ["--checkpoint", str(run), "--attacks", "clean"]
    everything = record_of(tmp_path / "all.json", *args)["models"][0]["results"][0]["correct"]
    model = record_of(tmp_path / "e.json", *args, "--image-list", str(file))["models"][0]
    assert model["ids"] == wanted and model["subset"] == "3 listed ones of 360"
    assert model["results"][0]["correct"] == "".join(everything[i] for i in wanted)
    for text, expected in (("7\n7\n", "twice"), ("360\n", "called 360"), ("", "is empty")):
        file.write_text(text)
        assert evaluate.main([*args, "--image-list", str(file)]) == 2
        assert expected in capsys.readouterr().err


class Named:
    """A split whose images have names alone."""

    names = ("/data/val/ant/a.png", "/data/val/ant/ümlaut b.png", "/data/val/bee/c.png")

    def __len__(self) -> int:
        return len(self.names)

    def name(self, index: int) -> str:
        return self.names[index]


@pytest.mark.parametrize("start", ["", "\ufeff"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("last", ["", "{end}", "{end}{end}", "{end}  {end}"])
def test_a_list_of_images_as_windows_writes_it(
    start: str, end: str, last: str, tmp_path: Path
) -> None:
    """With a byte-order mark, with carriage returns, and with or without blank lines at its end."""
    file = tmp_path / "list.txt"
    text = start + end.join(("bee/c.png", "ant/ümlaut b.png", "0")) + last.format(end=end)
    file.write_bytes(text.encode())
    assert selection.find_listed_images(str(file), Named()) == [2, 1, 0]
    file.write_bytes(text.encode().replace(b"c.png", b"d.png"))
    with pytest.raises(evaluate.UserError, match=r"no validation image is called bee/d\.png:"):
        selection.find_listed_images(str(file), Named())
    file.write_bytes((start + last.format(end=end)).encode())
    with pytest.raises(evaluate.UserError, match="is empty"):
        selection.find_listed_images(str(file), Named())


def test_a_list_of_images_in_utf_16_is_named(tmp_path: Path) -> None:
    file = tmp_path / "list.txt"
    file.write_text("0\n", encoding="utf-16")
    with pytest.raises(evaluate.UserError, match="is text in UTF-16: save it as UTF-8"):
        selection.find_listed_images(str(file), Named())


def test_robustbenchs_list_of_imagenet() -> None:
    """5,000 different images, found by their names whatever folder they lie in."""

    class Split:
        def __len__(self) -> int:
            return 50_000

        def name(self, index: int) -> str:
            return f"/data/val/n0{index % 1000}/ILSVRC2012_val_{50_000 - index:08d}.JPEG"

    chosen = selection.find_listed_images("robustbench-imagenet", Split())
    assert len(set(chosen)) == 5000
    assert [50_000 - i for i in chosen[:3]] == [15253, 20685, 39611]


class Scaled(torch.nn.Module):
    def __init__(self, inner: torch.nn.Module, change):
        super().__init__()
        self.inner, self.change = inner, change

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.change(self.inner(images))


def test_models_that_cannot_be_judged(run: Path) -> None:
    model, images, labels = trained_and_images(run, 64)
    assert check_model(model, images, labels) == []
    cases = {
        "probabilities": lambda z: z.softmax(1),
        "not finite": lambda z: z / 0,
        "each time": lambda z: z + torch.randn_like(z),
        "cut off from the images": lambda z: z.detach(),
    }
    for expected, change in cases.items():
        with pytest.raises(evaluate.UserError, match=expected):
            check_model(Scaled(model, change).eval(), images, labels)
    with pytest.raises(evaluate.UserError, match="training mode"):
        check_model(Scaled(model, lambda z: z), images, labels)
    (doubt,) = check_model(Scaled(model, lambda z: z.roll(1, 1)).eval(), images, labels)
    assert "by chance" in doubt


def test_bf16_gradients_and_the_fp32_verdict(run: Path, tmp_path: Path) -> None:
    args = ["--checkpoint", str(run), "--num-images", "64", "--eps", "0.02"]
    args += ["--attacks", "clean", "pgd-5", "--precision"]
    fp32, bf16 = (
        record_of(tmp_path / f"{p}.json", *args, p)["models"][0]["results"]
        for p in ("fp32", "bf16")
    )
    assert fp32[0]["correct"] == bf16[0]["correct"]
    assert abs(fp32[1]["accuracy"] - bf16[1]["accuracy"]) < 0.1


@pytest.mark.slow
def test_compiled_gradients_and_the_eager_verdict(run: Path, tmp_path: Path) -> None:
    """Though the number of images that are left to attack differs from batch to batch."""
    args = ["--checkpoint", str(run), "--num-images", "48", "--batch-size", "16", "--eps", "0.02"]
    args += ["--attacks", "clean", "pgd-3"]
    eager = record_of(tmp_path / "eager.json", *args)["models"][0]["results"]
    compiled = record_of(tmp_path / "c.json", *args, "--compile")["models"][0]["results"]
    assert eager[0]["correct"] == compiled[0]["correct"]
    differ = sum(a != b for a, b in zip(eager[1]["correct"], compiled[1]["correct"], strict=True))
    assert differ <= 1
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0


def test_weights_of_elsewhere(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """A state dict in timm's keys, with what describes it."""
    trained = load_trained(str(run), CPU)
    file = tmp_path / "weights.pth"
    torch.save({"state_dict": trained.model.backbone.state_dict()}, file)
    arch = trained.cfg.architecture
    args = ["--attacks", "clean", "--num-images", "64"]
    own = record_of(tmp_path / "own.json", "--checkpoint", str(run), *args)["models"][0]
    foreign = ["--checkpoint", str(file), "--data", "digits", *args]
    assert evaluate.main([*foreign, "--mean", "0", "0", "0"]) == 2
    assert "add --model NAME" in capsys.readouterr().err
    mean = [str(float(x)) for x in trained.model.mean.flatten()]
    std = [str(float(x)) for x in trained.model.std.flatten()]
    described = ["--model", arch.model, "--img-size", str(trained.model.img_size)]
    described += ["--mean", *mean, "--std", *std]
    described += ["--activation", arch.activation] if arch.activation else []
    described += ["--model-kwargs", *arch.model_kwargs] if arch.model_kwargs else []
    got = record_of(tmp_path / "e.json", *foreign, *described)["models"][0]
    assert got["results"][0]["correct"] == own["results"][0]["correct"]


class WrongInBfloat16(torch.nn.Module):
    """Under autocast it calls everything a 0, and notes how many images it sees."""

    def __init__(self, inner: torch.nn.Module):
        super().__init__()
        self.inner = inner
        self.seen: list[int] = []

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits = self.inner(images)
        if not torch.is_autocast_enabled("cpu"):
            return logits
        self.seen.append(len(images))
        return logits * 0 + torch.eye(logits.shape[1])[0]


def test_who_is_attacked_again_is_judged_in_fp32(run: Path) -> None:
    model, images, labels = trained_and_images(run, 64)
    plain = Attacker("Linf", 0, 64, CPU)
    clean = plain.find_correct(model, images, labels, range(64), "clean", 0, None)
    bf16 = Attacker("Linf", 0, 64, CPU, "bf16")
    wrong = WrongInBfloat16(model).eval()
    bf16.find_correct(wrong, images, labels, range(64), "pgd-2x2", 1e-4, clean)
    assert wrong.seen[:2] == [sum(clean)] * 2
    assert len(wrong.seen) == 4 and wrong.seen[3] >= sum(clean) - 2, "a ball of 1e-4 fools nobody"


def test_what_decides_outcomes_names_the_parts(run: Path, tmp_path: Path) -> None:
    trained = load_trained(str(run), CPU)

    def key(trained=trained, **changes) -> str:
        cfg = evaluate.EvaluateConfig(checkpoint=(str(run),), **{"num_images": 8} | changes)
        images = selection.select_images(trained, cfg, CPU)
        return Parts(
            tmp_path / "e.json", outcomes.describe_inputs(trained, images, cfg, "cpu")
        ).folder.name

    assert key() == key(eps=(0.1,), attacks=("clean",)), "these name the parts within"
    found = {key(), key(seed=1), key(num_images=9), key(norm="L2"), key(precision="bf16")}
    found.add(key(batch_size=4))
    found |= {key(successive=True), key(successive=True, attacks=("pgd-3", "fgsm"))}
    other = load_trained(str(run), CPU)
    other.model.mean += 0.01
    found.add(key(other))
    other = load_trained(str(run), CPU)
    next(other.model.parameters()).data[0] += 1e-3
    found.add(key(other))
    assert len(found) == 10


def test_doubts_outlast_a_kill(run: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(outcomes, "check_model", lambda *_: ["a doubt"])
    args = ["--checkpoint", str(run), "--num-images", "20", "--batch-size", "10", "--eps", "0.02"]
    args += ["--attacks", "clean", "fgsm"]
    real = Attacker.find_correct
    calls = []

    def once(self, *more):
        if calls:
            raise KeyboardInterrupt
        calls.append(1)
        return real(self, *more)

    monkeypatch.setattr(Attacker, "find_correct", once)
    assert evaluate.main([*args, "--output", str(tmp_path / "e.json")]) == 130
    monkeypatch.setattr(Attacker, "find_correct", real)
    monkeypatch.setattr(outcomes, "check_model", lambda *_: ["another"])
    assert record_of(tmp_path / "e.json", *args)["models"][0]["warnings"] == ["a doubt"]


@pytest.mark.parametrize("flag", ["--output", "--report", "--curve", "--picture"])
def test_what_cannot_be_written_is_said_first(
    flag: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    args = ["--checkpoint", str(run), "--eps", "0.01", "0.02", "--attacks", "clean", "pgd-2"]
    assert evaluate.main([*args, flag, str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert (
        said.startswith(f"fastgn.evaluate: error: {tmp_path} is a folder") and "\n" not in said[:-1]
    )
    (tmp_path / "file").touch()
    assert evaluate.main([*args, flag, str(tmp_path / "file" / "below")]) == 2
    assert "not a folder that can be written to" in capsys.readouterr().err


def test_few_classes_have_no_dlr_loss() -> None:
    evaluate.check_few_classes(4, ("autoattack",))
    evaluate.check_few_classes(2, ("apgd-ce", "square", "pgd-5-margin"))
    for name in ("autoattack", "apgd-dlr", "apgd-t", "apgd-ce+t"):
        message = f"{re.escape(name)} uses the DLR loss, which needs"
        with pytest.raises(evaluate.UserError, match=message):
            evaluate.check_few_classes(3, (name,))


def test_few_classes_are_found_before_the_images_are_read(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    three = dataclasses.replace(load_trained(str(run), CPU), classes=("a", "b", "c"))
    monkeypatch.setattr(evaluate, "load_trained", lambda *_: three)
    monkeypatch.setattr(evaluate, "select_images", lambda *_: pytest.fail("images were read"))
    args = ["--checkpoint", str(run), "--output", str(tmp_path / "e.json")]
    assert evaluate.main(args) == 2
    said = capsys.readouterr().err
    assert "--attacks autoattack uses the DLR loss" in said
    monkeypatch.setattr(evaluate, "load_validation", lambda *_: (None, three.classes))
    weights = [*args, "--model", "resnet18", "--data", "digits"]
    assert evaluate.main(weights) == 2
    assert capsys.readouterr().err == said
    line = said.partition(": use --attacks ")[2]
    evaluate.check_few_classes(2, line.split())
    docs = (Path(__file__).parents[1] / "docs" / "evaluation.md").read_text()
    assert f"--attacks {line.strip()}`" in docs


@pytest.fixture(scope="module")
def validation_alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with val/<class>/<image> and nothing else: ten classes of three images."""
    root = tmp_path_factory.mktemp("val_alone")
    generator = np.random.default_rng(0)
    for label in range(10):
        folder = root / "val" / f"c{label}"
        folder.mkdir(parents=True)
        for number in range(3):
            pixels = generator.integers(0, 256, (40, 48, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{number}.png")
    return root


def foreign_args(folder: Path, root: Path) -> list[str]:
    """An untrained network's weights, evaluated on a folder."""
    model = timm.create_model("vit_tiny_patch16_224", num_classes=10, img_size=32)
    file = folder / "weights.pth"
    torch.save(model.state_dict(), file)
    args = ["--checkpoint", str(file), "--model", "vit_tiny_patch16_224", "--data-dir", str(root)]
    return [*args, "--img-size", "32", "--attacks", "clean", "--workers", "0"]


def test_validation_images_are_enough(validation_alone: Path, tmp_path: Path) -> None:
    """And the crop is timm's, where the command line says nothing."""
    args = foreign_args(tmp_path, validation_alone)
    found = record_of(tmp_path / "e.json", *args)["models"][0]
    assert found["images"] == 30 and found["method"] == "unknown"
    cfg = evaluate.parse_cli(evaluate.EvaluateConfig, args, "fastgn.evaluate")
    classes = tuple(f"c{i}" for i in range(10))
    for given, expected in ((None, 0.9), (0.7, 0.7)):  # its own is 0.9
        own = dataclasses.replace(cfg, crop_pct=given)
        trained = load_bare_weights(args[1], own, classes, CPU)
        assert trained.cfg.augmentation.crop_pct == expected


def test_an_image_is_named_by_as_much_as_it_takes(
    validation_alone: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    args = foreign_args(tmp_path, validation_alone)
    names = tmp_path / "names.txt"
    names.write_text("c3/1.png\nc0/2.png\n5\n")
    found = record_of(tmp_path / "e.json", *args, "--image-list", str(names))["models"][0]
    assert found["ids"] == ["c3/1.png", "c0/2.png", "c1/2.png"]
    for text, expected in (
        ("1.png\n", "10 validation images are called 1.png: write more of the path"),
        ("c3/1.png\nval/c3/1.png\n", "names the image c3/1.png twice: remove one of the lines"),
        ("3/1.png\n", "no validation image is called 3/1.png"),
        ("\n", "is empty"),
    ):
        names.write_text(text)
        assert evaluate.main([*args, "--image-list", str(names)]) == 2
        assert expected in capsys.readouterr().err


def test_images_are_the_same_whatever_their_folder_is_called(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "link").symlink_to("images")

    def place(folder: str, **more: str) -> tuple:
        source = DatasetConfig(data_dir=str(tmp_path / folder), **more)
        return selection.locate_images(source)

    assert place("images") == place("link") == place("images/../link/", data="imagefolder")
    assert len({place("images"), place("images", val_split="test"), place("other")}) == 3
    assert place("images", data="cifar10") == place("images", data="cifar10", val_split="test")


def rewrite_export(run: Path, path: Path, classes: tuple[str, ...], **options: str | None) -> str:
    """Writes the export of a run again, with other classes and other options for the data."""
    saved = read_saved(run / "model.safetensors")
    config = saved.config.replace_group("dataset", options)
    export_weights(path, saved.weights, ExportHeader(config.to_toml(), list(classes)))
    return str(path)


def test_checkpoints_of_the_same_images_are_compared(
    run: Path, validation_alone: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """--data need not be written in the same way in both, but the images must be the same."""
    classes, folder = tuple(f"c{i}" for i in range(10)), str(validation_alone)
    digits = tuple(map(str, range(10)))
    export = functools.partial(rewrite_export, run)
    named = export(tmp_path / "a.safetensors", classes, data="imagefolder", data_dir=folder)
    implied = export(tmp_path / "b.safetensors", classes, data=None, data_dir=f"{folder}/.")
    other = export(tmp_path / "c.safetensors", digits, data=None, data_dir=None)
    args = ["--attacks", "clean", "--workers", "0"]
    models = record_of(tmp_path / "e.json", "--checkpoint", named, implied, *args)["models"]
    assert [model["images"] for model in models] == [30, 30]
    assert evaluate.main(["--checkpoint", named, implied, other, *args]) == 2
    assert (
        f"trained on different data ({named}: --data imagefolder --data-dir {folder} --val-split "
        f"val; {other}: --data digits)"
    ) in capsys.readouterr().err


def test_picture_has_the_columns_of_all_models(run: Path, tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    args = ["--checkpoint", str(run), str(run), "--attacks", "clean", "--num-images", "32"]
    args += ["--eps", "0.004", "--picture", str(path), "--picture-images", "12"]
    assert evaluate.main([*args, "--output", str(tmp_path / "e.json")]) == 0
    with Image.open(path) as picture:
        assert picture.size[0] > 700 and picture.size[1] > 1500


@pytest.mark.slow
def test_the_report_holds_it_all(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    report, curve = tmp_path / "report.html", tmp_path / "curve.png"
    args = ["--checkpoint", str(run), "--num-images", "24", "--attacks", "clean", "pgd-2"]
    args += ["--eps", "1/255", "4/255", "8/255", "--statistics", "--sanity"]
    args += ["--analysis-images", "6", "--report", str(report), "--curve", str(curve)]
    model = record_of(tmp_path / "e.json", *args)["models"][0]
    text = report.read_text()
    for row in model["results"]:
        assert f"{row['accuracy']:.1%}" in text
    assert text.count("data:image/png;base64,") >= 3
    assert {"pass"} < {c["verdict"] for c in model["sanity"]} | {"warn"}
    assert model["statistics"]["images"] == 6
    (*_, (epoch, norm)) = model["norm_by_epoch"]
    assert epoch == 6 and norm > 0
    assert norm == pytest.approx(model["statistics"]["l1_mean"], rel=1e-3)
    with Image.open(curve) as picture:
        assert picture.size[0] > 300
    assert "PASS" in capsys.readouterr().out


def test_a_last_checkpoint_stands_in_for_the_export(run: Path) -> None:
    device = torch.device("cpu")
    from_export = load_trained(str(run), device).model.state_dict()
    last = sorted((run / "checkpoints").glob("update_*.pt"))[-1]
    from_checkpoint = load_trained(str(last), device).model.state_dict()
    assert all(torch.equal(a, from_checkpoint[k]) for k, a in from_export.items())
