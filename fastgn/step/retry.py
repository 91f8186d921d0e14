"""What a step that found no memory is run again with."""

import torch


class Randomness:
    """The state of a device's generator and the CPU's: so that a pass can be run as it was."""

    def __init__(self, device: torch.device):
        self.device = device
        self.cpu = torch.get_rng_state()
        self.cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def restore(self) -> None:
        torch.set_rng_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda, self.device)


def out_of_memory(error: BaseException) -> bool:
    """Whether the device had no room: PyTorch's allocator says so in a class of its own, what
    allocates beside it (cuBLAS' handles, Triton's modules, NCCL) in other words."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    signs = ("out of memory", "STATUS_ALLOC_FAILED", "CUBLAS_STATUS_NOT_INITIALIZED")
    on_a_cpu = "can't allocate memory"
    return isinstance(error, RuntimeError) and any(s in str(error) for s in (*signs, on_a_cpu))
