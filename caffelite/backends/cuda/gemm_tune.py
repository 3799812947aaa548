"""Choosing how a product is cut by timing it: CAFFELITE_CUDA_TUNE=1, on GPUs. And which unit makes it: CAFFELITE_CUDA_PRODUCTS.

At the first use of a shape the cuts that gemm_plan's formula likes best run a few times each, recorded, as in training: started one by one from
Python, a product of a few microseconds would take as long as starting it does. The fastest is kept, in memory and in a file beside the compiled
kernels, named after the device and the text of the kernels, so that later runs choose alike and repeat bit for bit. The file is JSON: for each
shape the tile, the splits and the seconds of all that were tried. Without the variable, on the emulator, or where a shape is first met while work
is being recorded, the formula decides.

Units (gemm_plan.py) are timed against each other where the GPU has both; without timing mma makes all products. CAFFELITE_CUDA_PRODUCTS=mma,
wgmma or tma names one for all that it can make, timed or not, with a file of its own.
"""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from caffelite import environment
from caffelite.backends.cuda import cache, gemm_plan
from caffelite.backends.cuda.driver import Driver
from caffelite.backends.cuda.gemm_plan import UNITS, Cut
from caffelite.backends.cuda.launch import digest
from caffelite.errors import BackendError

TRIED, RUNS = 6, 3  # cuts of each unit, and timed runs of each cut, of which the fastest counts
IN_A_ROW = 5  # products in a run: what starts it falls on all of them
HOPPER = (9, 0)  # the compute capability that has wgmma


class Tuner:
    """Picks cuts for one driver. SpecError where the environment names no unit, BackendError where it names one that the device does not have."""

    def __init__(self, driver: Driver) -> None:
        self._driver, self.on, self._unit = driver, environment.switch(environment.CUDA_TUNE), environment.one_of(environment.CUDA_PRODUCTS, UNITS)
        facts = driver.facts() if self._unit in UNITS[1:] else None
        if facts and facts.capability != HOPPER:
            found = ".".join(map(str, facts.capability))
            needed = f"{environment.CUDA_PRODUCTS} is '{self._unit}', which {facts.name} does not have: it needs compute capability 9.0, found {found}"
            raise BackendError(needed, hint=f"unset {environment.CUDA_PRODUCTS}, or choose mma")
        self._picked: dict[str, Cut] = {}
        self._table: dict[str, Any] | None = None

    @functools.cached_property
    def units(self) -> tuple[str, ...]:
        """The units whose cuts are to choose from, the one that is taken without timing first."""
        if self._unit:
            return (self._unit,)
        facts = self._driver.facts() if self.on else None
        return UNITS if facts and facts.capability == HOPPER else UNITS[:1]

    def pick(self, shape: str, cuts: Sequence[Cut], trial: Callable[[Cut], None]) -> Cut:
        """One of `cuts`, the formula's favourite first, for the product that `shape` names. trial(cut) runs it, changing nothing that counts."""
        if not self.on:
            return cuts[0]
        if shape not in self._picked:
            self._picked[shape] = self._remembered(shape, cuts) or self._tried(shape, cuts, trial)
        return self._picked[shape]

    @property
    def path(self) -> Path:
        """The file of what was chosen on this device with these kernels."""
        facts = self._driver.facts()
        device = re.sub(r"\W+", "-", facts.name if facts else "none")
        texts = sorted({path for module in gemm_plan.MODULES for path in module.sources()})
        forced = f"{self._unit}-" if self._unit else ""
        return cache.folder("cuda") / f"tiles-{device}-{forced}{digest(*texts, Path(gemm_plan.__file__))}.json"

    def _remembered(self, shape: str, cuts: Sequence[Cut]) -> Cut | None:
        if self._table is None:
            self._table = _read(self.path)
        entry = self._table.get(shape)
        return next((cut for cut in cuts if entry and _name(cut) == entry["chosen"]), None)

    def _tried(self, shape: str, cuts: Sequence[Cut], trial: Callable[[Cut], None]) -> Cut:
        if self._driver.capturing or self._driver.facts() is None:
            return cuts[0]
        seconds: dict[str, float] = {}
        tried = [cut for unit in UNITS for cut in [cut for cut in cuts if cut.tile.unit == unit][:TRIED]]
        for cut in tried:
            trial(cut)  # compiles, and warms up
            seconds[_name(cut)] = self._seconds(cut, trial)
        best = min(tried, key=lambda cut: seconds[_name(cut)])
        self._write(shape, {"chosen": _name(best), "seconds": seconds})
        return best

    def _seconds(self, cut: Cut, trial: Callable[[Cut], None]) -> float:
        """Of one product, in the fastest of a few runs."""

        def in_a_row() -> None:
            for _ in range(IN_A_ROW):
                trial(cut)

        record, found = self._driver.capture(in_a_row), []
        for _ in range(RUNS):
            start = self._driver.mark()
            record.play()
            found.append(self._driver.seconds_between(start, self._driver.mark()))
        return min(found) / IN_A_ROW

    def _write(self, shape: str, entry: dict[str, Any]) -> None:
        """Adds an entry to the file; what another process has added meanwhile stays."""
        self._table = {shape: entry} | _read(self.path)
        made = self.path.with_name(f"{os.getpid()}-{self.path.name}")
        try:
            made.write_text(json.dumps(self._table, indent=1, sort_keys=True) + "\n")
            made.replace(self.path)
        except OSError as error:
            raise BackendError(f"cannot write the table of tiles {self.path}: {error.strerror}", hint="name another folder in CAFFELITE_CACHE") from error
        finally:
            made.unlink(missing_ok=True)


def _name(cut: Cut) -> str:
    unit = "" if cut.tile.unit == "mma" else f"{cut.tile.unit} "
    return f"{unit}{cut.tile.rows}x{cut.tile.columns}, {cut.splits} splits of {cut.per_split}"


def _read(path: Path) -> dict[str, Any]:
    """What the file holds; nothing where there is none. BackendError where it cannot be read."""
    try:
        found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    except (OSError, ValueError) as error:
        raise BackendError(f"the table of tiles {path} cannot be read: {error}", hint="delete that file: shapes are timed anew") from error
    return found
