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
        *hidden_layers(256 * 6 * 6, classes),
    )


def hidden_layers(inputs: int, classes: int) -> list[nn.Module]:
    """The end of AlexNet and VGG: two inner products with ReLU and Dropout, and the scores."""
    ends = [nn.Linear(inputs, 4096), nn.ReLU(inplace=True), nn.Dropout(0.5), nn.Linear(4096, 4096), nn.ReLU(inplace=True), nn.Dropout(0.5)]
    return [nn.Flatten(), *ends, nn.Linear(4096, classes)]


def alexnet9(classes: int) -> nn.Module:
    """AlexNet with six convolutions, all of 3x3, for images of 64x64."""
    return nn.Sequential(
        *conv(3, 96, 3, 1),
        nn.LocalResponseNorm(5, 1e-4, 0.75, 1.0),
        nn.MaxPool2d(3, 2, ceil_mode=True),
        *conv(96, 256, 3, 1),
        nn.LocalResponseNorm(5, 1e-4, 0.75, 1.0),
        nn.MaxPool2d(3, 2, ceil_mode=True),
        *conv(256, 384, 3, 1),
        *conv(384, 384, 3, 1),
        nn.MaxPool2d(3, 2, ceil_mode=True),
        *conv(384, 256, 3, 1),
        *conv(256, 256, 3, 1),
        nn.MaxPool2d(3, 2, ceil_mode=True),
        *hidden_layers(256 * 4 * 4, classes),
    )


def vgg16(classes: int) -> nn.Module:
    """VGG-16 for images of 64x64, of which five poolings leave 2x2."""
    layers: list[nn.Module] = []
    inputs = 3
    for count, outputs in ((2, 64), (2, 128), (3, 256), (3, 512), (3, 512)):
        for _ in range(count):
            layers += conv(inputs, outputs, 3, 1)
            inputs = outputs
        layers.append(nn.MaxPool2d(2, 2, ceil_mode=True))
    return nn.Sequential(*layers, *hidden_layers(512 * 2 * 2, classes))


class Residual(nn.Module):
    """Two 3x3 convolutions with BatchNorm, and what goes in added to what comes out; by way of a 1x1 convolution where the shapes differ."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.side = nn.Sequential(*normed(inputs, outputs, 1, 0, stride)[:2]) if stride > 1 else nn.Identity()
        self.main = nn.Sequential(*normed(inputs, outputs, 3, 1, stride), *normed(outputs, outputs, 3, 1)[:2])
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.relu(self.side(x) + self.main(x))


def resnet18(classes: int) -> nn.Module:
    """ResNet-18; its first pooling rounds up instead of padding."""
    layers: list[nn.Module] = [*normed(3, 64, 7, 3, 2), nn.MaxPool2d(3, 2, ceil_mode=True)]
    inputs = 64
    for outputs in (64, 128, 256, 512):
        layers += [Residual(inputs, outputs, 1 if inputs == outputs else 2), Residual(outputs, outputs, 1)]
        inputs = outputs
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, classes))


class Fire(nn.Module):
    """A 1x1 convolution, and on its output one of 1x1 and one of 3x3, whose outputs are joined."""

    def __init__(self, inputs: int, squeezed: int, expanded: int) -> None:
        super().__init__()
        self.squeeze = nn.Sequential(*conv(inputs, squeezed, 1))
        self.expand1, self.expand3 = nn.Sequential(*conv(squeezed, expanded, 1)), nn.Sequential(*conv(squeezed, expanded, 3, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.squeeze(x)
        return torch.cat([self.expand1(x), self.expand3(x)], 1)


def squeezenet(classes: int) -> nn.Module:
    """SqueezeNet v1.1."""
    return nn.Sequential(
        *conv(3, 64, 3, 0, 2),
        nn.MaxPool2d(3, 2, ceil_mode=True),
        Fire(64, 16, 64),
        Fire(128, 16, 64),
        nn.MaxPool2d(3, 2, ceil_mode=True),
        Fire(128, 32, 128),
        Fire(256, 32, 128),
        nn.MaxPool2d(3, 2, ceil_mode=True),
        Fire(256, 48, 192),
        Fire(384, 48, 192),
        Fire(384, 64, 256),
        Fire(512, 64, 256),
        nn.Dropout(0.5),
        *conv(512, classes, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
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


def normed(inputs: int, outputs: int, kernel: int, pad: int = 0, stride: int = 1) -> list[nn.Module]:
    """A convolution without a bias, BatchNorm with its scale and bias, and ReLU."""
    layer = nn.Conv2d(inputs, outputs, kernel, stride, pad, bias=False)
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


MAKERS = {  # by folder of models/
    "nin": nin,
    "nin_crop48": nin,
    "alexnet": alexnet,
    "nin_quick": nin_quick,
    "lenet": lenet,
    "vgg16": vgg16,
    "resnet18": resnet18,
    "alexnet9": alexnet9,
    "squeezenet": squeezenet,
}


def optimizer(net: nn.Module, rate: float, **options: bool) -> torch.optim.SGD:
    """Caffe's usual SGD: momentum 0.9, decay 0.0005; biases learn twice as fast and do not decay. options: PyTorch's own."""
    weights = [p for name, p in net.named_parameters() if name.endswith("weight")]
    biases = [p for name, p in net.named_parameters() if name.endswith("bias")]
    groups = [{"params": weights, "weight_decay": 0.0005}, {"params": biases, "lr": 2 * rate, "weight_decay": 0.0}]
    return torch.optim.SGD(groups, lr=rate, momentum=0.9, **options)
