"""What an update differentiates, as modules that compile as one graph each."""

from torch import Tensor, nn

from fastgn.attacks import Gradient, leaf_gradient
from fastgn.objectives import Loss, Objective
from fastgn.step.precision import autocast, in_precision


class LossModule(nn.Module):
    """forward(images, targets, ramp) -> Loss: the whole loss in one module, so that it compiles as
    one graph and DistributedDataParallel sees an ordinary backward."""

    def __init__(self, model: nn.Module, objective: Objective, precision: str):
        super().__init__()
        self.model = model
        self.objective = objective
        self.precision = precision

    def forward(self, images_BCHW: Tensor, targets: Tensor, ramp: Tensor) -> Loss:
        with autocast(images_BCHW.device.type, self.precision):
            network = in_precision(self.model, self.precision)
            return self.objective.loss(network, images_BCHW, targets, ramp)


class LossModules(nn.ModuleDict):
    """forward(name, images, targets, ramp) -> Loss of that name: what DistributedDataParallel
    wraps, once, however many losses a schedule takes turns with."""

    def forward(self, name: str, images_BCHW: Tensor, targets: Tensor, ramp: Tensor) -> Loss:
        return self[name](images_BCHW, targets, ramp)


class AttackGradient(nn.Module):
    """forward(images, targets) -> Gradient: what an attack step needs, as one graph of its own."""

    def __init__(self, model: nn.Module, precision: str):
        super().__init__()
        self.model = model
        self.precision = precision

    def forward(self, images_BCHW: Tensor, targets: Tensor) -> Gradient:
        with autocast(images_BCHW.device.type, self.precision):
            network = in_precision(self.model, self.precision)
            return leaf_gradient(network, images_BCHW, targets)
