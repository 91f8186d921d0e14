"""Computes updates in smaller micro-batches when the device runs out of memory."""

import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastgn.objectives import Loss
from fastgn.step.random_state import RandomState
from fastgn.step.step import Batches, PeerOutOfMemory, Step
from fastgn.step.waits import WaitTimer


def out_of_memory(error: BaseException) -> bool:
    """Returns whether an error says that a device or the host had no memory left.

    PyTorch's allocator raises torch.OutOfMemoryError. Libraries that allocate memory themselves,
    such as cuBLAS, Triton and NCCL, raise a RuntimeError with other words.
    """
    if isinstance(error, torch.OutOfMemoryError):
        return True
    signs = ("out of memory", "STATUS_ALLOC_FAILED", "CUBLAS_STATUS_NOT_INITIALIZED")
    on_a_cpu = "can't allocate memory"
    return isinstance(error, RuntimeError) and any(s in str(error) for s in (*signs, on_a_cpu))


class RetryingStep:
    """Computes an update with a Step, and again in smaller micro-batches if memory runs out.

    A retry starts from the beginning of the update, with the same random numbers and the same
    BatchNorm statistics. Therefore all images of the update are used, each once.

    Several processes sum the gradients only after all of them have agreed that none has run out of
    memory. If the backward sums the gradients, the processes agree before the backward. They agree
    through CPU memory, while their devices still compute.

    step: computes the update. Its `micro_batch` is halved in all processes when memory runs out.
    report: function that is called with a line of text when the micro-batch was halved.
    reserve_bytes: memory that the optimizer will allocate after the first update. A first update
    that leaves less than that counts as out of memory.
    """

    def __init__(
        self,
        step: Step,
        report: Callable[[str], object] = warnings.warn,
        reserve_bytes: int = 0,
    ):
        self.step = step
        self.report = report
        self.reserve_bytes = reserve_bytes
        self.waits = WaitTimer(step.device)
        """Time that this process has waited for the others in the sums of its updates, except for
        the first update."""
        self._has_run = False
        self._snapshot = Snapshot(step.device, step.statistics)

    def __call__(
        self,
        batches: Batches,
        ramp: Tensor,
        update: int = 0,
        attack_ramp: Tensor | None = None,
    ) -> Loss:
        """Adds the gradients of an update to the parameters' .grad. See Step.__call__.

        With several processes, the gradients are those of the mean loss of all processes.

        Raises torch.OutOfMemoryError if memory runs out and a retry is not possible:

        - because there is no smaller micro-batch,
        - because a .grad held a gradient before the call, which a retry would lose, or
        - because memory ran out in a backward that sums gradients over the processes.
        """
        keeps = self.step.has_gradients()
        while True:
            self._snapshot.save()
            failure: RuntimeError | None = None
            reserved = None
            try:
                reserved = torch.empty(
                    self.reserve_bytes, dtype=torch.uint8, device=self.step.device
                )
                loss = self.step(batches, ramp, update, attack_ramp)
                # allocate this memory before the processes agree that none has run out of memory
                sums = self.step.prepare_sums() if self.step.ranks.size > 1 else []
            except RuntimeError as error:
                # after a collective has begun, the other processes wait in it and cannot retry
                if not out_of_memory(error) or self.step.is_committed:
                    raise
                failure = error
            del reserved  # PyTorch's allocator keeps this memory for the next allocations
            if self.step.ranks.size > 1:
                self.waits.begin()
            failure = self._share_failure(failure)
            if failure is None:
                # After the first update the optimizer allocates its state in the reserved memory.
                # Later updates need no reserve.
                self.reserve_bytes = 0
                if self.step.ranks.size > 1:
                    self.step.sum_over_ranks(sums)
                    self.waits.end()
                    # in the first update, the processes wait because they compile at other speeds
                    if not self._has_run:
                        self.waits.reset()
                self._has_run = True
                return loss
            sums = []  # frees their memory
            if keeps:
                raise torch.OutOfMemoryError(str(failure))
            self._halve(len(batches[0][0]), str(failure))
            self._snapshot.restore()

    def restore_statistics(self, where: Tensor) -> None:
        """Undoes what the last update has done to the statistics of BatchNorm, if `where`, a bool
        scalar on the device, is True. The host does not wait for it."""
        self._snapshot.restore_buffers(where)

    def _share_failure(self, failure: RuntimeError | None) -> RuntimeError | None:
        """Returns the failure of this or another process, or None if all processes have succeeded.

        failure: the error of this process, or None if it has succeeded.
        """
        agreed = self.step.is_committed or isinstance(failure, PeerOutOfMemory)
        if agreed:
            return failure
        if self.step.ranks.any(failure is not None):
            return failure or PeerOutOfMemory()
        return None

    def _halve(self, batch_size: int, failure: str) -> None:
        """Sets the micro-batch to the largest divisor of the batch size that is at most half the
        present micro-batch.

        Also removes the gradients that the failed update has left. Raises torch.OutOfMemoryError if
        there is no such divisor. failure: message of this error.
        """
        step = self.step
        size = step.micro_batch or batch_size
        sizes = range(step.divisor, size // 2 + 1, step.divisor)
        fitting = [n for n in sizes if batch_size % n == 0 and n >= step.options.fewest]
        if not fitting:
            raise torch.OutOfMemoryError(failure)
        step.micro_batch = fitting[-1]
        step.gradients.clear()
        if step.device.type == "cuda":
            torch.cuda.empty_cache()
        self.report(
            f"out of memory with {size} images at a time: going on with {step.micro_batch} at a "
            "time, with the same number of images per update"
        )


class Snapshot:
    """Copies of buffers and of the state of the random number generators.

    With them, an update can be run again from the same start.
    """

    def __init__(self, device: torch.device, buffers: Sequence[Tensor]):
        self.device = device
        by_dtype: dict[torch.dtype, list[Tensor]] = {}
        for buffer in buffers:
            by_dtype.setdefault(buffer.dtype, []).append(buffer)
        self._copies = [(group, [b.clone() for b in group]) for group in by_dtype.values()]
        self._random_state = RandomState(device)

    def save(self) -> None:
        """Copies the present values of the buffers and the present state of the random number
        generators."""
        for buffers, copies in self._copies:
            torch._foreach_copy_(copies, buffers)
        self._random_state = RandomState(self.device)

    def restore(self) -> None:
        """Gives the buffers and the random number generators the values that the last `save` has
        copied."""
        for buffers, copies in self._copies:
            torch._foreach_copy_(buffers, copies)
        self._random_state.restore()

    def restore_buffers(self, where: Tensor) -> None:
        """Writes the values of the last `save` back into the buffers if `where` is True.

        where: bool scalar on the device.
        """
        for buffers, copies in self._copies:
            for buffer, copied in zip(buffers, copies, strict=True):
                torch.where(where, copied, buffer, out=buffer)
