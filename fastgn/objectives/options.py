"""The methods of --method: what each one minimises, and its options.

This module does not import torch, which takes seconds, because it is imported to parse the command
line. The loss functions in `methods/` take their defaults from these classes.
"""

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Literal

from fastgn.errors import check, check_name
from fastgn.fields import EPOCHS, IMAGES, PIXELS, PROBABILITY, WEIGHT, Options, Range, format_number


@dataclasses.dataclass(frozen=True)
class GradnormOptions(Options):
    """Options of gradnorm and gradnorm+fgsm, which penalise the norm of the input gradient. The
    defaults come from arXiv 2409.20139, equation 2."""

    ce_weight: Annotated[float, WEIGHT] = 0.8
    """Weight of the cross-entropy."""
    gn_weight: Annotated[float, WEIGHT] = 1.2
    """Full weight of the penalty on the norm of the input gradient. It is reached after
    --ramp-epochs."""
    eps: Annotated[float, PIXELS] = 4 / 255
    """Size of the perturbation that the penalty stands for, in 0..1 pixel units. The penalty is the
    norm of the gradient, multiplied by eps / sigma."""
    sigma: Annotated[float, Range(1e-6, 1e6)] = 0.225
    """Standard deviation by which the normalisation divides pixels. Only the factor eps / sigma of
    the penalty uses it. One number stands for all channels, as in arXiv 2409.20139."""
    gn_norm: Literal["l1", "l2", "l2_squared"] = "l1"
    """Norm of each image's input gradient that is penalised."""
    gn_of: Literal["loss", "logit"] = "loss"
    """Value whose input gradient is penalised: the cross-entropy, or the logit of the true
    class."""
    gn_channel_weights: Annotated[tuple[float, float, float] | None, WEIGHT] = None
    """Factors by which the red, green and blue channel of the input gradient are multiplied before
    the norm is taken. None means 1 for each channel."""
    gn_threshold: Annotated[float, Range(0, 1e9)] = 0.0
    """Penalise only the part of the norm above this value. The norm is that of the gradient with
    respect to the normalised image, before the multiplication by eps / sigma."""
    gn_start: Annotated[float, PIXELS] = 0.0
    """Compute the loss and its gradient at a random point near each image. The point is drawn
    uniformly within this Linf radius in 0..1 pixel units. 0 means at the image itself."""
    gn_attacked: bool = False
    """Compute the cross-entropy and the penalty at images that PGD has attacked, instead of at the
    images themselves. The attack_ options describe the attack (gradnorm only)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(
            self.gn_channel_weights is None or sum(self.gn_channel_weights) > 0,
            "--gn-channel-weights 0 0 0 leaves no gradient: give a channel a weight above 0",
        )
        check(
            not (self.gn_attacked and self.gn_start),
            f"--gn-start {format_number(self.gn_start)} and --gn-attacked both move the images: "
            "use only one of them",
        )

    @property
    def is_variant(self) -> bool:
        """Whether the penalty is anything but the L1 norm of the loss's gradient at the images."""
        return bool(
            self.gn_norm != "l1"
            or self.gn_of != "loss"
            or self.gn_channel_weights
            or self.gn_threshold
            or self.gn_start
        )


@dataclasses.dataclass(frozen=True)
class GradnormFgsmOptions(Options):
    """Options of gradnorm+fgsm, which uses the penalty only in some updates."""

    gn_share: Annotated[
        float, Range(0, 1, above=True, hint="for no penalty use --method fgsm_rs")
    ] = 0.5
    """Share of the updates that have the penalty. These updates are spread evenly. 1 means that all
    updates have it."""


@dataclasses.dataclass(frozen=True)
class AttackOptions(Options):
    """Options of the attack on the training images. The methods pgd_at, fgsm_rs, n_fgsm, trades and
    gradnorm+fgsm use it, and so does gradnorm with --gn-attacked. (fgsm_rs, n_fgsm and
    gradnorm+fgsm always take one step.)"""

    attack_eps: Annotated[float, PIXELS] = 4 / 255
    """Linf radius of the attack in 0..1 pixel units."""
    attack_step: Annotated[float | None, PIXELS] = None
    """Size of an attack step in 0..1 pixel units. None means 2 * attack_eps / attack_it, but
    1.25 * attack_eps for fgsm_rs and gradnorm+fgsm, and attack_eps for n_fgsm."""
    attack_it: Annotated[int, Range(1, 10_000)] = 3
    """Number of attack steps."""
    attack_select: Literal["last", "best", "paper"] = "last"
    """Which attacked images to train on. last: the images after the last step. best: each image
    after the step that gave it the highest loss (costs one more forward pass). paper: the same as
    best, but the extra forward pass gets images that are not normalised, as in the code of arXiv
    2409.20139."""
    attack_ramp_epochs: Annotated[float | None, EPOCHS] = None
    """Epochs over which the attack's step size grows to its full value. None means the value of
    --ramp-epochs."""
    attack_ramp_on_updates: bool = True
    """Let the attack's step size grow at every update (see --attack-ramp-epochs). If off, it grows
    only once per epoch and is 0 in the first epoch, as in the code of arXiv 2409.20139."""
    attack_weight_grads: bool = False
    """Compute, all-reduce and discard weight gradients at every attack step, as the code of arXiv
    2409.20139 does. Use it only to compare costs, because the attacked images stay the same."""

    @property
    def step_size(self) -> float:
        """Size of each of the attack's `attack_it` steps, in 0..1 pixel units. Methods whose attack
        always takes one step use `single_step_size` or `noisy_step_size`."""
        return (
            2 * self.attack_eps / self.attack_it if self.attack_step is None else self.attack_step
        )

    @property
    def single_step_size(self) -> float:
        """Size of the step in 0..1 pixel units if the attack has one step from a random start."""
        return 1.25 * self.attack_eps if self.attack_step is None else self.attack_step

    @property
    def noisy_step_size(self) -> float:
        """Size of the step of n_fgsm in 0..1 pixel units."""
        return self.attack_eps if self.attack_step is None else self.attack_step


@dataclasses.dataclass(frozen=True)
class NFgsmOptions(Options):
    """Options of n_fgsm, which trains on images with strong noise and one attack step."""

    attack_noise: Annotated[float, Range(0, 100)] = 2.0
    """Largest change of a pixel by the noise from which the attack's step starts, divided by
    attack_eps (n_fgsm only)."""


@dataclasses.dataclass(frozen=True)
class TradesOptions(Options):
    """Options of trades, which penalises the divergence between the predictions for images and for
    their attacked versions."""

    trades_beta: Annotated[float, WEIGHT] = 6.0
    """Weight of the divergence between predictions for images and for attacked images."""


@dataclasses.dataclass(frozen=True)
class EdgeOptions(Options):
    """Options of edge, which penalises the difference between input gradients and the edges in the
    image, which a filter finds."""

    edge_of: Literal["logit", "loss"] = "logit"
    """Value whose input gradient is compared with the image's edges: the logit of a sampled class,
    or the cross-entropy."""
    edge_weight: Annotated[float, WEIGHT] = 19.0
    """Full weight of the penalty on the difference between input gradients and edges. It is reached
    after --ramp-epochs. In arXiv 2409.20139 the weight grows from 1 to 19 in 200 epochs."""
    edge_temperature: Annotated[float, Range(1e-3, 1e6)] = 0.5
    """Temperature of the softmax over the logits. With --edge-of logit, this softmax is used to
    sample the class whose logit is differentiated."""
    edge_sampling: Literal["hard", "relaxed"] = "hard"
    """How to sample the class whose logit is differentiated with --edge-of logit. hard: draw one
    class from softmax(logits / temperature). relaxed: weight all logits by softmax((logits + Gumbel
    noise) / temperature), and differentiate the weights as well."""
    edge_map: Literal["gradient", "saliency"] = "gradient"
    """What is compared with the image's edges. gradient: the signed gradient of every channel.
    saliency: the largest magnitude of the gradient over the channels."""
    edge_rms: Literal["batch", "image"] = "batch"
    """Input gradients and edges are each divided by their root mean square before they are
    compared. batch: one root mean square over all images of a micro-batch, as in the code of arXiv
    2409.20139. image: one root mean square for each image."""


@dataclasses.dataclass(frozen=True)
class PagOptions(Options):
    """Options of pag, which penalises the angle between input gradients and the direction to a
    representative image."""

    pag_weight: Annotated[float, WEIGHT] = 15.0
    """Full weight of the penalty of --method pag, which is reached after --ramp-epochs. The code of
    the method's authors uses 15, too."""
    pag_representative: Literal["class-mean", "nearest-neighbour", "random-image"] = "class-mean"
    """Image to which the input gradient for a class should point. class-mean: the mean of the
    class's training images. nearest-neighbour: the training image of the class that is nearest to
    the image (only for data that fits on the device). random-image: one training image of the
    class, drawn at random with --seed."""
    pag_images: Annotated[int, IMAGES] = 100
    """Number of image files from which each class mean is computed, drawn at random with --seed.
    For cifar10 and digits the class means are computed from all images."""


@dataclasses.dataclass(frozen=True)
class Method:
    """What the command line needs to know about a method of --method without importing torch.

    The method's loss is in the module of fastgn.objectives.methods that has the method's name (with
    _ in place of +). There, a function `build` makes an Objective from the method's options.
    """

    minimises: str
    """What an update minimises, in the words of `--list methods`."""
    options: tuple[type[Options], ...] = ()
    """Classes of the method's options, in the order in which its `build` takes them."""
    has_penalty: bool = False
    """Whether the method's loss contains a gradient of the network with respect to the images,
    which it penalises."""
    has_attack: bool = False
    """Whether every update trains on attacked images."""
    step_size: Literal["step_size", "single_step_size", "noisy_step_size"] = "step_size"
    """Name of the property of AttackOptions that gives the size of the attack's step. Without
    --attack-step, the three properties compute it in different ways."""
    needs_representatives: bool = False
    """Whether the method's `build` also takes base.Representatives, images that represent the
    classes."""


METHODS: Mapping[str, Method] = {
    "natural": Method("cross-entropy"),
    "gradnorm": Method(
        "cross-entropy plus the L1 norm of its input gradient, by double backprop",
        (GradnormOptions, AttackOptions),
        has_penalty=True,
    ),
    "pgd_at": Method("cross-entropy at PGD's images", (AttackOptions,), has_attack=True),
    "fgsm_rs": Method(
        "cross-entropy after one attack step from a random start",
        (AttackOptions,),
        has_attack=True,
        step_size="single_step_size",
    ),
    "n_fgsm": Method(
        "cross-entropy after strong noise and one attack step, which may leave the eps ball",
        (NFgsmOptions, AttackOptions),
        has_attack=True,
        step_size="noisy_step_size",
    ),
    "trades": Method(
        "cross-entropy plus the divergence between predictions for images and attacked ones",
        (TradesOptions, AttackOptions),
        has_attack=True,
    ),
    "edge": Method(
        "cross-entropy plus the difference between a logit's input gradient and the image's edges",
        (EdgeOptions,),
        has_penalty=True,
    ),
    "pag": Method(
        "cross-entropy plus the angle between input gradients and a representative of the class",
        (PagOptions,),
        has_penalty=True,
        needs_representatives=True,
    ),
    "gradnorm+fgsm": Method(
        "gradnorm on a share of the updates, fgsm_rs on the others",
        (GradnormFgsmOptions, GradnormOptions, AttackOptions),
        has_penalty=True,
        step_size="single_step_size",
    ),
}
"""Value of --method -> what the command line needs to know about this method."""
if TYPE_CHECKING:
    MethodName = str
else:  # tyro reads the choices of --method from this type
    MethodName = Literal[tuple(METHODS)]


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig(Options):
    """What an update minimises."""

    method: MethodName = "gradnorm"
    """What an update minimises. `--list methods` explains each method."""
    ramp_epochs: Annotated[float | None, EPOCHS] = None
    """Epochs over which the weight of the penalty, or the step size of the attack, grows linearly
    to its full value. None means 5, but at most a tenth of --epochs."""
    ramp_start: Annotated[float, PROBABILITY] = 0.0
    """Weight of the penalty, or step size of the attack, at the first update, as a share of its
    full value."""
    gradnorm: GradnormOptions = GradnormOptions()
    gradnorm_fgsm: GradnormFgsmOptions = GradnormFgsmOptions()
    attack: AttackOptions = AttackOptions()
    n_fgsm: NFgsmOptions = NFgsmOptions()
    trades: TradesOptions = TradesOptions()
    edge: EdgeOptions = EdgeOptions()
    pag: PagOptions = PagOptions()

    def __post_init__(self) -> None:
        super().__post_init__()
        check_name(self.method, METHODS, f"--method {self.method!r}")
        check(
            not self.gradnorm.gn_attacked or self.method == "gradnorm",
            f"--gn-attacked is an option of --method gradnorm: leave it out with {self.method}",
        )
        check(
            self.method != "trades" or self.attack.attack_select != "paper",
            "--attack-select paper imitates PGD-3 of arXiv 2409.20139, which is not the attack of "
            "trades: with --method trades use best or last",
        )

    @property
    def own_options(self) -> tuple[Options, ...]:
        """Options of the configured method, in the order in which its `build` takes them."""
        by_class = {type(value): value for value in vars(self).values()}
        return tuple(by_class[kind] for kind in METHODS[self.method].options)

    @property
    def has_penalty(self) -> bool:
        """Whether the method's loss penalises a gradient with respect to the images. The gradients
        that an attack uses do not count."""
        return METHODS[self.method].has_penalty

    @property
    def has_attack(self) -> bool:
        """Whether every update trains on attacked images."""
        return METHODS[self.method].has_attack or self.gradnorm.gn_attacked

    @property
    def takes_turns(self) -> bool:
        """Whether only some updates minimise a penalty, while the others minimise another loss."""
        shared = GradnormFgsmOptions in METHODS[self.method].options
        return shared and self.gradnorm_fgsm.gn_share < 1

    @property
    def allows_differences(self) -> bool:
        """Whether a finite difference of the cross-entropy can replace the penalty."""
        return GradnormOptions in METHODS[self.method].options and not self.gradnorm.is_variant

    @property
    def single_step(self) -> bool:
        """Whether the method trains on images after an attack of one step."""
        several = METHODS[self.method].step_size == "step_size"
        return (self.has_attack and self.attack.attack_it == 1) if several else True

    @property
    def step_size(self) -> float:
        """Size of an attack step in 0..1 pixel units, with the method's default filled in."""
        size: float = getattr(self.attack, METHODS[self.method].step_size)
        return size


def find_schedule_conflict(
    schedule: str,
    name: str,
    *,
    has_penalty: bool,
    takes_turns: bool,
    allows_differences: bool,
    ce_weight: float,
) -> str | None:
    """Returns why a value of --schedule does not suit a method, or None if it does.

    The text also says what to use instead. schedule: value of --schedule, a way to compute the
    penalty. name: name of the method for the text. has_penalty: whether the loss has a penalty.
    takes_turns: whether only some updates have the penalty. allows_differences: whether a finite
    difference can replace the penalty. ce_weight: weight of the cross-entropy.
    """
    if schedule in ("auto", "exact", "exact-eager"):
        return None
    if not has_penalty:
        return f"is a way to compute a penalty, but {name} has no penalty: use exact"
    if takes_turns:
        return (
            f"cannot be used, because only some updates of {name} have the penalty: use exact, or "
            "gradnorm"
        )
    if schedule in ("finite-difference", "central-difference") and not allows_differences:
        return (
            "computes only the L1 norm of the loss's gradient, but with these options "
            f"{name} has another penalty: use exact"
        )
    if schedule == "central-difference" and ce_weight < 1e-7:
        return (
            "takes its direction from the weighted gradient of the cross-entropy: use a weight "
            "(--ce-weight) of at least 1e-7, or finite-difference"
        )
    return None


def piecewise_linear_warning(cfg: ObjectiveConfig, counts: dict[str, int]) -> str | None:
    """Returns a warning if the method's penalty gets almost no signal through the activations.

    This is so if the penalty is differentiated twice and the model has piecewise-linear
    activations, such as ReLU. Otherwise returns None. counts: {class name: number of modules} of
    the model's piecewise-linear activations.
    """
    if not cfg.has_penalty or not counts:
        return None
    found = ", ".join(f"{n} {name}" for name, n in counts.items())
    return (
        f"{cfg.method} gets almost no signal through piecewise-linear activations ({found}): their "
        "second derivative is 0. Replace them with --activation gelu (or silu)."
    )
