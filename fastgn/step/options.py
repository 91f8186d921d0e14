"""Options of an update: everything that `Step` needs beside the network and the objective."""

import dataclasses

from fastgn.step.precision import PRECISIONS
from fastgn.step.schedule import Schedule


@dataclasses.dataclass(frozen=True)
class Quirks:
    """Peculiarities of the code of arXiv 2409.20139 that change an update or its time. All are off
    by default."""

    accumulation: str = "mean"
    """"mean" averages the losses of the batches of an update, and "sum" adds them up."""
    train_in_eval_mode: bool = False
    """Whether the network is trained in eval mode, which freezes BatchNorm's statistics."""
    attack_weight_grads: bool = False
    """Whether each step of an attack also computes the weights' gradients, which nothing uses."""
    sync_micro_batches: bool = False
    """Whether the host waits for the device after each micro-batch."""


@dataclasses.dataclass(frozen=True)
class StepOptions:
    """How an update is computed. None of these options changes what is minimised."""

    schedule: Schedule = Schedule()  # noqa: RUF009 - frozen
    """The way in which the penalty is differentiated (--schedule)."""
    precision: str = "fp32"
    """"fp32", "tf32", "bf16", "bf16-pure", "fp16" or "fp16-pure". "bf16" and "fp16" use autocast.
    "bf16-pure" and "fp16-pure" compute the whole update with weights and activations of 16 bits,
    see precision.InShortDtype. In fp16 the loss is scaled, see fastgn.loss_scale."""
    compile: bool = True
    """Whether the loss is compiled into one graph. With --schedule exact-eager it never is."""
    activation_memory_budget: float = 1.0
    """Share of the activations that a compiled update keeps. Its backward recomputes the rest."""
    micro_batch: int | None = None
    """Number of images that pass through the network at a time. It must divide the size of every
    batch. None means the whole batch."""
    fewest: int = 1
    """Smallest micro-batch that is tried if memory runs out."""
    cuda_graphs: bool = False
    """Whether each compiled graph is recorded as a CUDA graph, whose kernels the host starts with
    one launch. Ignored if the loss is not compiled or the device is not CUDA."""
    grad_sync: str = "flat"
    """"flat" sums the gradients over the processes when the backward has ended. "overlap" sums them
    during a compiled backward, if the update has only one micro-batch. Otherwise "overlap" does the
    same as "flat"."""
    grad_dtype: str = "fp32"
    """Dtype in which gradients are sent between processes. "bf16" means bf16. "fp32" means the
    dtype of each weight, which usually is fp32."""
    communicates: bool = False
    """Whether the network's forward in train mode sends something to other processes, as with
    --sync-bn. An update that runs out of memory in such a forward cannot be repeated."""
    quirks: Quirks = Quirks()  # noqa: RUF009 - frozen

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise ValueError(
                f"precision {self.precision!r} should be one of {', '.join(PRECISIONS)}"
            )

    @property
    def is_compiled(self) -> bool:
        """Whether the loss is compiled, which --schedule exact-eager rules out."""
        return self.compile and self.schedule.kind != "exact-eager"
