"""Where a value comes from, what is refused, and what the recipes say."""

import ast
import dataclasses
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from fastgn.config import FIELDS, GROUPS, Config, groups, initial_file, load_recipe, recipe_names
from fastgn.config.cli import check_command_line, parse_config
from fastgn.config.pairs import model_kwargs
from fastgn.errors import UserError
from fastgn.objectives import options
from fastgn.optim import compute_peak_lr


def refused(*args: str) -> str:
    """What is said about a command line that is not taken: one line, tyro's box taken off."""
    with pytest.raises(UserError) as caught:
        parse_config(args)
    line = str(caught.value)
    assert "\n" not in line and not set("│╭╰─") & set(line)
    return line


# --------------------------------------------------------------------------------------- where from


def test_the_defaults_are_the_papers_objective():
    cfg = parse_config([])
    assert cfg == Config()
    gradnorm = cfg.objective.gradnorm
    assert cfg.objective.method == "gradnorm"
    assert (gradnorm.ce_weight, gradnorm.gn_weight) == (0.8, 1.2)
    assert (gradnorm.eps, gradnorm.sigma, cfg.ramp_epochs) == (4 / 255, 0.225, 5.0)


def test_the_command_line_wins_over_the_recipe_and_the_recipe_over_the_defaults():
    name = "paper_resnet50_gelu_gradnorm"
    recipe = load_recipe(name)
    assert recipe.optimizer.epochs == 83 and Config().optimizer.epochs == 100
    assert parse_config(["--recipe", name]).optimizer.epochs == 83
    cfg = parse_config(["--epochs", "7", "--recipe", name, "--eps", "2/255"])
    assert (cfg.optimizer.epochs, cfg.objective.gradnorm.eps) == (7, 2 / 255)
    assert cfg.flat() == recipe.flat() | {"epochs": 7, "eps": 2 / 255, "recipe": name}


def test_the_command_line_can_unset_what_a_recipe_sets():
    name = "paper_resnet50_gelu_gradnorm"
    cfg = parse_config(["--recipe", name, "--clip-grad", "None"])
    assert load_recipe(name).step.clip_grad == 1.0
    assert cfg.step.clip_grad is None
    assert Config.from_toml(cfg.to_toml()) == cfg


@pytest.mark.parametrize("spelling", [["--recipe={}"], ["--recipe", "{}"]])
def test_a_recipe_can_be_a_file(spelling, tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('eps = "8/255"\nmodel-kwargs = ["depths=(2, 2)"]\nmean = [0, 0.5, 1]\n')
    cfg = parse_config([part.format(path) for part in spelling])
    assert cfg.objective.gradnorm.eps == 8 / 255
    assert cfg.architecture.model_kwargs == ("depths=(2, 2)",)
    assert cfg.architecture.mean == (0.0, 0.5, 1.0)


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_round_trips(name):
    cfg = load_recipe(name)
    assert cfg != Config()
    assert Config.from_toml(cfg.to_toml()) == cfg
    assert parse_config(["--recipe", name, "--output", "x"]).run.output == "x"


def test_a_config_far_from_the_defaults_round_trips():
    args = "--mean 0.1 0.2 0.3 --std 1 1 1 --model-kwargs a=1 b='x' --no-model-ema --eval-eps 1/255"
    args += " --resume auto --output runs/é --lr 1e-7 --opt-betas 0.5 0.75 --hflip 0 --scale 0.5 1"
    args += " --kernels reference"
    cfg = parse_config(args.split())
    assert cfg.optimizer.model_ema is False and cfg.optimizer.lr == 1e-7
    assert cfg.step.kernels == "reference"
    assert Config.from_toml(cfg.to_toml()) == cfg


@pytest.mark.parametrize("name", ["eps", "attack_eps", "attack_step", "eval_eps", "lr", "reprob"])
def test_fractions_on_the_command_line_and_in_recipes(name):
    """Every option that takes any number takes a fraction."""
    args = [f"--{name.replace('_', '-')}", "4/255"]
    by_flag = parse_config(args)
    by_recipe = Config.from_toml(f'{name} = "4/255"')
    assert by_flag == by_recipe
    assert by_flag.flat()[name] == 4 / 255
    assert Config.from_toml(f"{name} = 0.5").flat()[name] == 0.5
    assert Config.from_toml(f"{name} = 1").flat()[name] == 1.0


def test_resume_takes_the_runs_config(tmp_path):
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    saved = load_recipe("quickstart_gradnorm").replace(epochs=7, output="elsewhere")
    (run / "config.toml").write_text(saved.to_toml())
    checkpoint = run / "checkpoints" / "update_00000001.pt"
    checkpoint.touch()
    for where in (run, checkpoint, run / "checkpoints"):
        expected = saved.replace(resume=str(where), output=str(run))  # wherever it was moved to
        assert parse_config(["--resume", str(where)]) == expected
        assert parse_config([f"--resume={where}"]) == expected
    longer = parse_config(["--resume", str(run), "--epochs", "9", "--output", "other"])
    assert (longer.optimizer.epochs, longer.run.output) == (9, "other")


def test_resume_auto_and_resume_with_a_recipe_take_no_runs_config(tmp_path):
    assert parse_config(["--resume", "auto", "--output", str(tmp_path)]).optimizer.epochs == 100
    args = ["--recipe", "paper_resnet50_gelu_gradnorm", "--resume", str(tmp_path)]
    assert parse_config(args).optimizer.epochs == 83


def test_resuming_what_is_no_run(tmp_path):
    with pytest.raises(UserError, match=f"--resume {tmp_path}: there is no run in it"):
        parse_config(["--resume", str(tmp_path)])


# ---------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("args", "near"),
    [
        ("--recipe swin_b", ["swin_b_pag", "swin_b_edge", "swin_b_trades", "swin_b_gradnorm"]),
        ("--recipe SWIN_B_PAG", ["swin_b_pag"]),
        ("--sched 1", ["--schedule", "--sched-on-updates"]),
        ("--warmup 1", ["--warmup-lr", "--warmup-epochs", "--model-ema-warmup"]),
        ("--learning-rate 1", ["--lr"]),
        ("--wd 1", ["--weight-decay"]),
        ("--batch_sise 1", ["--batch-size"]),
        ("--gn-norm l3", ["l1", "l2"]),
    ],
)
def test_the_nearest_names_come_first(args, near):
    found = re.findall(r"'([^']*)'", refused(*args.split()).partition("did you mean")[2])
    assert found[: len(near)] == near and len(found) <= 5
    assert len(found) == 5 or args != "--recipe swin_b"


@pytest.mark.parametrize("flag", ["--nosuch", "--x", "--zzzzzz"])
def test_nothing_is_suggested_for_what_is_like_nothing(flag):
    line = refused(flag, "1")
    assert re.fullmatch(rf"{flag} is unknown: none of the \d+ valid names is similar", line)


def test_unknown_names_come_with_the_nearest(tmp_path):
    line = refused("--recipe", "quickstart_gradnrm")
    assert line == "--recipe 'quickstart_gradnrm': did you mean 'quickstart_gradnorm'?"
    for args in (["--weight-decy", "0.1"], ["--weight-decy=0.1"]):
        assert refused(*args) == "--weight-decy is unknown: did you mean '--weight-decay'?"
    assert refused("--method", "gradnrom") == "--method 'gradnrom': did you mean 'gradnorm'?"
    path = tmp_path / "mine.toml"
    path.write_text("weight_decy = 0.1")
    assert refused("--recipe", str(path)) == (
        f"--recipe {path}: unknown key 'weight_decy': did you mean 'weight_decay'?"
    )


def test_a_name_far_from_all_lists_what_there_is():
    line = refused("--recipe", "zzz")
    assert all(name in line for name in recipe_names())
    line = refused("--precision", "zzz")
    assert "'zzz'" in line and "fp32" in line and "bf16" in line


REFUSED = [
    ("--model-kwargs", "depth", "--model-kwargs 'depth' should be key=value"),
    ("--pretrained --initial-checkpoint", "w.pt", "--pretrained and --initial-checkpoint both"),
    ("--global-batch-size 8 --grad-accum-steps", "2", "give one of the two"),
    ("--scale", "0.9 0.1", "--scale 0.9 0.1: give the smaller share first"),
    (
        "--eps",
        "4",
        "it must be at least 0 and at most 1: pixels are in 0..1",
    ),
    ("--eps", "nan", "--eps nan is out of range"),
    ("--eps", "-1/255", "--eps -1/255 is out of range"),
    ("--gn-channel-weights", "1 -1 1", "--gn-channel-weights -1 is out of range"),
    ("--gn-channel-weights", "0 0 0", "--gn-channel-weights 0 0 0 leaves no gradient"),
    (
        "--gn-share",
        "0",
        "it must be above 0 and at most 1: for no penalty use",
    ),
    ("--gn-norm", "l3", "--gn-norm 'l3': did you mean"),
    ("--method trades --attack-select", "paper", "with --method trades use best or last"),
    ("--method trades --schedule", "subset", "but --method trades has no penalty: use exact"),
    (
        "--method gradnorm+fgsm --schedule",
        "lazy",
        "some updates of --method gradnorm+fgsm have the",
    ),
    (
        "--method edge --schedule",
        "finite-difference",
        "--method edge has another penalty: use exact",
    ),
    ("--gn-attacked --method", "edge", "--gn-attacked is an option of --method gradnorm: leave it"),
    (
        "--gn-attacked --gn-start",
        "2/255",
        "--gn-start 2/255 and --gn-attacked both move the images",
    ),
    ("--attack-ramp-epochs", "-1", "--attack-ramp-epochs -1 is out of range"),
    ("--edge-rms", "pixel", "--edge-rms 'pixel': "),
    ("--edge-of", "class", "--edge-of 'class': "),
    ("--gn-norm l2 --schedule", "central-difference", "only the L1 norm of the loss's gradient"),
    ("--gn-of logit --schedule", "finite-difference", "only the L1 norm of the loss's gradient"),
    ("--method", "trade", "--method 'trade': did you mean 'trades'?"),
    ("--compile on --schedule", "exact-eager", "--schedule exact-eager is never compiled"),
    ("--cuda-graphs on --compile", "off", "--cuda-graphs on needs a compiled step"),
    ("--sync-bn --cuda-graphs", "on", "--cuda-graphs on cannot replay what --sync-bn sends"),
    ("--fd-step", "0", "--fd-step 0 is out of range"),
    ("--fd-step", "1e-7", "--fd-step 1e-07 is out of range"),
    ("--fd-step", "inf", "--fd-step inf is out of range"),
    ("--schedule auto --accumulation", "sum", "use --accumulation mean, or --schedule exact"),
    ("--schedule auto --activation-memory-budget", "0.5", "--schedule auto chooses the activation"),
    ("--method pgd_at --schedule", "lazy", "--schedule lazy is a way to compute a penalty"),
    (
        "--ce-weight 0 --schedule",
        "central-difference",
        "use a weight (--ce-weight) of at least 1e-7",
    ),
    (
        "--clip-grad",
        "0",
        "it must be above 0 and at most 1e+09: leave it out",
    ),
    ("--epochs", "0", "--epochs 0 is out of range: it must be at least 1 and at most 100000"),
    ("--lr 1e-6 --min-lr", "1e-5", "--min-lr 1e-05 is above --lr 1e-06: leave --min-lr out"),
    ("--epochs 30 --keep-epochs", "10 50", "--keep-epochs 50 is after the last epoch, --epochs 30"),
    ("--keep-epochs", "0", "--keep-epochs 0 is out of range"),
    ("--method", "gradnrom", "--method 'gradnrom': did you mean 'gradnorm'?"),
    ("--loader torch --aa", "rand-zzz", "--aa rand-zzz: section 'zzz' should be one of m, n, p, "),
    ("--loader torch --aa", "rand-mnan", "--aa rand-mnan: section 'mnan' should be one of m, n"),
    ("--loader torch --aa", "rand-m9-", "--aa rand-m9-: section '' should be one of m, n, p, "),
    ("--loader", "dalli", "--loader 'dalli': did you mean 'dali'?"),
    ("--lerning-rate", "1", "--lerning-rate is unknown: did you mean '--lr"),
    ("--epochs", "3.5", "3.5"),
    ("--mixup", "1e-5", "--mixup 1e-05 is too small as alpha of a beta distribution: use at least"),
    ("--cutmix", "1e-4", "--cutmix 0.0001 is too small as alpha of a beta distribution"),
    ("--eps", "four", "--eps 'four' should be a number, such as 0.5 or 4/255"),
]


@pytest.mark.parametrize(("flags", "value", "expected"), REFUSED)
def test_what_is_refused_names_the_value(flags, value, expected):
    assert expected in refused(*flags.split(), *value.split())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("epochs = 3.5", "epochs = 3.5 should be of type int"),
        ("epochs = true", "epochs = True should be of type int"),
        ("model_ema = 1", "model_ema = 1 should be of type bool"),
        ("model = 3", "model = 3 should be of type str"),
        ("eps = true", "eps = True should be of type float"),
        ('eps = "a lot"', "'a lot' is not a number"),
        ('precision = "fp31"', "precision = 'fp31' is not valid: did you mean 'fp32'?"),
        ("mean = [0.5]", "mean = [0.5] should be a list of 3 values"),
        ('mean = ["a", "b", "c"]', "'a' is not a number"),
        ('model_kwargs = "depth=2"', "model_kwargs = 'depth=2' should be a list"),
        ("[objective]\neps = 0.1", "unknown key 'objective'"),
        ("eps = ", "not valid TOML"),
        (f"epochs = {'9' * 5000}", "not valid TOML"),
        (f"epochs = 0x{'f' * 5000}", "not valid TOML"),
    ],
)
def test_what_a_recipe_cannot_say(text, expected):
    with pytest.raises(UserError) as caught:
        Config.from_toml(text)
    assert expected in str(caught.value) and "\n" not in str(caught.value)


def test_a_long_chain_of_recipes_is_refused_in_one_line(tmp_path):
    for number in range(1200):
        (tmp_path / f"{number}.toml").write_text(f'base = "{number + 1}.toml"\n')
    with pytest.raises(
        UserError, match="more than 8 recipes extend each other in a chain"
    ) as caught:
        load_recipe(str(tmp_path / "0.toml"))
    assert "\n" not in str(caught.value)


def test_configs_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().objective.gradnorm.eps = 0.5  # type: ignore[misc]


# ------------------------------------------------------------------------------------------- values


def test_model_kwargs_are_literals_or_strings():
    found = model_kwargs(["depths=(2, 2)", "norm=layer", "rate=1e-3", "name=a=b", "flag=True"])
    assert found == {
        "depths": (2, 2),
        "norm": "layer",
        "rate": 1e-3,
        "name": "a=b",
        "flag": True,
    }


@pytest.mark.parametrize(
    ("keys", "step"),
    [
        ({"method": "pgd_at"}, 8 / 255 / 3),
        ({"method": "pgd_at", "attack_it": 10, "attack_eps": 8 / 255}, 1.6 / 255),
        ({"method": "fgsm_rs"}, 5 / 255),
        ({"method": "n_fgsm"}, 4 / 255),
        ({"method": "n_fgsm", "attack_step": 1 / 255}, 1 / 255),
        ({"method": "pgd_at", "attack_step": 1 / 255}, 1 / 255),
    ],
)
def test_the_attacks_step(keys, step):
    assert Config().replace(**keys).objective.step_size == pytest.approx(step, rel=1e-12)


@pytest.mark.parametrize(
    ("keys", "eps"),
    [
        ({"method": "gradnorm", "eps": 0.1}, 0.1),
        ({"method": "pgd_at", "eps": 0.1, "attack_eps": 0.2}, 0.2),
        ({"method": "fgsm_rs", "attack_eps": 0.2}, 0.2),
        ({"method": "pgd_at", "attack_eps": 0.2, "eval_eps": 0.3}, 0.3),
        ({"method": "gradnorm", "eps": 0.1, "eval_eps": 0}, 0.0),
    ],
)
def test_the_radius_watched_is_the_methods_own(keys, eps):
    assert Config().replace(**keys).eval_eps == eps


def test_changed_names_what_differs():
    ours = Config().replace(model="resnet18", drop=0.5)
    there = Config().replace(model="resnet50", drop=0.5, epochs=30)
    assert ours.changed(there, "architecture") == ["model: 'resnet18', not 'resnet50'"]
    assert ours.changed(ours, "optimizer") == []


# ------------------------------------------------------------------------------------------ recipes

IMAGENET: dict[str, Any] = {
    "data": "imagefolder",
    "pretrained": True,
    "img_size": 224,
    "weight_decay": 0.05,
    "opt_eps": 1e-8,
    "min_lr": 1e-5,
    "warmup_epochs": 5.0,
    "train_interpolation": "bicubic",
    "crop_pct": 0.875,
    "aa": "rand-m9-mstd0.5-inc1",
    "color_jitter": 0.4,
    "reprob": 0.25,
    "remode": "pixel",
    "mixup": 0.8,
    "cutmix": 1.0,
    "mixup_switch_prob": 0.5,
    "smoothing": 0.1,
    "drop_path": 0.0,
    "model_ema": True,
    "model_ema_decay": 0.9998,
    "lr_base_size": 512,
}
"""Section 3 of METHOD.md: what all of the paper's ImageNet runs share."""
GRADNORM = {
    "method": "gradnorm",
    "ce_weight": 0.8,
    "gn_weight": 1.2,
    "eps": 4 / 255,
    "sigma": 0.225,
    "ramp_epochs": 5.0,
}
SAID: dict[str, dict[str, Any]] = {
    "swin_b_gradnorm": IMAGENET
    | GRADNORM
    | {"model": "swin_b", "precision": "bf16", "train_in_eval_mode": False}
    | {"accumulation": "mean", "sched_on_updates": True, "sync_micro_batches": False}
    # the paper's, until --epochs or the batch is changed
    | {"ramp_epochs": None, "warmup_epochs": None, "min_lr": None, "opt_eps": None},
}


@pytest.mark.parametrize("name", SAID)
def test_recipes_say_what_the_paper_does(name):
    cfg = load_recipe(name)
    found = {key: cfg.value(key) for key in SAID[name]}
    assert found == SAID[name]


def test_the_papers_updates_and_learning_rates():
    """38 x 2 x 7 GPUs for gradnorm and 64 x 8 for PGD-3, whose learning rate needs no scaling."""
    gradnorm, pgd = load_recipe("paper_swin_b_gradnorm"), load_recipe("paper_swin_b_pgd3")
    images = gradnorm.dataset.batch_size * gradnorm.dataset.grad_accum_steps * 7
    assert images == 532
    assert compute_peak_lr(gradnorm.optimizer, images) == pytest.approx(6.25e-4 * 532 / 512)
    assert compute_peak_lr(pgd.optimizer, 64 * 8) == 1.25e-3
    assert pgd.objective.step_size == pytest.approx(8 / 255 / 3)


def test_a_recipe_that_starts_from_another_names_its_output():
    start, then = load_recipe("quickstart_natural"), load_recipe("quickstart_gradnorm")
    assert then.architecture.initial_checkpoint == start.run.output
    assert then.run.output != start.run.output
    same = dataclasses.replace(then.architecture, initial_checkpoint=None)
    assert same == start.architecture


# ------------------------------------------------------------------------------------------- fields


def dataclass_fields() -> list[tuple[str, str, str | None]]:
    """(class, field, its docstring) of every group of options, from the source."""
    out = []
    sources = [Path(module.__file__).read_text() for module in (groups, options)]
    for node in [node for source in sources for node in ast.parse(source).body]:
        if not isinstance(node, ast.ClassDef) or not node.name.endswith(("Config", "Options")):
            continue
        for index, item in enumerate(node.body):
            if not isinstance(item, ast.AnnAssign):
                continue
            after = node.body[index + 1] if index + 1 < len(node.body) else None
            text = after.value if isinstance(after, ast.Expr) else None
            said = isinstance(text, ast.Constant) and isinstance(text.value, str)
            assert isinstance(item.target, ast.Name)
            out.append((node.name, item.target.id, text.value if said else None))
    return out


def test_every_field_has_a_docstring():
    rows = dataclass_fields()
    inner = {path.partition(".")[2] for path in GROUPS}
    rows = [row for row in rows if row[1] not in inner]
    assert {name for _, name, _ in rows} == {*FIELDS}  # nothing was overlooked
    assert [row[:2] for row in rows if not row[2]] == []
    for path, group in GROUPS.items():
        assert group.__doc__, path  # the heading of the group in --help


def test_no_key_belongs_to_two_groups():
    names = [field.name for group in GROUPS.values() for field in dataclasses.fields(group)]
    keys = [name for name in names if name not in {path.rpartition(".")[2] for path in GROUPS}]
    assert len(keys) == len(set(keys)) == len(FIELDS)


def test_help_shows_every_flag(capsys):
    with pytest.raises(SystemExit) as left:
        parse_config(["--help"])
    assert left.value.code == 0
    shown = capsys.readouterr().out
    assert [n for n in FIELDS if f"--{n.replace('_', '-')}" not in shown] == []


def test_a_missing_start_names_the_recipe_that_makes_it(tmp_path, monkeypatch, capsys):
    """Before torch is imported, and wherever the program runs."""
    monkeypatch.chdir(tmp_path)
    for start in ("runs/quickstart_natural", "runs/quickstart_natural/checkpoints/epoch_0010.pt"):
        with pytest.raises(UserError) as caught:
            initial_file(start)
        assert str(caught.value) == (
            f"--initial-checkpoint {start}: there is no such file or run below {tmp_path}; make it "
            "first: python -m fastgn.train --recipe quickstart_natural"
        )
    Path("runs/quickstart_natural").mkdir(parents=True)
    with pytest.raises(UserError, match=r"not finished .* quickstart_natural --resume auto$"):
        initial_file("runs/quickstart_natural")
    with pytest.raises(UserError, match="^--initial-checkpoint /no/such: there is no such file or"):
        initial_file("/no/such")
    with pytest.raises(UserError, match="there is no such file or run"):
        initial_file("a" * 5000)
    monkeypatch.setattr(sys, "argv", ["train", "--recipe", "quickstart_gradnorm"])
    with pytest.raises(SystemExit):
        check_command_line("fastgn.train")
    assert "--recipe quickstart_natural" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("program", "args", "expected"),
    [
        ("fastgn.train", "--data-dir imagse", "imagse: there is no such file or folder: did you"),
        ("fastgn.train", "--data digits --data-dir images", "or add --data imagefolder to use the"),
        ("fastgn.evaluate", "--checkpoint a", "--checkpoint a: there is no such run or file below"),
        ("fastgn.evaluate", "--checkpoint images --data-dir image", "did you mean images?"),
        ("fastgn.export", "--checkpoint a --robustbench b", "--checkpoint a: there is no such run"),
    ],
)
def test_what_does_not_exist_is_named_before_torch_is_imported(
    program, args, expected, tmp_path, monkeypatch, capsys
):
    (tmp_path / "images").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [program, *args.split()])
    with pytest.raises(SystemExit):
        check_command_line(program)
    assert expected in capsys.readouterr().err


@pytest.mark.parametrize("recipe", [(), ("--recipe", "swin_b_gradnorm")])
def test_a_short_run_needs_no_other_flag(recipe):
    """Warm-up and ramp follow --epochs, and the first and last rate follow the peak."""
    cfg = parse_config([*recipe, "--epochs", "2", "--batch-size", "8"])
    assert cfg.optimizer.warmup == cfg.ramp_epochs == pytest.approx(0.2)
    assert max(cfg.optimizer.outer_rates(compute_peak_lr(cfg.optimizer, 8))) < 1e-6


@pytest.mark.slow
def test_every_start_of_a_recipe_is_another_recipes_output():
    for name in recipe_names():
        start = load_recipe(name).architecture.initial_checkpoint
        if start is not None:
            with pytest.raises(UserError, match="; make it first: python -m fastgn.train --recipe"):
                initial_file(start)


def test_a_kind_of_data_set_that_is_left_out_is_the_one_that_is_loaded() -> None:
    """Comparisons of two configurations take --data None for what it means."""
    for given, kind in (({}, "digits"), ({"data_dir": "images"}, "imagefolder")):
        implied, named = Config().replace(**given), Config().replace(data=kind, **given)
        assert implied.dataset.kind == kind
        assert implied.changed(named, "dataset") == []
    cifar10 = Config().replace(data="cifar10", data_dir="images")
    said = implied.changed(cifar10, "dataset")
    assert said == ["data: 'imagefolder', not 'cifar10'"]
