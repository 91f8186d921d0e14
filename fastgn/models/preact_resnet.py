"""PreActResNet-18 for 32 x 32 images (He et al. 2016, arXiv 1603.05027), common for CIFAR."""

import torch.nn.functional as F
from torch import Tensor, nn


class PreActBlock(nn.Module):
    """Applies normalisation, activation and convolution twice, and adds a shortcut.

    The shortcut is the block's input. If the block changes the shape, the shortcut is a convolution
    of the first activation's output instead.
    """

    def __init__(self, in_chs: int, out_chs: int, stride: int):
        super().__init__()
        self.norm1 = nn.BatchNorm2d(in_chs)
        self.act1 = nn.ReLU()
        self.conv1 = nn.Conv2d(in_chs, out_chs, 3, stride, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(out_chs)
        self.act2 = nn.ReLU()
        self.conv2 = nn.Conv2d(out_chs, out_chs, 3, 1, 1, bias=False)
        self.shortcut = None
        if stride != 1 or in_chs != out_chs:
            self.shortcut = nn.Conv2d(in_chs, out_chs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        activated = self.act1(self.norm1(x))
        residual = x if self.shortcut is None else self.shortcut(activated)
        return self.conv2(self.act2(self.norm2(self.conv1(activated)))) + residual


class PreActResNet18(nn.Module):
    """Maps images `(B, 3, H, W)` to logits `(B, num_classes)`. H and W must be multiples of 8."""

    pretrained_cfg = {
        "input_size": (3, 32, 32),
        "mean": (0.4914, 0.4822, 0.4465),
        "std": (0.2470, 0.2435, 0.2616),
    }
    """Size of CIFAR-10's images, and mean and standard deviation of each channel, in timm's
    format."""

    def __init__(self, num_classes: int = 10, drop_rate: float = 0.0, width: int = 64):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, 1, 1, bias=False)
        blocks, in_chs = [], width
        for stage in range(4):
            out_chs = width << stage
            for index in range(2):
                blocks.append(PreActBlock(in_chs, out_chs, 2 if stage and not index else 1))
                in_chs = out_chs
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.BatchNorm2d(in_chs)
        self.act = nn.ReLU()
        self.drop = nn.Dropout(drop_rate)
        self.fc = nn.Linear(in_chs, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norm(self.blocks(self.conv1(x))))
        return self.fc(self.drop(F.adaptive_avg_pool2d(x, 1).flatten(1)))
