"""PreActResNet18 has the published parameters and shapes."""

import torch

from fastgn.config.groups import ArchitectureConfig
from fastgn.models.network import build_model
from fastgn.models.preact_resnet import PreActResNet18


def test_preact_resnet18_has_the_published_parameters():
    """11,171,146 is the count of the usual implementation (kuangliu/pytorch-cifar): the same
    network, whose final BatchNorm (2 x 512) that implementation leaves out, as He et al. do not."""
    expected = 11_171_146 + 2 * 512
    assert expected == 11_172_170
    assert sum(p.numel() for p in PreActResNet18(10).parameters()) == expected
    _, report = build_model(ArchitectureConfig(model="preact_resnet18", activation="gelu"), 10)
    assert report.parameters == expected


def test_preact_resnet18_has_the_published_shape():
    model = PreActResNet18(10)
    with torch.no_grad():
        x = model.conv1(torch.rand(1, 3, 32, 32))
        shapes = [tuple((x := block(x)).shape[1:]) for block in model.blocks]
    sides = [(64, 32, 32), (128, 16, 16), (256, 8, 8), (512, 4, 4)]
    assert shapes == [side for side in sides for _ in range(2)]
    assert [b.shortcut is not None for b in model.blocks] == [False, False] + [True, False] * 3
