"""The optimizers, the schedule, the ramp, and the average of the weights."""

import fnmatch
import json
import math
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from support.runs import tiny_run
from support.states import differences, read_state, small_state
from timm.optim import get_optimizer_info, list_optimizers
from torch import nn

from fastgn import train
from fastgn.checkpoint import Checkpoints
from fastgn.config import Config, OptimizerConfig, load_recipe, recipe_names
from fastgn.errors import UserError
from fastgn.models.preact_resnet import PreActResNet18
from fastgn.optim import (
    build_average,
    build_optimizer,
    check_optimizer,
    compute_attack_ramp,
    compute_initial_share,
    compute_lr,
    compute_peak_lr,
    compute_ramp,
    describe_low_lr,
    load_state,
    make_decay_groups,
    measure_state_bytes,
    update_average,
)

CPU = torch.device("cpu")


def swin(**more: Any) -> nn.Module:
    return timm.create_model(
        "swin_tiny_patch4_window7_224",
        img_size=16,
        patch_size=4,
        embed_dim=8,
        depths=(1, 1),
        num_heads=(1, 2),
        window_size=4,
        **more,
    )


def network() -> nn.Module:
    """Convolution, BatchNorm, LayerNorm and a matrix: each kind of weight, 264 in all."""
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False),
        nn.BatchNorm2d(4),
        nn.Flatten(),
        nn.Linear(16, 8),
        nn.LayerNorm(8),
    )


# --------------------------------------------------------------------------------- optimizers


def runnable(name: str) -> bool:
    info = get_optimizer_info(name)
    return isinstance(info.opt_class, type) and not info.second_order


def updates(model: nn.Module, optimizer: Any, first: int, last: int) -> None:
    """Trains on noise; what is drawn is a function of the update, as in a run."""
    for update in range(first, last):
        torch.manual_seed(100 + update)
        model(torch.randn(2, 3, 4, 4)).square().sum().backward()
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * (update + 1) / 6
        optimizer.step()
        optimizer.zero_grad()
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", list_optimizers())
def test_every_optimizer_trains_and_resumes_or_says_why_not(name: str, tmp_path: Path) -> None:
    """Three updates, a checkpoint and three more end as six, to the last bit."""
    cfg = OptimizerConfig(opt=name, weight_decay=0.05)
    if not runnable(name):
        with pytest.raises(UserError, match=f"^--opt {name} (needs|belongs to) .*(use|apex)"):
            check_optimizer(cfg, CPU)
        return
    check_optimizer(cfg, CPU)
    with torch.compiler.set_stance("force_eager"):  # kron compiles itself
        whole, first, second = network(), network(), network()
        optimizer = build_optimizer(cfg, whole, 1e-3)
        updates(whole, optimizer, 0, 6)
        optimizer = build_optimizer(cfg, first, 1e-3)
        updates(first, optimizer, 0, 3)
        kept = sum(
            t.nbytes
            for state in optimizer.state.values()
            for t in torch.utils._pytree.tree_leaves(state)
            if torch.is_tensor(t)
        )
        assert measure_state_bytes(cfg, first) == kept
        both = {"model": first.state_dict(), "optimizer": optimizer.state_dict()}
        path = Checkpoints(tmp_path, 1).save(small_state(3, **both))
        torch.manual_seed(1234)
        optimizer = build_optimizer(cfg, second, 1e-3)
        state = read_state(path)
        second.load_state_dict(state["model"])
        assert load_state(cfg, second, optimizer, state["optimizer"], 3) is None
        updates(second, optimizer, 3, 6)
    assert differences(whole.state_dict(), second.state_dict()) == []
    changed = differences(dict(whole.named_parameters()), dict(network().named_parameters()))
    assert len(changed) == len(list(whole.parameters()))


def test_adamw_is_torchs() -> None:
    """With the same values and the same bits, on the CPU without a fused kernel."""
    mine, theirs = swin(), swin()
    theirs.load_state_dict(mine.state_dict())
    optimizer = build_optimizer(OptimizerConfig(), mine, 1e-3)
    assert type(optimizer) is torch.optim.AdamW
    other = torch.optim.AdamW(
        make_decay_groups(theirs, 0.05), lr=1e-3, betas=(0.9, 0.999), eps=1e-8, fused=False
    )
    keys = ("weight_decay", "betas", "eps", "fused", "amsgrad", "foreach")
    for a, b in zip(optimizer.param_groups, other.param_groups, strict=True):
        assert {k: a[k] for k in keys} == {k: b[k] for k in keys}
    for model, steps in ((mine, optimizer), (theirs, other)):
        torch.manual_seed(0)
        for _ in range(3):
            model(torch.randn(2, 3, 16, 16)).square().sum().backward()
            steps.step()
            steps.zero_grad()
    assert differences(mine.state_dict(), theirs.state_dict()) == []


def test_sgd_is_the_cifar_literatures() -> None:
    """v = m v + g + wd w; w -= lr (g + wd w + m v) by Nesterov, w -= lr v by the classical one."""
    for name in ("sgd", "momentum"):
        weight = nn.Parameter(torch.tensor([[2.0]], dtype=torch.float64))
        model = nn.Module()
        model.weight = weight
        optimizer = build_optimizer(
            OptimizerConfig(opt=name, momentum=0.8, weight_decay=0.01), model, 0.1
        )
        w, v = 2.0, 0.0
        for gradient in (1.0, -0.5, 0.3):
            weight.grad = torch.full_like(weight, gradient)
            optimizer.step()
            g = gradient + 0.01 * w
            v = 0.8 * v + g
            w -= 0.1 * (g + 0.8 * v if name == "sgd" else v)
            assert weight.item() == pytest.approx(w, rel=1e-12)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"opt": "addamw"}, "^--opt 'addamw': did you mean 'adamw'"),
        ({"opt": "SGDM"}, "^--opt 'SGDM': did you mean 'sgd"),
        ({"opt": "nosuchthing"}, "^--opt 'nosuchthing': "),
        ({"opt": "sgd", "opt_betas": (0.9, 0.99)}, "^--opt sgd has no --opt-betas: leave"),
        ({"opt": "sgd", "opt_eps": 1e-8}, "^--opt sgd has no --opt-eps"),
        ({"opt": "adamw", "momentum": 0.9}, "^--opt adamw has no --momentum"),
        ({"opt": "adan", "opt_betas": (0.9, 0.99)}, "^--opt-betas 0.9 0.99: --opt adan takes 3"),
        ({"opt": "sgd", "momentum": 0.0}, "^--opt sgd: Nesterov momentum requires a momentum"),
        ({"opt": "adahessian"}, "^--opt adahessian needs products with the Hessian"),
        ({"opt": "bnbadam8bit"}, "^--opt bnbadam8bit belongs to bitsandbytes"),
    ],
)
def test_what_an_optimizer_does_not_take_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as refused:
        check_optimizer(OptimizerConfig(**values), CPU)
    assert "\n" not in str(refused.value)
    assert str(refused.value).count(" or ") < 6, "five near names at most"


def test_a_run_names_a_wrong_optimizer_before_it_makes_anything(tmp_path, capsys) -> None:
    assert train.main(tiny_run(tmp_path / "run", "--opt", "adamx")) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "--opt 'adamx': did you mean" in said
    assert list(tmp_path.iterdir()) == []


def test_sgd_trains_resumes_and_is_not_continued_by_another(tmp_path, capsys) -> None:
    def run(name: str, *more: str) -> int:
        return train.main(
            tiny_run(tmp_path / name, "--opt", "sgd", "--lr", "0.05", "--momentum", "0.8", *more)
        )

    assert run("whole", "--max-updates", "4") == 0
    assert run("broken", "--max-updates", "2") == 0
    assert train.main(["--resume", str(tmp_path / "broken"), "--max-updates", "4"]) == 0
    whole, broken = (
        read_state(Checkpoints(tmp_path / name, 1).path(4)) for name in ("whole", "broken")
    )
    for key in ("model", "ema", "optimizer"):
        assert differences(whole[key], broken[key]) == []
    assert [g["momentum"] for g in broken["optimizer"]["param_groups"]] == [0.8, 0.8]
    capsys.readouterr()
    args = ["--resume", str(tmp_path / "broken"), "--opt", "momentum"]
    assert train.main(args) == 2
    assert (
        "the checkpoint was made with --opt sgd, which --opt momentum cannot"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize("build", [swin, lambda: PreActResNet18(width=4)])
def test_norms_biases_and_relative_position_tables_are_not_decayed(build) -> None:
    model = build()
    names = {id(p): name for name, p in model.named_parameters()}
    decayed, plain = ({names[id(p)] for p in g["params"]} for g in make_decay_groups(model, 0.05))
    assert decayed | plain == set(names.values()) and not decayed & plain
    spared = {n for n in names.values() if "norm" in n or n.endswith("bias") or "bias_table" in n}
    assert plain == spared
    assert [g["weight_decay"] for g in make_decay_groups(model, 0.05)] == [0.05, 0.0]
    assert [len(g["params"]) for g in make_decay_groups(model, 0.0)] == [len(decayed), len(plain)]


@pytest.mark.parametrize(
    "name",
    [
        *("swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256", "swinv2_cr_tiny_ns_224"),
        *("deit_tiny_patch16_224", "beit_base_patch16_224", "coat_lite_tiny", "convnext_atto"),
        *("resnet50", "xcit_nano_12_p16_224"),
    ],
)
def test_what_a_network_exempts_does_not_decay(name: str) -> None:
    """Vectors, position tables and what `no_weight_decay` of a network or of its parts names,
    which may be patterns (xcit's `pos_embed.*`)."""
    with torch.device("meta"):
        model = nn.Sequential(timm.create_model(name))  # as behind a normalisation
    exempt = set()
    for where, module in model.named_modules():
        names = getattr(module, "no_weight_decay", set)()
        exempt |= {f"{where}.{n}" if where else n for n in names}
    spared = [
        p
        for n, p in model.named_parameters()
        if p.ndim < 2
        or "relative_position_bias_table" in n
        or any(fnmatch.fnmatch(n, pattern) for pattern in exempt)
    ]
    decayed, plain = make_decay_groups(model, 0.05)
    assert {id(p) for p in plain["params"]} == {id(p) for p in spared}
    assert len(plain["params"]) + len(decayed["params"]) == len(list(model.parameters()))


def test_decay_reaches_the_update() -> None:
    """With zero gradients AdamW moves the decayed weights alone."""
    model = PreActResNet18(width=4)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = build_optimizer(OptimizerConfig(weight_decay=0.5), model, peak=0.1)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {n for n, p in model.named_parameters() if p.ndim > 1}


# ----------------------------------------------------------------------------- schedules


def test_schedule() -> None:
    cfg = OptimizerConfig(epochs=10, warmup_epochs=2, warmup_lr=0.1, min_lr=0.01)
    values = [compute_lr(cfg, update, 5, 1.0) for update in range(50)]
    assert values[0] == pytest.approx(0.1)
    assert values[5] == pytest.approx(0.55), "half-way through the warm-up, in the middle of it"
    assert values[10] == pytest.approx(0.01 + 0.495 * (1 + math.cos(math.pi * 0.2)))
    assert values[25] == pytest.approx(0.505), "the cosine's middle is the middle of all epochs"
    assert len(set(values)) == 50, "moves at every update"
    assert all(a > b for a, b in zip(values[10:], values[11:], strict=False))
    assert values[-1] > 0.01


def test_schedule_once_an_epoch() -> None:
    cfg = OptimizerConfig(epochs=10, warmup_epochs=2, warmup_lr=0.1, sched_on_updates=False)
    assert [compute_lr(cfg, u, 5, 1.0) for u in range(5)] == [pytest.approx(0.1)] * 5
    assert [compute_lr(cfg, u, 5, 1.0) for u in range(5, 10)] == [pytest.approx(0.55)] * 5


def test_peak_lr_scales_with_the_global_batch() -> None:
    assert compute_peak_lr(OptimizerConfig(), 532) == pytest.approx(6.25e-4 * 532 / 512)
    assert compute_peak_lr(OptimizerConfig(lr=0.003), 532) == 0.003


def test_a_low_learning_rate_is_noted_only_if_nobody_chose_it():
    assert describe_low_lr(OptimizerConfig(lr=1e-5), 8) == []
    assert describe_low_lr(OptimizerConfig(), 64) == []
    assert describe_low_lr(OptimizerConfig(lr_base_size=32), 8) == []
    (line,) = describe_low_lr(OptimizerConfig(), 63)
    assert "only 7.69e-05 (--lr-base 0.000625 x 63 images per update / --lr-base-size 512)" in line


def test_lengths_follow_the_epochs() -> None:
    """The paper's 5 epochs of warm-up and ramp, and a tenth of a run that is shorter than 50."""
    for epochs, length in ((100, 5.0), (50, 5.0), (30, 3.0), (2, 0.2), (1, 0.1)):
        cfg = Config().replace(epochs=epochs)
        assert cfg.optimizer.warmup == cfg.ramp_epochs == pytest.approx(length)
        rates = [compute_lr(cfg.optimizer, update, 100, 1e-3) for update in range(100 * epochs)]
        assert abs(rates.index(max(rates)) - 100 * length) <= 1
        assert max(rates) == pytest.approx(1e-3, rel=0.1)
    given = Config().replace(epochs=2, warmup_epochs=1.0, ramp_epochs=3.0)
    assert (given.optimizer.warmup, given.ramp_epochs) == (1.0, 3.0)


@pytest.mark.parametrize("peak", [1e-7, 9.8e-6, 5e-4, 6.5e-4, 1.25e-3, 0.1])
def test_the_rate_rises_to_its_peak_and_falls_from_it(peak: float) -> None:
    """At the paper's peaks the first and the last rate are its 1e-5, at small ones much less than
    the peak."""
    cfg = OptimizerConfig(lr=peak, epochs=10, warmup_epochs=2)
    rates = [compute_lr(cfg, update, 50, peak) for update in range(500)]
    assert rates[0] == pytest.approx(min(1e-5, peak / 50))
    assert rates[:100] == sorted(rates[:100]) and rates[100:] == sorted(rates[100:])[::-1]
    assert rates[-1] < 0.03 * peak + 1e-5 and max(rates) <= peak
    assert cfg.outer_rates(6.25e-4) == (1e-5, 1e-5)


@pytest.mark.parametrize(
    ("values", "images", "message"),
    [
        ({"lr": 1e-6, "min_lr": 1e-5}, None, "--min-lr 1e-05 is above --lr 1e-06: leave --min-lr"),
        ({"lr": 1e-6, "warmup_lr": 2e-6}, None, "--warmup-lr 2e-06 is above --lr 1e-06: "),
        (
            {"min_lr": 1e-5},
            8,
            r"--min-lr 1e-05 is above the peak learning rate 9.77e-06 \(--lr-base 0.000625 times ",
        ),
        ({"lr_base": 10.0, "lr_base_size": 1}, 8, r"the peak learning rate 80 \(.* out of range"),
    ],
)
def test_a_rate_above_the_peak_is_refused(
    values: dict[str, Any], images: int | None, message: str
) -> None:
    """Before anything is built if --lr gives the peak, and otherwise when the batch is known."""
    with pytest.raises(UserError, match=message):
        cfg = OptimizerConfig(**values)
        assert images is not None, "refused only later"
        compute_peak_lr(cfg, images)
    assert compute_peak_lr(OptimizerConfig(lr=1e-6, min_lr=1e-6, warmup_lr=1e-6), 1) == 1e-6


def test_ramp_is_the_papers() -> None:
    """alpha = clip(0.2 * fractional epoch, 0, 1): full from epoch 5."""
    for update in (0, 3, 17, 49, 50, 70):
        assert compute_ramp(Config(), update, 10) == pytest.approx(min(0.2 * update / 10, 1.0))
    assert compute_ramp(Config().replace(ramp_epochs=0.0), 0, 10) == 1.0


def test_the_attacks_ramp_has_its_own_length_and_may_wait_for_the_epoch() -> None:
    """The paper's code: the step times min(epoch, 5) / 5 with the whole epoch, 0 in the first."""
    both = Config().replace(ramp_epochs=20.0, attack_ramp_epochs=5.0, ramp_start=0.0)
    paper, same = both.replace(attack_ramp_on_updates=False), Config().replace(ramp_start=0.25)
    for update in (0, 3, 9, 10, 19, 20, 49, 50, 70, 300):
        assert compute_attack_ramp(paper, update, 10) == pytest.approx(min(update // 10, 5) / 5)
        assert compute_attack_ramp(both, update, 10) == pytest.approx(min(update / 50, 1))
        assert compute_ramp(paper, update, 10) == pytest.approx(min(0.05 * update / 10, 1))
        assert compute_attack_ramp(same, update, 10) == compute_ramp(same, update, 10)
    assert compute_attack_ramp(Config().replace(attack_ramp_epochs=0.0), 0, 10) == 1


def test_ramp_of_the_edge_recipe_is_the_papers() -> None:
    """alpha = min(1 + 0.09 * epoch, 19)."""
    cfg = load_recipe("swin_b_edge")
    for epoch in (0, 1, 50, 99, 200, 300):
        alpha = cfg.objective.edge.edge_weight * compute_ramp(cfg, 10 * epoch, 10)
        assert alpha == pytest.approx(min(1 + 0.09 * epoch, 19))


# ------------------------------------------------------------------------ the average of weights


@pytest.mark.parametrize("warmup", [False, True])
def test_average_follows_weights_and_buffers_in_fp32(warmup: bool) -> None:
    cfg = OptimizerConfig(model_ema_decay=0.4, model_ema_warmup=warmup)
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).to(torch.bfloat16)
    average = build_average(cfg, model)
    assert average is not None
    want = {n: t.float().clone() for n, t in model.state_dict().items()}
    for update in range(1, 5):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.5)
            model[1].running_mean.add_(1.0)
            model[1].num_batches_tracked.add_(1)
        update_average(cfg, average, model, update)
        # 0, 0.37, 0.52, ...: the n-th update's 1 - n^(-2/3), until it reaches the configured one
        decay = min(0.4, 1 - update ** (-2 / 3)) if warmup else 0.4
        for name, tensor in model.state_dict().items():
            want[name] = (
                tensor.float()
                if "tracked" in name
                else decay * want[name] + (1 - decay) * tensor.float()
            )
    for name, tensor in average.module.state_dict().items():
        assert tensor.dtype == (torch.int64 if "tracked" in name else torch.float32)
        # a lerp and a weighted sum round differently in fp32
        assert torch.allclose(tensor.float(), want[name], rtol=1e-5, atol=1e-6), name
    assert not any(p.requires_grad for p in average.module.parameters())
    assert build_average(OptimizerConfig(model_ema=False), model) is None


def test_a_weight_with_two_names_is_averaged_once_an_update() -> None:
    """As the position encodings that CoaT's blocks share."""
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    cfg = OptimizerConfig(model_ema_decay=0.75, model_ema_warmup=False)
    average = build_average(cfg, model)
    assert average is not None
    start = model[0].weight.detach().clone()
    with torch.no_grad():
        model[0].weight.add_(1.0)
    update_average(cfg, average, model, 1)
    assert torch.allclose(average.module[0].weight, start + 0.25)
    assert average.module[1].weight is average.module[0].weight


@pytest.mark.parametrize("warmup", [False, True])
@pytest.mark.parametrize("n", [1, 7, 440])
def test_share_of_the_initial_weights(n: int, warmup: bool) -> None:
    """What is left of ones in the average of ones and then zeros. At the default decay and after
    440 updates it is 92 % without a warm-up, and nothing with it."""
    cfg = OptimizerConfig(model_ema_warmup=warmup)
    model = nn.Linear(1, 1, bias=False).double()
    nn.init.ones_(model.weight)
    average = build_average(cfg, model)
    assert average is not None
    nn.init.zeros_(model.weight)
    for update in range(1, n + 1):
        update_average(cfg, average, model, update)
    assert average.module.weight.item() == pytest.approx(compute_initial_share(cfg, n), abs=1e-4)
    assert compute_initial_share(cfg, 440) == pytest.approx(0.0 if warmup else 0.916, abs=1e-3)


def test_a_run_says_what_is_left_of_its_initial_weights(tmp_path, capsys) -> None:
    """At the start and at the end, and only where it matters."""
    line = "of the initial weights: use --model-ema-warmup or a lower --model-ema-decay"
    for warmup, times in (("--model-ema-warmup", 0), ("--no-model-ema-warmup", 2)):
        folder = tmp_path / warmup
        assert train.main(tiny_run(folder, warmup, "--max-updates", "3")) == 0
        said = capsys.readouterr().err
        assert said.count(line) == times
        assert said.count("will hold 100% " + line) == times // 2
        summary = json.loads((folder / "summary.json").read_text())
        assert summary["initial_weights_in_average"] == pytest.approx(0.9998**3 * times / 2)


def test_papers_recipes_keep_the_plain_decay() -> None:
    for name in recipe_names():
        cfg = load_recipe(name).optimizer
        assert cfg.model_ema_warmup != name.startswith("paper_"), name


# ---------------------------------------------------------------------------- kept epochs


def test_kept_epochs_stay_and_others_start_from_them(tmp_path: Path) -> None:
    """Outside --checkpoint-hist, and never what --resume goes on from."""
    args = tiny_run(tmp_path / "run", "--epochs", "3", "--keep-epochs", "1", "2")
    args += ["--batch-size", "480", "--checkpoint-hist", "1", "--checkpoint-interval", "1000"]
    assert train.main(args) == 0
    folder = tmp_path / "run" / "checkpoints"
    assert {p.name for p in folder.glob("[eu]*")} == {
        *("epoch_0001.pt", "epoch_0002.pt", "update_00000006.pt")
    }
    kept = read_state(folder / "epoch_0001.pt")
    assert (kept["update"], kept["epoch"]) == (2, 1.0)
    last = Checkpoints(tmp_path / "run", 1).last()
    assert last is not None and last.name == "update_00000006.pt"
    start = ("--initial-checkpoint", str(folder / "epoch_0001.pt"), "--lr", "1e-10")
    assert train.main(tiny_run(tmp_path / "next", *start, "--max-updates", "1")) == 0
    began = read_state(Checkpoints(tmp_path / "next", 1).path(1))["model"]
    for name, tensor in kept["ema"].items():
        assert torch.allclose(began[name], tensor, atol=1e-6), name
    (folder / "epoch_0001.pt").unlink()  # a resumed run needs its start no more
    assert train.main(["--resume", str(tmp_path / "next"), "--max-updates", "2"]) == 0


def test_a_kept_epoch_beyond_the_run_is_refused() -> None:
    with pytest.raises(UserError, match="^--keep-epochs 50 is after the last epoch, --epochs 30"):
        Config().replace(epochs=30, keep_epochs=[10, 50])
    assert Config().replace(keep_epochs=[10, 50]).run.keep_epochs == (10, 50)
