"""The paper's runs: each recipe paper_*, field by field, against a table of the configurations in
the paper's code."""

import re
from importlib import resources
from pathlib import Path

import pytest

from fastgn import train
from fastgn.config import Config, load_recipe, recipe_names
from fastgn.config.cli import parse_config
from fastgn.errors import UserError
from fastgn.optim import compute_ramp

ALL = {
    **{"img_size": 224, "drop_path": 0.0, "data": "imagefolder", "precision": "fp32"},
    **{"weight_decay": 0.05, "opt_eps": 1e-8, "min_lr": 1e-5, "warmup_epochs": 5.0},
    **{"aa": "rand-m9-mstd0.5-inc1", "color_jitter": 0.4, "reprob": 0.25, "remode": "pixel"},
    **{"mixup": 0.8, "cutmix": 1.0, "mixup_switch_prob": 0.5, "smoothing": 0.1},
    **{"train_interpolation": "bicubic", "crop_pct": 0.875},
    **{"model_ema_decay": 0.9998, "model_ema_warmup": False},
    # what the paper's code does, each as an option
    **{"train_in_eval_mode": True, "accumulation": "sum", "sched_on_updates": False},
    **{"sync_micro_batches": True},
}
"""What all runs share, but for what a row says."""

NATURAL = {"method": "natural"}
GRADNORM = {"method": "gradnorm", "eps": 4 / 255, "sigma": 0.225}
PGD3 = {
    **{"method": "pgd_at", "attack_eps": 4 / 255, "attack_it": 3, "ramp_epochs": 5.0},
    **{"attack_select": "paper", "attack_weight_grads": True, "attack_ramp_on_updates": False},
}
PGD1 = PGD3 | {"attack_it": 1, "attack_step": 5 / 255}
EDGE = {
    **{"method": "edge", "edge_weight": 19.0, "ramp_start": 1 / 19, "ramp_epochs": 200.0},
    **{"edge_sampling": "hard", "edge_temperature": 0.5, "edge_rms": "batch"},
    **{"edge_of": "logit", "edge_map": "gradient", "train_in_eval_mode": False},
}
ATTACKED = {
    **{"gn_attacked": True, "attack_eps": 4 / 255, "attack_it": 3, "attack_select": "paper"},
    **{"attack_ramp_on_updates": False},
}


def gradnorm(ce: float, gn: float, epochs: float = 5.0, **more: object) -> dict:
    """Gradient norm with these weights, at full strength after so many epochs."""
    return GRADNORM | {"ce_weight": ce, "gn_weight": gn, "ramp_epochs": epochs} | more


def cifar10(objective: dict, **more: object) -> dict:
    imagenet = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
    network = {"img_size": 32, "crop_pct": 1.0, "data": "cifar10", "loader": "torch"}
    return imagenet | network | objective | more


SWIN, LARGE = {"model": "swin_b"}, {"model": "swin_l"}
GELU, RELU, SILU = ({"model": "resnet50", "activation": name} for name in ("gelu", "relu", "silu"))
SMALL = {"model": "preact_resnet18", "activation": "gelu"}
TUNED = "paper_resnet50_{}_finetune"
EPOCH_50 = "paper_cifar10_preactresnet18_natural/checkpoints/epoch_0050.pt"
GN, AT = "paper_swin_b_gradnorm", "paper_swin_b_pgd3"

RUNS = {
    # start, network, epochs, lr_base, warm-up lr, batch, accumulated, clip, the rest
    GN: ("timm", SWIN, 100, 6.25e-4, 1e-5, 38, 2, 1.0, gradnorm(0.8, 1.2)),
    "paper_swin_l_gradnorm": ("timm", LARGE, 100, 6.25e-4, 1e-5, 38, 2, 1.0, gradnorm(0.8, 1.2)),
    AT: ("timm", SWIN, 100, 1.25e-3, 1e-6, 64, 1, None, PGD3),
    "paper_swin_b_pgd1": ("timm", SWIN, 100, 1.25e-3, 1e-6, 64, 1, None, PGD1),
    "paper_swin_b_natural": ("timm", SWIN, 100, 6.25e-4, 1e-6, 74, 1, 1.0, NATURAL),
    "paper_swin_b_edge": ("timm", SWIN, 100, 6.25e-4, 1e-5, 38, 2, 1.0, EDGE),
    f"{GN}_attacked": (
        *("timm", SWIN, 100, 1.25e-3, 1e-5, 64, 1, 1.0),
        gradnorm(1.8, 0.2, 20.0, **ATTACKED, attack_ramp_epochs=5.0),
    ),
    f"{GN}_attacked_finetune": (
        *(AT, SWIN, 30, 2.5e-5, 1e-5, 64, 2, 1.0),
        gradnorm(1.333, 0.667, **ATTACKED, attack_ramp_epochs=0.0),
    ),
    f"{AT}_finetune": (AT, SWIN, 30, 2.5e-5, 1e-5, 64, 1, 1.0, PGD3),
    f"{GN}_pareto": (GN, SWIN, 30, 2.5e-5, 1e-5, 38, 2, 1.0, gradnorm(1.2, 0.8, 0.0)),
    f"{GN}_pareto_2": (
        *(GN, SWIN, 5, 2.5e-5, 1e-5, 38, 2, 1.0),
        gradnorm(0.0, 2.0, 0.0, warmup_epochs=2.0),
    ),
    f"{GN}_finetune": (GN, SWIN, 30, 2.5e-5, 1e-5, 38, 2, 1.0, gradnorm(0.8, 1.2, 0.0)),
    f"{GN}_green": (
        *(GN, SWIN, 30, 2.5e-5, 1e-5, 38, 2, 1.0),
        gradnorm(0.8, 1.2, 0.0, gn_channel_weights=(0.0, 1.0, 0.0)),
    ),
    f"{GN}_random": (
        *(GN, SWIN, 30, 2.5e-5, 1e-5, 38, 2, 1.0),
        gradnorm(0.8, 1.2, 0.0, gn_start=2 / 255),
    ),
    TUNED.format("gelu"): (
        *("timm", GELU, 4, 1.25e-3, 1e-6, 64, 1, 1.0),
        NATURAL | {"model_ema": False},
    ),
    TUNED.format("relu"): (
        *("timm", RELU, 4, 1.25e-3, 1e-6, 64, 1, 1.0),
        NATURAL | {"model_ema": False},
    ),
    TUNED.format("silu"): (
        *("timm", SILU, 4, 1.25e-3, 1e-6, 128, 1, 1.0),
        NATURAL | {"model_ema": False},
    ),
    "paper_resnet50_gelu_gradnorm": (
        *(TUNED, GELU, 83, 1.25e-3, 1e-6, 64, 1, 1.0),
        gradnorm(0.8, 1.2),
    ),
    "paper_resnet50_relu_gradnorm": (
        *(TUNED, RELU, 50, 6.25e-4, 1e-6, 64, 1, 1.0),
        gradnorm(0.5, 0.5, 10.0),
    ),
    "paper_resnet50_silu_gradnorm": (
        *(TUNED, SILU, 50, 1.25e-3, 1e-6, 32, 2, 1.0),
        gradnorm(0.5, 0.5),
    ),
    "paper_resnet50_gelu_pgd3": (TUNED, GELU, 50, 1.25e-3, 1e-6, 64, 1, None, PGD3),
    "paper_resnet50_relu_pgd3": (TUNED, RELU, 50, 1.25e-3, 1e-6, 64, 1, None, PGD3),
    "paper_resnet50_silu_pgd3": (TUNED, SILU, 50, 1.25e-3, 1e-6, 64, 1, None, PGD3),
    "paper_resnet50_gelu_pgd1": (TUNED, GELU, 50, 1.25e-3, 1e-6, 64, 1, None, PGD1),
    "paper_resnet50_relu_pgd1": (TUNED, RELU, 50, 1.25e-3, 1e-6, 64, 1, 1.0, PGD1),
    "paper_resnet50_gelu_natural": (TUNED, GELU, 50, 1.25e-3, 1e-6, 64, 1, None, NATURAL),
    "paper_resnet50_relu_natural": (TUNED, RELU, 50, 1.25e-3, 1e-6, 64, 1, None, NATURAL),
    "paper_resnet50_silu_natural": (TUNED, SILU, 50, 1.25e-3, 1e-6, 128, 1, None, NATURAL),
    "paper_resnet50_gelu_edge": (TUNED, GELU, 100, 1.25e-3, 1e-6, 38, 1, 1.0, EDGE),
    "paper_resnet50_gelu_edge_saliency": (
        *(TUNED, GELU, 100, 1.25e-3, 1e-6, 38, 1, 1.0),
        EDGE | {"edge_map": "saliency"},
    ),
    "paper_resnet50_gelu_edge_loss": (
        *("timm", GELU, 100, 1.25e-3, 1e-6, 38, 1, 1.0),
        EDGE | {"edge_of": "loss", "train_in_eval_mode": True},
    ),
    "paper_cifar10_preactresnet18_natural": (
        *("scratch", SMALL, 100, 1.25e-3, 1e-6, 128, 1, None),
        cifar10(NATURAL, model_ema=False, keep_epochs=(50,)),
    ),
    "paper_cifar10_preactresnet18_gradnorm": (
        *(EPOCH_50, SMALL, 300, 1.25e-3, 1e-6, 128, 1, 1.0),
        cifar10(gradnorm(0.8, 1.2)),
    ),
    "paper_cifar10_preactresnet18_pgd3": (
        *(EPOCH_50, SMALL, 300, 1.25e-3, 1e-6, 128, 1, None),
        cifar10(PGD3, attack_eps=8 / 255),
    ),
    "paper_swin_b_cost_natural": ("timm", SWIN, 2, 1.25e-3, 1e-5, 64, 1, 1.0, NATURAL),
    "paper_swin_b_cost_gradnorm": (
        *("timm", SWIN, 2, 6.25e-4, 1e-5, 32, 2, 1.0),
        gradnorm(0.8, 1.2),
    ),
    "paper_swin_b_cost_pgd3": ("timm", SWIN, 2, 1.25e-3, 1e-6, 64, 1, None, PGD3),
    "paper_swin_b_cost_pgd1": ("timm", SWIN, 2, 1.25e-3, 1e-6, 64, 1, None, PGD1),
}
"""The runs of arXiv 2409.20139, as its configurations give them."""


def text_of(name: str) -> str:
    return resources.files("fastgn").joinpath("recipes", f"{name}.toml").read_text()


def test_every_run_has_a_recipe() -> None:
    assert {name for name in recipe_names() if name.startswith("paper_")} == set(RUNS)


@pytest.mark.parametrize("name", RUNS)
def test_a_recipe_is_its_run(name: str) -> None:
    start, network, epochs, lr, warmup_lr, batch, accumulated, clip, rest = RUNS[name]
    values = ALL | network | rest | {"output": f"runs/{name}"}
    values |= {"epochs": epochs, "lr_base": lr, "warmup_lr": warmup_lr}
    values |= {"batch_size": batch, "grad_accum_steps": accumulated}
    if clip is not None:
        values["clip_grad"] = clip
    if start == "timm":
        values["pretrained"] = True
    elif start != "scratch":
        values["initial_checkpoint"] = f"runs/{start.format(network.get('activation'))}"
    want, found = Config().replace(**values).flat(), load_recipe(name).flat()
    assert found.keys() == want.keys()
    for key, value in want.items():
        same = found[key] == (pytest.approx(value) if isinstance(value, float) else value)
        assert same, f"{key} = {found[key]}, not {value}"


ALPHA = {
    GN: lambda epoch: 1.2 * min(0.2 * epoch, 1),
    "paper_swin_b_edge": lambda epoch: min(1 + 0.09 * epoch, 19),
    f"{GN}_attacked": lambda epoch: 0.2 * min(0.05 * epoch, 1),
    f"{GN}_finetune": lambda epoch: 1.2,
    "paper_resnet50_relu_gradnorm": lambda epoch: 0.5 * min(0.1 * epoch, 1),
}
"""The penalty's weight at a fractional epoch, as the paper's code computes it."""


@pytest.mark.parametrize("name", ALPHA)
def test_the_penalty_grows_as_the_papers(name: str) -> None:
    cfg = load_recipe(name)
    objective = cfg.objective
    edge = objective.method == "edge"
    weight = objective.edge.edge_weight if edge else objective.gradnorm.gn_weight
    for update in (0, 7, 10, 49, 50, 123, 200, 1000, 3000):
        assert weight * compute_ramp(cfg, update, 10) == pytest.approx(ALPHA[name](update / 10))


@pytest.mark.parametrize("name", RUNS)
def test_a_header_says_what_to_run_before(name: str) -> None:
    """The run that a recipe starts from is another recipe's output, and its header names it."""
    header = "".join(line for line in text_of(name).splitlines(True) if line.startswith("#"))
    header = " ".join(header.replace("#", " ").split())
    assert header.startswith("arXiv 2409.20139"), "what it is"
    assert text_of(name).splitlines()[0].endswith("."), "--list shows the first line"
    start = load_recipe(name).architecture.initial_checkpoint
    if start is None:
        return
    before = start.split("/")[1]
    assert re.search(rf"\b{before}\b", header) and "first" in header
    cfg = load_recipe(before)
    assert cfg.run.output == f"runs/{before}"
    start_of_both = {"pretrained": False, "initial_checkpoint": None}
    mine, theirs = (
        c.replace_group("architecture", start_of_both) for c in (load_recipe(name), cfg)
    )
    assert mine.architecture == theirs.architecture, "the weights fit"
    epoch = re.search(r"epoch_0*(\d+)\.pt$", start)
    assert epoch is None or int(epoch[1]) in cfg.run.keep_epochs


FAMILIES = {
    f"{GN}_pareto": [
        (f"--gn-weight {g} --ce-weight {2 - g:.1f}", {"gn_weight": g, "ce_weight": 2 - g})
        for g in (0.8, 1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7, 1.8, 1.9)
    ],
    f"{GN}_random": [(f"--gn-start {r}/255", {"gn_start": r / 255}) for r in (2, 4, 8)],
}
"""Recipe and, for each of its runs, the flags and the values that they set."""


@pytest.mark.parametrize("name", FAMILIES)
def test_a_familys_runs_are_flags_on_one_recipe(name: str) -> None:
    (example,) = re.findall(r"^#   (--\S.*) --output (\S+)$", text_of(name), re.M)
    flags = [flags for flags, _ in FAMILIES[name]]
    assert example[0] in flags and example[1].startswith(f"runs/{name}_")
    for flags, values in FAMILIES[name]:
        found = parse_config(["--recipe", name, *flags.split()])
        for key, value in values.items():
            assert found.value(key) == pytest.approx(value)
    if "pareto" in name:
        assert "g = 0.8, 1.0, 1.1, 1.2, ..., 1.9" in text_of(name)


def objective_of(name: str) -> tuple:
    """What tells the objectives of two recipes apart in a tiny run."""
    cfg = load_recipe(name)
    keys = "method edge_of edge_map gn_attacked gn_start gn_channel_weights attack_it "
    keys += "train_in_eval_mode grad_accum_steps clip_grad"
    return *map(cfg.value, keys.split()), bool(cfg.objective.gradnorm.ce_weight)


KINDS = sorted({objective_of(name): name for name in reversed(RUNS)}.values())


@pytest.mark.parametrize("name", KINDS)
def test_a_tiny_run_of_each_kind_trains(name: str, tmp_path: Path) -> None:
    """Two updates on digits of a network with BatchNorm and the recipe's other values."""
    network = ["--model", "preact_resnet18", "--model-kwargs", "width=2", "--img-size", "16"]
    start = ["--no-pretrained", "--initial-checkpoint", "None", "--data", "digits"]
    data = ["--aa", "None", "--loader", "device", "--batch-size", "8", "--eval-images", "0"]
    rates = ["--lr", "1e-3", "--device", "cpu", "--max-updates", "2", "--activation", "gelu"]
    args = ["--recipe", name, *network, *start, *data, *rates, "--log-interval", "1"]
    assert train.main([*args, "--output", str(tmp_path / "run")]) == 0
    assert (tmp_path / "run" / "model.safetensors").exists()


# A recipe that extends another


def write(folder: Path, **recipes: str) -> None:
    for name, text in recipes.items():
        (folder / f"{name}.toml").write_text(text)


def test_a_recipe_extends_its_base(tmp_path: Path) -> None:
    write(
        tmp_path,
        a='base = "b.toml"\nepochs = 7\nce-weight = 0.3\n',
        b='base = "swin_b_gradnorm"\nepochs = 9\nce_weight = 0.4\nbatch_size = 3\n',
    )
    cfg = load_recipe(str(tmp_path / "a.toml"))
    assert [cfg.value(key) for key in ("epochs", "ce_weight", "batch_size")] == [7, 0.3, 3]
    assert cfg.architecture.model == "swin_b" and "\nbase =" not in cfg.to_toml()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('base = "a.toml"\n', r"base = .*a\.toml' cannot be used: this recipe extends itself"),
        (
            'base = "../{folder}/a.toml"\n',
            r"base = .*a\.toml' cannot be used: this recipe extends itself",
        ),
        ('base = "nosuch.toml"\n', r"base = .*nosuch\.toml' cannot be used: there is no such file"),
        (f'base = "{300 * "a"}.toml"\n', r"a\.toml' cannot be used: there is no such file"),
        ('base = "a\\u0000.toml"\n', r"there is no such file"),
        ('base = "swin_b_gradnrom"\n', r"swin_b_gradnrom.*did you mean.*swin_b_gradnorm"),
        ("base = 3\n", r"base = 3 should be the name of a recipe"),
    ],
)
def test_a_base_that_does_not_fit_is_one_line(text: str, message: str, tmp_path: Path) -> None:
    write(tmp_path, a=text.replace("{folder}", tmp_path.name))
    with pytest.raises(UserError, match=message) as caught:
        load_recipe(str(tmp_path / "a.toml"))
    assert str(caught.value).startswith("--recipe ") and "\n" not in str(caught.value)


def test_a_shared_part_is_no_recipe() -> None:
    assert not any(name.startswith("_") for name in recipe_names())
    with pytest.raises(UserError, match="--recipe '_paper'"):
        load_recipe("_paper")
