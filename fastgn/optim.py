"""AdamW with the right parameters decayed, and the schedule as a pure function of the update."""

import importlib
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from fastgn.config.groups import ObjectiveConfig, OptimizerConfig
from fastgn.errors import UserError


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two parameter groups: matrices and convolutions decay; norms, biases, relative-position
    tables and whatever the network's own `no_weight_decay` names do not."""
    exempt: set[str] = set()
    for name, module in model.named_modules():
        names: Iterable[str] = getattr(module, "no_weight_decay", set)()
        exempt |= {f"{name}.{n}" if name else n for n in names}
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        spared = parameter.ndim < 2 or name in exempt or "relative_position_bias_table" in name
        (plain if spared else decayed).append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    return [g for g in groups if g["params"]]


def build_optimizer(cfg: OptimizerConfig, model: nn.Module) -> torch.optim.Optimizer:
    """Raises UserError where apex is asked for and NVIDIA's is not there."""
    groups = decay_groups(model, cfg.weight_decay)
    on_cuda = next(model.parameters()).is_cuda
    options: dict[str, Any] = {"lr": cfg.warmup_lr, "betas": cfg.opt_betas, "eps": cfg.opt_eps}
    if cfg.opt == "fusedadamw":
        fused_adam = find_fused_adam()
        if not on_cuda:
            raise UserError("--opt fusedadamw needs a CUDA device; use --opt adamw")
        return fused_adam(groups, adam_w_mode=True, **options)
    return torch.optim.AdamW(groups, fused=on_cuda, **options)


def find_fused_adam() -> Any:
    """NVIDIA apex's FusedAdam. The package `apex` on PyPI is an unrelated toolkit of 2013."""
    try:
        importlib.import_module("apex")
    except Exception:  # the unrelated package fails in its own ways on a current Python
        raise UserError(
            "--opt fusedadamw needs NVIDIA apex (built from source, github.com/NVIDIA/apex); "
            "--opt adamw uses torch's own fused AdamW"
        ) from None
    try:
        return importlib.import_module("apex.optimizers").FusedAdam
    except (ImportError, AttributeError):
        raise UserError(
            "--opt fusedadamw: the installed apex is not NVIDIA's (PyPI's apex is unrelated): pip "
            "uninstall apex and build NVIDIA's from source, or use --opt adamw"
        ) from None


def peak_lr(cfg: OptimizerConfig, global_batch: int) -> float:
    """lr, or lr_base scaled linearly by the images an update."""
    return cfg.lr if cfg.lr is not None else cfg.lr_base * global_batch / cfg.lr_base_size


def lr_at(cfg: OptimizerConfig, update: int, updates_per_epoch: int, peak: float) -> float:
    """The learning rate of an update (from 0): linear warm-up, then a cosine over all epochs to
    min_lr (timm's, whose cosine runs from epoch 0)."""
    epoch = (
        update / updates_per_epoch if cfg.sched_on_updates else float(update // updates_per_epoch)
    )
    if epoch < cfg.warmup_epochs:
        return cfg.warmup_lr + (peak - cfg.warmup_lr) * epoch / cfg.warmup_epochs
    return cfg.min_lr + 0.5 * (peak - cfg.min_lr) * (1 + math.cos(math.pi * epoch / cfg.epochs))


def ramp_at(cfg: ObjectiveConfig, update: int, updates_per_epoch: int) -> float:
    """alpha, the method's strength at an update (from 0): clip(fractional epoch / ramp_epochs, 0,
    1), of the way from ramp_start to 1."""
    grown = 1.0
    if cfg.ramp_epochs:
        grown = min(update / updates_per_epoch / cfg.ramp_epochs, 1.0)
    return cfg.ramp_start + (1 - cfg.ramp_start) * grown
