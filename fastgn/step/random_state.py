"""Saves and restores the state of random number generators."""

import torch


class RandomState:
    """The state of the CPU's generator and of a device's generator when this object was made.

    Restoring it lets a second forward draw the same random numbers, for example the same dropout.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.cpu = torch.get_rng_state()
        self.cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def restore(self) -> None:
        """Sets the generators to the saved state."""
        torch.set_rng_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda, self.device)
