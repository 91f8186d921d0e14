"""Counts correctly classified validation images during training, until a signal asks to stop."""

from collections.abc import Callable, Sequence
from contextlib import closing
from functools import partial
from itertools import islice

import torch
from torch import Tensor, nn

from fastgn import attacks
from fastgn.data.subset import Subset
from fastgn.distributed import World
from fastgn.seeding import Stream, seed_all
from fastgn.step.retry import out_of_memory

Attack = Callable[[nn.Module, Tensor, Tensor], Tensor]
"""Function (model, images, labels) -> attacked images."""

GOING_ON, OUT_OF_MEMORY, STOPPED = 0.0, -1.0, -2.0
"""States of a rank during an evaluation. The lowest state of any rank decides for all ranks."""


def choose_attacks(eps: float, fgsm: bool) -> list[Attack | None]:
    """Returns the attacks of an evaluation during training: no attack, PGD-10, and FGSM if wanted.

    None stands for no attack. eps: Linf radius of the attacks, with images in 0..1. fgsm: whether
    to add FGSM.
    """
    pgd = partial(attacks.pgd, eps=eps, step_size=eps / 4, steps=10)
    return [None, pgd, *([partial(attacks.fgsm, eps=eps)] if fgsm else [])]


def count_correct(
    model: nn.Module,
    subset: Subset,
    tried: Sequence[Attack | None],
    seed: int,
    world: World,
    is_signalled: Callable[[], bool],
) -> Tensor | None:
    """Returns this rank's numbers of correctly classified images, one for each attack, as `(A,),
    int64` on the device.

    Returns None on all ranks if a signal asks one of them to stop before its last batch. If the
    device of any rank runs out of memory, all ranks begin again with half as many images at once,
    and `subset.batch_size` becomes this number. Raises the device's error if it has no memory for a
    single image.

    subset: the rank's validation images. tried: the A attacks. None stands for no attack. seed: the
    run's seed. is_signalled: function that returns whether a signal has asked this rank to stop.
    """
    while True:
        seed_all(Stream.EVALUATION, seed, world.rank)
        counts_A, state = try_to_count(model, subset, tried, world, is_signalled)
        if state == GOING_ON:
            return counts_A
        if state == STOPPED:
            return None
        subset.batch_size //= 2
        if world.device.type == "cuda":
            torch.cuda.empty_cache()


def try_to_count(
    model: nn.Module,
    subset: Subset,
    tried: Sequence[Attack | None],
    world: World,
    is_signalled: Callable[[], bool],
) -> tuple[Tensor, float]:
    """Returns (numbers of correctly classified images, the lowest state of any rank).

    The numbers are complete only if the state is GOING_ON. The ranks agree before each batch. See
    `count_correct` for the arguments.
    """
    device, state = world.device, GOING_ON
    counts_A = torch.zeros(len(tried), dtype=torch.int64, device=device)
    for a, attack in enumerate(tried):
        with closing(iter(subset)) as batches:
            for _ in range(subset.most_batches):
                state = world.min(STOPPED if is_signalled() else state)
                if state != GOING_ON:
                    return counts_A, state
                try:
                    batch = islice(batches, 1)  # empty if this rank has fewer batches than others
                    counts_A[a] += attacks.count_correct(model, batch, attack, device=device)
                except RuntimeError as error:
                    if not out_of_memory(error) or subset.batch_size == 1:
                        raise
                    state = OUT_OF_MEMORY
    return counts_A, world.min(state)
