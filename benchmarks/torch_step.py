"""Times training steps of NIN or AlexNet in PyTorch on the CPU, and prints one JSON object; train_step.py calls it.

    python benchmarks/torch_step.py --net nin --mode channels_last --batch 32 --iterations 10

Modes: `contiguous` and `channels_last` are float32; `bfloat16` is autocast on channels_last tensors, `bfloat16_contiguous` on contiguous ones.
The input is random and drawn once, so that the step alone is timed:
forward, loss, backward, update.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from statistics import median

import torch
from torch import nn
from torch_nets import alexnet, nin, optimizer

NETS = {"nin": (nin, 48, 200), "alexnet": (alexnet, 227, 1000)}  # net, image size, classes
MODES = ("contiguous", "channels_last", "bfloat16", "bfloat16_contiguous")


def step_times(args: argparse.Namespace) -> list[float]:
    """Seconds of each timed training step."""
    torch.manual_seed(0)
    make, size, classes = NETS[args.net]
    layout = torch.channels_last if args.mode in ("channels_last", "bfloat16") else torch.contiguous_format
    net = make(classes).to(memory_format=layout).train()
    images = torch.randn(args.batch, 3, size, size).to(memory_format=layout)
    labels = torch.randint(classes, (args.batch,))
    loss_of, sgd = nn.CrossEntropyLoss(), optimizer(net, 1e-6)
    seconds = []
    for _ in range(args.warm_up + args.iterations):
        started = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=args.mode.startswith("bfloat16")):
            loss = loss_of(net(images), labels)
        sgd.zero_grad(set_to_none=True)
        loss.backward()
        sgd.step()
        seconds.append(time.perf_counter() - started)
    return seconds[args.warm_up :]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--net", choices=NETS, required=True)
    parser.add_argument("--mode", choices=MODES, required=True)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--warm-up", type=int, default=3)
    parser.add_argument("--iterations", type=int, default=10)
    args = parser.parse_args()
    step = median(step_times(args))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    result = {"step_ms": step * 1e3, "images_per_s": args.batch / step, "peak_rss_mb": peak}
    print(json.dumps(result | {"torch": torch.__version__, "threads": torch.get_num_threads()}))


if __name__ == "__main__":
    main()
