"""Caffe's debug_info: one line per layer with the mean absolute value of what it computed."""

from __future__ import annotations

import math
from collections.abc import Callable

from caffelite.net import Net, Step

Tell = Callable[[str, str, str], None]  # text, source, severity


def forward_with_debug(net: Net, tell: Tell) -> None:
    """net.forward() with a line for every top and every parameter of each layer."""
    for i, step in enumerate(net.steps):
        net.forward(i, i + 1)
        for top in step.tops:
            mean = net.backend.sum_absolute(top.data) / top.count if top.count else 0.0
            tell(f"    [Forward] Layer {step.layer.name}, top blob {top.name} data: {mean:g}", "net.cpp", "I")
        for index, param in enumerate(step.layer.params):
            mean = net.backend.sum_absolute(param.master) / param.count
            tell(f"    [Forward] Layer {step.layer.name}, param blob {_param_name(step, index)} data: {mean:g}", "net.cpp", "I")


def _param_name(step: Step, index: int) -> str:
    return step.node.params[index].share_name or str(index)


def backward_with_debug(net: Net, tell: Tell) -> None:
    """net.backward() with a line for every gradient that each layer computed, and the norms of all parameters."""
    for i in reversed(range(len(net.steps))):
        step = net.steps[i]
        if not step.node.needs_backward:
            continue
        net.backward(i, i)
        for bottom, wanted in zip(step.bottoms, step.node.propagate_down):
            if wanted:
                mean = net.backend.sum_absolute(bottom.diff) / bottom.count
                tell(f"    [Backward] Layer {step.layer.name}, bottom blob {bottom.name} diff: {mean:g}", "net.cpp", "I")
        for index, (param, wanted) in enumerate(zip(step.layer.params, step.node.learn)):
            if wanted:
                mean = net.backend.sum_absolute(param.diff) / param.count
                tell(f"    [Backward] Layer {step.layer.name}, param blob {index} diff: {mean:g}", "net.cpp", "I")
    _norms(net, tell)


def _norms(net: Net, tell: Tell) -> None:
    ops, arena = net.backend, net.arena
    if arena.grad is None:
        return
    arena.settle_grads()
    sums = ops.sum_absolute(arena.master), ops.sum_absolute(arena.grad)
    roots = math.sqrt(ops.sum_squares(arena.master)), math.sqrt(ops.sum_squares(arena.grad))
    tell(
        f"    [Backward] All net params (data, diff): L1 norm = ({sums[0]:g}, {sums[1]:g}); L2 norm = ({roots[0]:g}, {roots[1]:g})",
        "net.cpp",
        "E",
    )
