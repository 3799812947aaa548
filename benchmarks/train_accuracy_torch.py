"""Trains NIN in PyTorch on images in Tiny ImageNet's layout, by the recipe of solvers/nin_crop48.prototxt, for comparison.

    python benchmarks/train_accuracy_torch.py /path/to/tiny-imagenet-20

Batch 100, random 48x48 crops and mirroring, SGD 0.9 with decay 0.0005, rate 0.01 and a tenth of it for the last three of ten
epochs; bfloat16 autocast on channels_last tensors. All images are decoded once and kept in memory, outside the time that is told.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

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


def accuracy(net: nn.Module, images: torch.Tensor, labels: torch.Tensor, batch: int) -> float:
    net.eval()
    right = 0
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for start in range(0, len(images), batch):
            scores = net(batch_of(images[start : start + batch], train=False))
            right += int((scores.argmax(1) == labels[start : start + batch]).sum())
    net.train()
    return right / len(images)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="a folder in Tiny ImageNet's layout")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    train, train_labels, val, val_labels = load(args.data)
    net = nin(int(train_labels.max()) + 1).to(memory_format=torch.channels_last).train()
    sgd, loss_of = optimizer(net, 0.01), nn.CrossEntropyLoss()
    started = time.perf_counter()
    for epoch in range(args.epochs):
        if epoch == args.epochs - 3:
            for group in sgd.param_groups:
                group["lr"] *= 0.1
        total = 0.0
        for chosen in torch.randperm(len(train)).split(args.batch):
            with torch.autocast("cpu", torch.bfloat16):
                loss = loss_of(net(batch_of(train[chosen], train=True)), train_labels[chosen])
            sgd.zero_grad(set_to_none=True)
            loss.backward()
            sgd.step()
            total += loss.item() * len(chosen)
        score = accuracy(net, val, val_labels, args.batch)
        print(f"epoch {epoch + 1}: loss {total / len(train):.4f}, accuracy {score:.4f}, {time.perf_counter() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
