"""Trains NIN in PyTorch on images in Tiny ImageNet's layout, by the recipe of solvers/nin_crop48.prototxt, for comparison.

    python benchmarks/train_accuracy_torch.py /path/to/tiny-imagenet-20
    python benchmarks/train_accuracy_torch.py --like nin20_solver.prototxt

Batch 100, random 48x48 crops and mirroring, SGD 0.9 with decay 0.0005, rate 0.01 and a tenth of it for the last three of ten
epochs; bfloat16 autocast on channels_last tensors. All images are decoded once and kept in memory, outside the time that is told.

--like SOLVER starts from the weights that `caffelite train --solver SOLVER` starts from and takes the same batches in the same order, so
that what a seed is worth falls out of the comparison: dropout's masks and the arithmetic are PyTorch's own. Needs caffelite beside torch.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn
from torch_nets import nin, optimizer

CROP = 48
MEAN = torch.tensor([123.0, 117.0, 104.0]).view(1, 3, 1, 1)  # red, green, blue, as in the model file
SCALE = 0.0078125


def decode(path: Path) -> torch.Tensor:
    """One image as 3x64x64 bytes."""
    with Image.open(path) as image:
        pixels = image.convert("RGB")
        return torch.frombuffer(bytearray(pixels.tobytes()), dtype=torch.uint8).view(pixels.height, pixels.width, 3).permute(2, 0, 1)


def load(root: Path) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Training images and labels, validation images and labels."""
    wnids = (root / "wnids.txt").read_text().split()
    train = [(path, label) for label, wnid in enumerate(wnids) for path in sorted((root / "train" / wnid / "images").glob("*.JPEG"))]
    rows = [line.split("\t") for line in (root / "val" / "val_annotations.txt").read_text().splitlines()]
    val = [(root / "val" / "images" / row[0], wnids.index(row[1])) for row in rows]
    tensors = []
    for files in (train, val):
        tensors += [torch.stack([decode(path) for path, _ in files]), torch.tensor([label for _, label in files])]
    return tensors[0], tensors[1], tensors[2], tensors[3]


def batch_of(images: torch.Tensor, train: bool) -> torch.Tensor:
    """A crop of each image (random and mirrored at random, or the centre), centred and scaled, channels last."""
    margin = images.shape[2] - CROP
    if train:
        tops, lefts = torch.randint(margin + 1, (2, len(images))).tolist()
    else:
        tops = lefts = [margin // 2] * len(images)
    crops = torch.stack([image[:, top : top + CROP, left : left + CROP] for image, top, left in zip(images, tops, lefts)])
    if train:
        flip = torch.rand(len(crops)) < 0.5
        crops[flip] = crops[flip].flip(3)
    return ((crops.float() - MEAN) * SCALE).contiguous(memory_format=torch.channels_last)


class Folder:
    """Batches of a folder in Tiny ImageNet's layout, drawn by PyTorch's random numbers."""

    def __init__(self, root: Path, batch: int) -> None:
        self.images, self.labels, self.val, self.val_labels = load(root)
        self.batch, self.classes = batch, int(self.labels.max()) + 1
        self.net = nin(self.classes)

    def epoch(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for chosen in torch.randperm(len(self.images)).split(self.batch):
            yield batch_of(self.images[chosen], train=True), self.labels[chosen]

    def validation(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for start in range(0, len(self.val), self.batch):
            yield batch_of(self.val[start : start + self.batch], train=False), self.val_labels[start : start + self.batch]


class Like:
    """Initial weights and batches of a caffelite solver, whose net is NIN."""

    def __init__(self, path: Path, batches: int, validation: int) -> None:
        import caffelite  # only here: the other way needs torch alone

        self.solver, self.batches, self.val_batches = caffelite.get_solver(str(path)), batches, validation
        parameters = list(self.solver.net.params.values())
        self.net = nin(parameters[-1][0].data.shape[0])
        layers = [layer for layer in self.net if isinstance(layer, nn.Conv2d)]
        for layer, (weight, bias) in zip(layers, parameters, strict=True):
            layer.weight.data.copy_(torch.from_numpy(weight.data.copy()))
            layer.bias.data.copy_(torch.from_numpy(bias.data.copy()))

    def epoch(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        return self._read(self.solver.net, self.batches)

    def validation(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        return self._read(self.solver.test_nets[0], self.val_batches)

    def _read(self, net: Any, batches: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for _ in range(batches):
            net.forward(end="data")
            images, labels = torch.from_numpy(net.blobs["data"].data.copy()), torch.from_numpy(net.blobs["label"].data.copy())
            yield images.contiguous(memory_format=torch.channels_last), labels.long()


def accuracy(net: nn.Module, batches: Iterator[tuple[torch.Tensor, torch.Tensor]]) -> float:
    net.eval()
    right = count = 0
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for images, labels in batches:
            right += int((net(images).argmax(1) == labels).sum())
            count += len(labels)
    net.train()
    return right / count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, nargs="?", help="a folder in Tiny ImageNet's layout")
    parser.add_argument("--like", type=Path, metavar="SOLVER", help="a caffelite solver, whose weights and batches are taken instead")
    parser.add_argument("--batches", type=int, nargs=2, default=(100, 10), metavar=("TRAIN", "TEST"), help="of an epoch and a validation, with --like")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1, help="of PyTorch's random numbers: with --like, of dropout's masks alone")
    args = parser.parse_args()
    if (args.data is None) == (args.like is None):
        parser.error("give a folder or --like SOLVER")
    torch.manual_seed(args.seed)
    source = Folder(args.data, args.batch) if args.data else Like(args.like, *args.batches)
    train(source, args.epochs)


def train(source: Folder | Like, epochs: int) -> None:
    net = source.net.to(memory_format=torch.channels_last).train()
    sgd, loss_of = optimizer(net, 0.01), nn.CrossEntropyLoss()
    started = time.perf_counter()
    for epoch in range(epochs):
        if epoch == epochs - 3:
            for group in sgd.param_groups:
                group["lr"] *= 0.1
        losses = []
        for images, labels in source.epoch():
            with torch.autocast("cpu", torch.bfloat16):
                loss = loss_of(net(images), labels)
            sgd.zero_grad(set_to_none=True)
            loss.backward()
            sgd.step()
            losses.append(loss.item())
        mean, score = sum(losses) / len(losses), accuracy(net, source.validation())
        print(f"epoch {epoch + 1}: loss {mean:.4f} ({losses[0]:.4f} first), accuracy {score:.4f}, {time.perf_counter() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
