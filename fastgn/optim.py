"""Builds the optimizer and the moving average of the weights, and computes learning rates."""

import dataclasses
import importlib
import inspect
import math
from collections import Counter
from collections.abc import Iterable
from typing import Any, cast

import torch
from timm.optim import (
    create_optimizer_v2,
    get_optimizer_class,
    get_optimizer_info,
    list_optimizers,
    param_groups_weight_decay,
)
from timm.utils import ModelEmaV3
from torch import nn
from torch.utils._pytree import tree_leaves

from fastgn.config import Config, OptimizerConfig
from fastgn.errors import UserError, check, check_name

FEW_IMAGES = 1 / 8
"""Share of --lr-base-size. If an update has fewer images and --lr is not given, a line says how the
learning rate was chosen."""


def check_optimizer(cfg: OptimizerConfig, device: torch.device) -> None:
    """Raises UserError unless the configured optimizer can be used.

    timm must know the optimizer, and the package that it comes from must be installed. The
    optimizer must also support the given options and the device.
    """
    names = [str(name) for name in list_optimizers()]
    check_name(cfg.opt, names, f"--opt {cfg.opt!r}")
    info = get_optimizer_info(cfg.opt)
    for name, given, known in (
        ("--opt-eps", cfg.opt_eps, info.has_eps),
        ("--opt-betas", cfg.opt_betas, info.has_betas),
        ("--momentum", cfg.momentum, info.has_momentum),
    ):
        check(known or given is None, f"--opt {cfg.opt} has no {name}: leave {name} out")
    check(
        cfg.opt_betas is None or len(cfg.opt_betas) == info.num_betas,
        f"--opt-betas {' '.join(map(str, cfg.opt_betas or ()))}: --opt {cfg.opt} takes "
        f"{info.num_betas} betas",
    )
    check(
        not info.second_order,
        f"--opt {cfg.opt} needs products with the Hessian, which fastgn.train does not compute: "
        "use --opt adamw",
    )
    if isinstance(info.opt_class, str):  # the class is in another package, which needs a GPU
        package, _, name = info.opt_class.rpartition(".")
        check(
            package == "apex.optimizers",
            f"--opt {cfg.opt} belongs to {package.partition('.')[0]}, which fastgn.train does not "
            "support: use one of timm's own, such as --opt adamw or --opt lion",
        )
        check_apex(cfg.opt, name)
        check(device.type == "cuda", f"--opt {cfg.opt} needs a CUDA device: use --opt adamw")
        return
    try:
        create_optimizer(cfg, [{"params": [nn.Parameter(torch.zeros(2, 2))]}], peak=1e-3)
    except (ValueError, TypeError) as error:
        raise UserError(f"--opt {cfg.opt}: {' '.join(str(error).split())}") from None


def check_apex(opt: str, name: str) -> None:
    """Raises UserError unless NVIDIA's apex is installed and has an optimizer class of this name.

    PyPI has another package with the name apex, an unrelated toolkit of 2013. opt: value of --opt,
    for messages.
    """
    try:
        importlib.import_module("apex")
    except Exception:  # PyPI's apex, which is not NVIDIA's, may raise any error on recent Pythons
        raise UserError(
            f"--opt {opt} needs NVIDIA apex: build it from source (github.com/NVIDIA/apex), or use "
            "--opt adamw, which is torch's own fused AdamW"
        ) from None
    try:
        getattr(importlib.import_module("apex.optimizers"), name)
    except (ImportError, AttributeError):
        raise UserError(
            f"--opt {opt}: the installed package apex is not NVIDIA's: run pip uninstall apex and "
            "build NVIDIA's apex from source, or use --opt adamw"
        ) from None


def build_optimizer(cfg: OptimizerConfig, model: nn.Module, peak: float) -> torch.optim.Optimizer:
    """Returns the configured optimizer for a model's weights.

    peak: highest learning rate of the run. Some optimizers need it to scale their weight decay.
    """
    return create_optimizer(cfg, make_decay_groups(model, cfg.weight_decay), peak)


def create_optimizer(cfg: OptimizerConfig, groups: list[dict[str, Any]], peak: float) -> Any:
    """Returns timm's optimizer for parameter groups. On CUDA it uses PyTorch's fused kernels.

    peak: highest learning rate of the run.
    """
    values = {"eps": cfg.opt_eps, "betas": cfg.opt_betas, "momentum": cfg.momentum}
    options: dict[str, Any] = {k: v for k, v in values.items() if v is not None}
    kind = get_optimizer_class(cfg.opt, bind_defaults=False)
    if kind in (torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD):
        options["fused"] = groups[0]["params"][0].is_cuda
    if "deterministic" in inspect.signature(kind).parameters:
        # with this option, Kron draws the same random numbers on every rank and after a resume
        options["deterministic"] = True
    return create_optimizer_v2(groups, cfg.opt, lr=peak, **options)


def make_decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Returns two parameter groups, one with weight decay and one without.

    Weights of linear layers and convolutions get weight decay. Weights of normalisation layers,
    biases and relative-position tables get none. Neither do the parameters that the method
    `no_weight_decay` of a module names.
    """
    exempt = {n for n, _ in model.named_parameters() if "relative_position_bias_table" in n}
    for name, module in model.named_modules():
        names: Iterable[str] = getattr(module, "no_weight_decay", set)()
        exempt |= {f"{name}.{n}" if name else n for n in names}
    # use a decay of 1 first, because with 0 timm puts all parameters into one group
    groups = param_groups_weight_decay(model, 1.0, no_weight_decay_list=exempt)
    return [g | {"weight_decay": weight_decay * g["weight_decay"]} for g in reversed(groups)]


def load_state(
    cfg: OptimizerConfig,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    saved: dict[str, Any],
    updates: int,
) -> str | None:
    """Loads an optimizer's state from a checkpoint, if the state fits the model's weights.

    If it does not fit, returns the reason and loads nothing. Otherwise returns None. Of the options
    of the parameter groups, only the learning rate is loaded, which each update sets anyway. The
    command line or the device may have changed the others.

    updates: number of updates that the optimizer has made. After the first update it must have a
    state for each weight that receives a gradient.
    """
    mine, theirs = optimizer.param_groups, saved["param_groups"]
    if [len(g["params"]) for g in mine] != [len(g["params"]) for g in theirs]:
        return "its groups have other numbers of weights than this network"
    numbers = [n for g in theirs for n in g["params"]]
    weights = dict(zip(numbers, (p for g in mine for p in g["params"]), strict=True))
    if len(weights) != len(numbers) or not saved["state"].keys() <= weights.keys():
        return "it numbers the weights in another way than this network"
    expected = simulate_first_states(cfg, model)
    for number, state in saved["state"].items():
        shape = weights[number].shape
        known = [s for s in expected if s.shape == shape]
        for name, value in state.items():
            shapes = [list_shapes(s.state[name]) for s in known if name in s.state]
            fits = list_shapes(value) in (shapes or [[None], [torch.Size(())], [shape]])
            if not fits:
                return f"{name} of weight {number}, which is {tuple(shape)}, has another shape"
            if not is_valid_state(name, value):
                return f"{name} of weight {number} has a value that training never gives it"
    lacking = {
        number: weight
        for number, weight in weights.items()
        if updates > 0
        and not has_complete_state(saved["state"].get(number, {}), weight.shape, expected)
    }
    if lacking:
        unused = find_unused_weights(model)
        number = next((n for n, weight in lacking.items() if id(weight) not in unused), None)
        if number is not None:
            return f"it lacks the state of {cfg.opt} for weight {number}"
    groups = [
        there | {k: here[k] for k in optimizer.defaults if k in here and k != "lr"}
        for there, here in zip(theirs, mine, strict=True)
    ]
    optimizer.load_state_dict(saved | {"param_groups": groups})
    return None


def is_valid_state(name: str, value: Any) -> bool:
    """Returns whether all numbers in one entry of an optimizer's state are possible.

    They must be finite. Averages of squares and numbers of steps must also be at least 0. name:
    name of the entry, such as "exp_avg_sq".
    """
    signed = name != "step" and not name.endswith("exp_avg_sq")
    for leaf in tree_leaves(value):
        if torch.is_tensor(leaf):
            if not bool(leaf.isfinite().all()) or not (signed or bool((leaf >= 0).all())):
                return False
        elif isinstance(leaf, (int, float)) and not (abs(leaf) < 2**53 and (signed or leaf >= 0)):
            return False
    return True


def has_complete_state(
    state: dict[str, Any], shape: torch.Size, expected: list["FirstState"]
) -> bool:
    """Returns whether a weight's state has every entry that the optimizer keeps for weights of its
    shape. expected: what `simulate_first_states` returns."""
    return any(first.state.keys() <= state.keys() for first in expected if first.shape == shape)


def find_unused_weights(model: nn.Module) -> set[int]:
    """Returns the id() of each weight that does not influence a classifier's output."""
    weights = [p for p in model.parameters() if p.requires_grad]
    size, device = cast(int, model.img_size), weights[0].device
    trained = [m for m in model.modules() if m.training]
    model.eval()
    output = model(torch.zeros(1, 3, size, size, device=device))
    grads = torch.autograd.grad(output.sum(), weights, allow_unused=True)
    for module in trained:
        module.training = True
    return {id(weight) for weight, grad in zip(weights, grads, strict=True) if grad is None}


def list_shapes(value: Any) -> list[torch.Size | str | None]:
    """Returns the shape of each value in an optimizer's state. A number has the shape ().

    For a value that is neither a tensor nor a number, the name of its type is returned.
    """
    return [
        leaf.shape
        if torch.is_tensor(leaf)
        else torch.Size(())
        if isinstance(leaf, (int, float))
        else type(leaf).__name__
        for leaf in tree_leaves(value)
    ]


@dataclasses.dataclass(frozen=True)
class FirstState:
    """Entries that an optimizer keeps for one weight after its first update."""

    shape: torch.Size
    """Shape of the weight."""
    count: int
    """Number of the model's weights that share this weight's shape, dtype and parameter group."""
    state: dict[str, Any]
    """Name of an entry that the optimizer keeps for a weight of this shape -> value of the entry
    after one update with a gradient of zeros."""


def simulate_first_states(cfg: OptimizerConfig, model: nn.Module) -> list[FirstState]:
    """Returns the entries that the optimizer will keep for each kind of weight in a model. Weights
    are of one kind if they have the same shape, dtype, device and parameter group.

    The function makes one tensor for each kind of weight, and lets a new optimizer update these
    tensors once. Therefore the result is right for every optimizer.
    """
    groups: list[dict[str, Any]] = []
    counts: list[int] = []
    for group in make_decay_groups(model, cfg.weight_decay):
        shapes = Counter((p.shape, p.dtype, p.device) for p in group["params"])
        tensors = [torch.zeros(s, dtype=d, device=where) for s, d, where in shapes]
        groups.append(group | {"params": [nn.Parameter(t) for t in tensors]})
        counts += shapes.values()
    optimizer = create_optimizer(cfg, groups, peak=1e-3)
    parameters = [p for group in groups for p in group["params"]]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    with torch.compiler.set_stance("force_eager"):  # otherwise timm's Kron would compile its step
        optimizer.step()
    return [
        FirstState(p.shape, count, dict(optimizer.state[p]))
        for count, p in zip(counts, parameters, strict=True)
    ]


def measure_state_bytes(cfg: OptimizerConfig, model: nn.Module) -> int:
    """Returns the number of bytes that the optimizer will keep for a model's weights."""
    return sum(
        first.count * sum(t.nbytes for t in tree_leaves(first.state) if torch.is_tensor(t))
        for first in simulate_first_states(cfg, model)
    )


def missing_state_bytes(
    cfg: OptimizerConfig, model: nn.Module, optimizer: torch.optim.Optimizer
) -> int:
    """Returns the number of bytes that the optimizer's first step will allocate.

    Returns 0 if the optimizer has made a step already.
    """
    return 0 if optimizer.state else measure_state_bytes(cfg, model)


def compute_peak_lr(cfg: OptimizerConfig, global_batch: int) -> float:
    """Returns the peak learning rate.

    It is --lr, or else lr_base * global_batch / lr_base_size. Raises UserError if the peak is out
    of range, or below a given --warmup-lr or --min-lr. global_batch: images per update over all
    ranks.
    """
    peak = cfg.lr if cfg.lr is not None else cfg.lr_base * global_batch / cfg.lr_base_size
    cfg.check_peak(peak)
    return peak


def describe_low_lr(cfg: OptimizerConfig, images: int) -> list[str]:
    """Returns a line that says how the learning rate was chosen if --lr is not given and an update
    has few images.

    Otherwise returns no line. The learning rate is proportional to the number of images per update,
    so with few images it can be too low to learn. images: number of images per update.
    """
    if cfg.lr is not None or images >= FEW_IMAGES * cfg.lr_base_size:
        return []
    return [
        f"no --lr: the peak learning rate is only {compute_peak_lr(cfg, images):.3g} (--lr-base "
        f"{cfg.lr_base:g} x {images} images per update / --lr-base-size "
        f"{cfg.lr_base_size}): if the network learns too slowly, give a higher --lr"
    ]


def compute_lr(cfg: OptimizerConfig, update: int, updates_per_epoch: int, peak: float) -> float:
    """Returns the learning rate of an update.

    The rate grows linearly during the warm-up and then follows a cosine to the lowest rate. As in
    timm, the cosine begins at epoch 0 and covers all epochs. update: index of the update, from 0.
    peak: highest learning rate.
    """
    start, lowest = cfg.outer_rates(peak)
    epoch = (
        update / updates_per_epoch if cfg.sched_on_updates else float(update // updates_per_epoch)
    )
    if epoch < cfg.warmup:
        return start + (peak - start) * epoch / cfg.warmup
    return lowest + 0.5 * (peak - lowest) * (1 + math.cos(math.pi * epoch / cfg.epochs))


def compute_ramp(cfg: Config, update: int, updates_per_epoch: int) -> float:
    """Returns the factor by which an update multiplies the method's penalty.

    The factor grows linearly from ramp_start to 1 during the first ramp_epochs epochs. update:
    index of the update, from 0.
    """
    return grow_linearly(cfg.objective.ramp_start, cfg.ramp_epochs, update / updates_per_epoch)


def compute_attack_ramp(cfg: Config, update: int, updates_per_epoch: int) -> float:
    """Returns the factor by which an update multiplies the step size of the method's attack.

    The factor grows linearly from ramp_start to 1 in the first attack_ramp_epochs epochs, or in the
    first ramp_epochs epochs if attack_ramp_epochs is None. update: index of the update, from 0.
    """
    own, epoch = cfg.objective.attack.attack_ramp_epochs, update / updates_per_epoch
    if not cfg.objective.attack.attack_ramp_on_updates:
        epoch //= 1
    return grow_linearly(cfg.objective.ramp_start, cfg.ramp_epochs if own is None else own, epoch)


def grow_linearly(start: float, epochs: float, epoch: float) -> float:
    """Returns a value that grows linearly from `start` to 1 and then stays 1.

    epochs: number of epochs after which the value is 1. epoch: number of epochs done so far, which
    may have a fraction.
    """
    return start + (1 - start) * (min(epoch / epochs, 1.0) if epochs else 1.0)


def build_average(cfg: OptimizerConfig, model: nn.Module) -> ModelEmaV3 | None:
    """Returns the exponential moving average of a model's weights and buffers in fp32.

    Returns None if no average is configured.
    """
    if not cfg.model_ema:
        return None
    # In some networks, such as CoaT, one weight has several names.
    # With exclude_buffers=True, timm does not average a weight several times if it has many names.
    named = model.state_dict(keep_vars=True).values()
    shared = len({id(tensor) for tensor in named}) < len(named)
    average = ModelEmaV3(
        model,
        decay=cfg.model_ema_decay,
        use_warmup=cfg.model_ema_warmup,
        exclude_buffers=shared,
    )
    average.module.float().requires_grad_(False)
    return average


def update_average(
    cfg: OptimizerConfig, average: ModelEmaV3, model: nn.Module, update: int
) -> None:
    """Updates the moving average of the weights after an update. Does not wait for the device.

    update: number of updates done.
    """
    average.update(model, step=update if cfg.model_ema_warmup else None)


def compute_initial_share(cfg: OptimizerConfig, updates: int) -> float:
    """Returns the factor with which the initial weights enter the moving average of the weights.

    updates: number of updates done. In fp16, skipped updates are among them, so the true factor is
    a little larger. With --model-ema-warmup the factor is 0, because the first update replaces the
    initial weights completely.
    """
    return 0.0 if cfg.model_ema_warmup else cfg.model_ema_decay**updates
