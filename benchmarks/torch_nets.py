"""The benchmark's nets in plain PyTorch: the same layers as those of models/, in Caffe's arithmetic."""

from __future__ import annotations

import torch
from torch import nn


def conv(inputs: int, outputs: int, kernel: int, pad: int = 0, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    """A convolution and its ReLU; weights as Caffe's msra filler draws them, biases zero."""
    layer = nn.Conv2d(inputs, outputs, kernel, stride, pad, groups=groups)
    nn.init.kaiming_normal_(layer.weight, mode="fan_in", nonlinearity="relu")
    nn.init.zeros_(layer.bias)
    return [layer, nn.ReLU(inplace=True)]


def nin(classes: int) -> nn.Module:
    """Network in Network for CIFAR-like images; Caffe pools with the window count rounded up."""
    return nn.Sequential(
        *conv(3, 192, 5, 2),
        *conv(192, 160, 1),
        *conv(160, 96, 1),
        nn.MaxPool2d(3, 2, ceil_mode=True),
        nn.Dropout(0.5),
        *conv(96, 192, 5, 2),
        *conv(192, 192, 1),
        *conv(192, 192, 1),
        nn.AvgPool2d(3, 2, ceil_mode=True),
        nn.Dropout(0.5),
        *conv(192, 192, 3, 1),
        *conv(192, 192, 1),
        *conv(192, classes, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )


def alexnet(classes: int) -> nn.Module:
    """BVLC AlexNet: 227x227 images, two LRN layers, three convolutions in two groups."""
    return nn.Sequential(
        *conv(3, 96, 11, 0, 4),
        nn.LocalResponseNorm(5, 1e-4, 0.75, 1.0),
        nn.MaxPool2d(3, 2, ceil_mode=True),
        *conv(96, 256, 5, 2, 1, 2),
        nn.LocalResponseNorm(5, 1e-4, 0.75, 1.0),
        nn.MaxPool2d(3, 2, ceil_mode=True),
        *conv(256, 384, 3, 1),
        *conv(384, 384, 3, 1, 1, 2),
        *conv(384, 256, 3, 1, 1, 2),
        nn.MaxPool2d(3, 2, ceil_mode=True),
        nn.Flatten(),
        nn.Linear(256 * 6 * 6, 4096),
        nn.ReLU(inplace=True),
        nn.Dropout(0.5),
        nn.Linear(4096, 4096),
        nn.ReLU(inplace=True),
        nn.Dropout(0.5),
        nn.Linear(4096, classes),
    )


def nin_quick(classes: int) -> nn.Module:
    """A narrow NIN with BatchNorm and Scale after every convolution but the last."""
    layers = [
        *normed(3, 96, 5, 2),
        *normed(96, 80, 1),
        *normed(80, 48, 1),
        nn.MaxPool2d(3, 2, ceil_mode=True),
        *normed(48, 96, 5, 2),
        *normed(96, 96, 1),
        *normed(96, 96, 1),
        nn.AvgPool2d(3, 2, ceil_mode=True),
        *normed(96, 96, 3, 1),
        *normed(96, 96, 1),
        conv(96, classes, 1)[0],
    ]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def normed(inputs: int, outputs: int, kernel: int, pad: int = 0) -> list[nn.Module]:
    """A convolution without a bias, BatchNorm with its scale and bias, and ReLU."""
    layer = nn.Conv2d(inputs, outputs, kernel, 1, pad, bias=False)
    nn.init.kaiming_normal_(layer.weight, mode="fan_in", nonlinearity="relu")
    return [layer, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]


def lenet(classes: int) -> nn.Module:
    """LeNet for grey images of 28x28."""
    return nn.Sequential(
        nn.Conv2d(1, 20, 5),
        nn.MaxPool2d(2),
        nn.Conv2d(20, 50, 5),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(800, 500),
        nn.ReLU(inplace=True),
        nn.Linear(500, classes),
    )


MAKERS = {"nin": nin, "nin_crop48": nin, "alexnet": alexnet, "nin_quick": nin_quick, "lenet": lenet}  # by folder of models/


def optimizer(net: nn.Module, rate: float, **options: bool) -> torch.optim.SGD:
    """Caffe's usual SGD: momentum 0.9, decay 0.0005; biases learn twice as fast and do not decay. options: PyTorch's own."""
    weights = [p for name, p in net.named_parameters() if name.endswith("weight")]
    biases = [p for name, p in net.named_parameters() if name.endswith("bias")]
    groups = [{"params": weights, "weight_decay": 0.0005}, {"params": biases, "lr": 2 * rate, "weight_decay": 0.0}]
    return torch.optim.SGD(groups, lr=rate, momentum=0.9, **options)
