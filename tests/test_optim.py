"""What is decayed, the schedule, the ramp, and the average of the weights."""

import math

import pytest
import timm
import torch
from torch import nn

from fastgn.config import load_recipe
from fastgn.config.groups import ObjectiveConfig, OptimizerConfig
from fastgn.ema import ModelEma
from fastgn.optim import build_optimizer, decay_groups, lr_at, peak_lr, ramp_at
from fastgn.preact_resnet import PreActResNet18


def swin() -> nn.Module:
    return timm.create_model(
        "swin_tiny_patch4_window7_224",
        img_size=16,
        patch_size=4,
        embed_dim=8,
        depths=(1, 1),
        num_heads=(1, 2),
        window_size=4,
    )


@pytest.mark.parametrize("build", [swin, lambda: PreActResNet18(width=4)])
def test_norms_biases_and_relative_position_tables_are_not_decayed(build) -> None:
    model = build()
    names = {id(p): name for name, p in model.named_parameters()}
    decayed, plain = ({names[id(p)] for p in g["params"]} for g in decay_groups(model, 0.05))
    assert decayed | plain == set(names.values()) and not decayed & plain
    spared = {n for n in names.values() if "norm" in n or n.endswith("bias") or "bias_table" in n}
    assert plain == spared
    assert [g["weight_decay"] for g in decay_groups(model, 0.05)] == [0.05, 0.0]


def test_decay_reaches_the_update() -> None:
    """With zero gradients AdamW moves the decayed weights alone."""
    model = PreActResNet18(width=4)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = build_optimizer(OptimizerConfig(weight_decay=0.5, warmup_lr=0.1), model)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {n for n, p in model.named_parameters() if p.ndim > 1}


def test_schedule() -> None:
    cfg = OptimizerConfig(epochs=10, warmup_epochs=2, warmup_lr=0.1, min_lr=0.01)
    values = [lr_at(cfg, update, 5, 1.0) for update in range(50)]
    assert values[0] == pytest.approx(0.1)
    assert values[5] == pytest.approx(0.55), "half-way through the warm-up, in the middle of it"
    assert values[10] == pytest.approx(0.01 + 0.495 * (1 + math.cos(math.pi * 0.2)))
    assert values[25] == pytest.approx(0.505), "the cosine's middle is the middle of all epochs"
    assert len(set(values)) == 50, "moves at every update"
    assert all(a > b for a, b in zip(values[10:], values[11:], strict=False))
    assert values[-1] > 0.01


def test_schedule_once_an_epoch() -> None:
    cfg = OptimizerConfig(epochs=10, warmup_epochs=2, warmup_lr=0.1, sched_on_updates=False)
    assert [lr_at(cfg, u, 5, 1.0) for u in range(5)] == [pytest.approx(0.1)] * 5
    assert [lr_at(cfg, u, 5, 1.0) for u in range(5, 10)] == [pytest.approx(0.55)] * 5


def test_peak_lr_scales_with_the_global_batch() -> None:
    assert peak_lr(OptimizerConfig(), 532) == pytest.approx(6.25e-4 * 532 / 512)
    assert peak_lr(OptimizerConfig(lr=0.003), 532) == 0.003


def test_ramp_is_the_papers() -> None:
    """alpha = clip(0.2 * fractional epoch, 0, 1): full from epoch 5."""
    for update in (0, 3, 17, 49, 50, 70):
        assert ramp_at(ObjectiveConfig(), update, 10) == pytest.approx(min(0.2 * update / 10, 1.0))
    assert ramp_at(ObjectiveConfig(ramp_epochs=0.0), 0, 10) == 1.0


def test_ramp_of_the_edge_recipe_is_the_papers() -> None:
    """alpha = min(1 + 0.09 * epoch, 19)."""
    cfg = load_recipe("swin_b_edge").objective
    for epoch in (0, 1, 50, 99, 200, 300):
        alpha = cfg.edge_weight * ramp_at(cfg, 10 * epoch, 10)
        assert alpha == pytest.approx(min(1 + 0.09 * epoch, 19))


def test_ema_follows_weights_and_buffers_in_fp32() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).to(torch.bfloat16)
    ema = ModelEma(model, 0.9)
    want = {n: t.float().clone() for n, t in model.state_dict().items()}
    for _ in range(3):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.5)
            model[1].running_mean.add_(1.0)
            model[1].num_batches_tracked.add_(1)
        ema.update(model)
        for name, tensor in model.state_dict().items():
            want[name] = (
                tensor.float() if "tracked" in name else 0.9 * want[name] + 0.1 * tensor.float()
            )
    for name, tensor in ema.module.state_dict().items():
        assert tensor.dtype == (torch.int64 if "tracked" in name else torch.float32)
        # a lerp and a weighted sum round differently in fp32
        assert torch.allclose(tensor.float(), want[name], rtol=1e-5, atol=1e-6), name
    assert not any(p.requires_grad for p in ema.module.parameters())
