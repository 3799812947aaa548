"""What GPUs can do at the most, for the shares of it that `caffelite time` shows: known cards from their data sheets, others by counting units."""

from __future__ import annotations

import re
from typing import NamedTuple

from caffelite.backends.contract import Peaks


class Facts(NamedTuple):
    """What a device is made of. Clocks in Hz, bus in bits."""

    name: str
    capability: tuple[int, int]
    multiprocessors: int
    clock: float
    memory_clock: float
    bus: int


# As the driver names them: tera-operations a second of products in bfloat16 and tf32 (tensor cores, dense, float32 sums) and in float32
# (none), and GB/s of memory. Figures of the vendor's data sheets; those that give sparse products alone are halved.
CARDS: tuple[tuple[str, float, float, float, float], ...] = (
    (r"A100.*80GB.*PCIe|A100.*PCIe.*80GB", 312, 156, 19.5, 1935),
    (r"A100.*80GB", 312, 156, 19.5, 2039),
    (r"A100.*40GB", 312, 156, 19.5, 1555),
    (r"A10", 125, 62.5, 31.2, 600),
    (r"H100 80GB HBM3", 989, 494, 67, 3350),
    (r"H100 PCIe", 756, 378, 51, 2000),
    (r"H200", 989, 494, 67, 4800),
    (r"L4", 121, 60, 30.3, 300),
    (r"L40S", 362, 183, 91.6, 864),
    (r"GeForce RTX 3090", 71, 35.6, 35.6, 936),
    (r"GeForce RTX 4090", 165.2, 82.6, 82.6, 1008),
)
LANES = {(8, 0): 64}  # float32 units of a multiprocessor: 128 in all others since compute capability 8.6
NEWEST = (12, 1)  # the newest compute capability that this is known of


def peaks_of(facts: Facts | None, precision: str) -> Peaks | None:
    """The peaks of a device in a precision; None without facts. operations is None where tensor cores of an unknown card would have to be guessed."""
    if facts is None:
        return None
    name = facts.name.removeprefix("NVIDIA ").strip()
    for pattern, bfloat16, tf32, float32, bandwidth in CARDS:
        if re.fullmatch(pattern, name):
            rate = {"bfloat16": bfloat16, "tf32": tf32, "float32": float32}[precision]
            return Peaks(facts.name, rate * 1e12, bandwidth * 1e9, "data sheet")
    operations = 0.0
    if precision == "float32" and (8, 0) <= facts.capability <= NEWEST:
        operations = 2.0 * LANES.get(facts.capability, 128) * facts.multiprocessors * facts.clock
    moved = 2 * facts.memory_clock * facts.bus / 8  # two transfers a clock
    return Peaks(facts.name, operations or None, moved or None, "clocks and units")
