"""Times training steps of caffelite beside PyTorch's on one GPU, in turn, and prints one table in Markdown.

    python benchmarks/gpu_step.py                                                # all nets and modes, PyTorch's compiled ones last
    python benchmarks/gpu_step.py --nets nin_crop48:128 --modes bfloat16 eager-bfloat16 --minutes 2 --out FOLDER
    python benchmarks/gpu_step.py --dry-run                                      # without a GPU: tries the script itself, on the CPU

Every engine and mode is a process of its own (gpu_worker.py), so that a crash or a hang of one loses that one alone. The modes of a net run in
rounds, one after another for about --seconds each, so that what a warm GPU does falls on all alike; the table holds medians over the rounds.
First all nets run without torch.compile, whose max-autotune can take minutes; then, while --minutes last, the compiled ones in rounds with
ours. --out: steps.jsonl (every measurement, at once), steps.json and steps.md (after every net), and what each process said.
"""

from __future__ import annotations

import argparse
import json
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, TextIO

import gpu
from nets import NETS
from surroundings import ROOT, environment

DEFAULT_NETS = (*gpu.NETS, *gpu.MORE_NETS)
# What caffelite's modes find in the environment beside the rest: products by wgmma (Hopper), with TMA too, or timed and by whichever is fastest.
CHOICES = {
    "wgmma-bfloat16": {"CAFFELITE_CUDA_PRODUCTS": "wgmma"},
    "tma-bfloat16": {"CAFFELITE_CUDA_PRODUCTS": "tma"},
    "tuned-bfloat16": {"CAFFELITE_CUDA_TUNE": "1"},
}
OURS = ("bfloat16", *CHOICES, "tf32", "float32")
EAGER, COMPILED = ("eager-bfloat16", "eager-tf32", "eager-float32"), ("compile-bfloat16", "compile-tf32", "compile-float32")
MODES = (*OURS, *EAGER, *COMPILED)
DEFAULT_MODES = (*OURS, *EAGER[:2], *COMPILED[:2])
WORKER = ROOT / "benchmarks" / "gpu_worker.py"
ENDING_SECONDS = 5.0  # that a process has for ending by itself


@dataclass
class Candidate:
    """One row of the table: a net, its batch, a mode, and what each round gave; failed: why there are no more rounds."""

    net: str
    batch: int
    mode: str
    rounds: list[dict[str, Any]] = field(default_factory=list)
    failed: str = ""

    @property
    def engine(self) -> str:
        if self.mode in OURS:
            return " ".join(["caffelite", self.mode.rpartition("-")[0]]).strip()
        return "PyTorch compiled" if self.mode in COMPILED else "PyTorch eager"

    @property
    def precision(self) -> str:
        return self.mode.rpartition("-")[2]

    @property
    def name(self) -> str:
        return f"{self.net}:{self.batch} {self.mode}"

    @property
    def step_ms(self) -> float:
        return median(result["step_ms"] for result in self.rounds)

    @property
    def peak_mb(self) -> float | None:
        return self.rounds[-1].get("peak_mb") if self.rounds else None

    def command(self, device: str) -> list[str]:
        engine = "caffelite" if self.mode in OURS else "torch"
        flags = ["--engine", engine, "--net", self.net, "--batch", str(self.batch), "--precision", self.precision, "--device", device]
        return [sys.executable, str(WORKER), *flags, *(["--compile"] if self.mode in COMPILED else [])]


class Failed(Exception):
    """A process gave no result; says why."""


class Process:
    """A worker that runs, with `values` in its environment; its error stream goes to `log`."""

    def __init__(self, command: Sequence[str], log: TextIO, **values: str) -> None:
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, env=environment(**values), stdin=pipe, stdout=pipe, stderr=log, text=True)
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout
        with self._process.stdout as said:
            for line in said:
                if line.startswith("result "):
                    self._lines.put(line.removeprefix("result "))
        self._lines.put(None)

    def ask(self, line: object, seconds: float) -> dict[str, Any]:
        """What it answers to a line, within `seconds`."""
        assert self._process.stdin
        try:
            print(line, file=self._process.stdin, flush=True)
            answer = self._lines.get(timeout=max(seconds, 0.1))
        except BrokenPipeError:
            answer = None
        except queue.Empty:
            raise Failed(f"no answer within {seconds:.0f} s") from None
        if answer is None:
            raise Failed(f"ended with exit status {self._process.wait()}")
        found: dict[str, Any] = json.loads(answer)
        return found

    def end(self) -> None:
        """Ends it, by force if it takes long."""
        assert self._process.stdin
        try:
            self._process.stdin.close()
            self._process.wait(ENDING_SECONDS)
        except (subprocess.TimeoutExpired, BrokenPipeError):
            self._process.kill()
            self._process.wait()
        self._reader.join(ENDING_SECONDS)


class Report:
    """Where results go as they come."""

    def __init__(self, folder: Path, rows: Sequence[Candidate]) -> None:
        self.folder, self._rows = folder, rows
        folder.mkdir(parents=True, exist_ok=True)

    def add(self, row: Candidate, result: dict[str, Any]) -> None:
        """One measurement."""
        row.rounds.append(result)
        with (self.folder / "steps.jsonl").open("a") as file:
            print(json.dumps({"net": row.net, "batch": row.batch, "mode": row.mode, **result}), file=file)

    def write(self) -> None:
        """The tables of all so far."""
        facts = [{"net": row.net, "batch": row.batch, "mode": row.mode, "rounds": row.rounds, "failed": row.failed} for row in self._rows]
        (self.folder / "steps.json").write_text(json.dumps(facts, indent=1) + "\n")
        (self.folder / "steps.md").write_text(text(self._rows) + "\n")


def run_group(rows: Sequence[Candidate], args: argparse.Namespace, report: Report, end: float) -> None:
    """Starts the processes of some rows of one net, lets them warm up one after another, and then run in rounds."""
    running: list[tuple[Candidate, Process, TextIO]] = []
    try:
        for row in rows:
            row.failed = ""
            log = (report.folder / f"{row.net}-{row.batch}-{row.mode}.log").open("a")
            running.append((row, Process(row.command(args.device), log, **CHOICES.get(row.mode, {})), log))
        for row, process, _ in running:
            box = args.compile_seconds if row.mode in COMPILED else args.start_seconds
            _try(row, partial(process.ask, "start", min(box, end - time.perf_counter())))
        for _ in range(args.rounds):
            for row, process, _ in running:
                box = min(args.start_seconds, end - time.perf_counter())
                if not row.failed and box > 0 and (result := _try(row, partial(process.ask, args.seconds, box))):
                    report.add(row, result)
    finally:
        for _, process, log in running:
            process.end()
            log.close()
        report.write()


def _try(row: Candidate, call: Callable[[], dict[str, Any]]) -> dict[str, Any] | None:
    """What call() returns; None where it fails, and the row then says why."""
    try:
        return call()
    except Failed as failed:
        row.failed = str(failed)
        print(f"{row.name}: {failed}", file=sys.stderr, flush=True)
        return None


# --- the table -----------------------------------------------------------------------------------------------------------


def text(rows: Sequence[Candidate]) -> str:
    """The table and, below it, what has no place in it."""
    missing = [f"{row.name}: {row.failed or 'not reached'}" for row in rows if not row.rounds or row.failed]
    return "\n".join([table(rows), *(["", "Not measured, or cut short:", *(f"- {line}" for line in missing)] if missing else [])])


def table(rows: Sequence[Candidate]) -> str:
    """Markdown. The ratios are images a second, and peak memory, against PyTorch in the same precision."""
    head = ("net", "batch", "engine", "precision", "images/s", "step ms", "x eager", "x compiled", "peak MB", "peak x eager", "peak x compiled")
    lines = [f"| {' | '.join(head)} |", "|---|---:|---|---|" + "---:|" * 7]
    for row in (row for row in rows if row.rounds):
        eager, compiled = (_rival(rows, row, kind) for kind in ("eager", "compile"))
        speeds = [_ratio(rival and rival.step_ms, row.step_ms) for rival in (eager, compiled)]
        peaks = [_ratio(row.peak_mb, rival and rival.peak_mb) for rival in (eager, compiled)]
        peak = f"{row.peak_mb:,.0f}" if row.peak_mb else ""
        rate = f"{row.batch / row.step_ms * 1e3:,.0f}"
        cells = [row.net, str(row.batch), row.engine, row.precision, rate, f"{row.step_ms:.3f}", *speeds, peak, *peaks]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _rival(rows: Iterable[Candidate], row: Candidate, kind: str) -> Candidate | None:
    same = (other for other in rows if (other.net, other.batch, other.mode) == (row.net, row.batch, f"{kind}-{row.precision}"))
    return next((other for other in same if other.rounds), None)


def _ratio(above: float | None, below: float | None) -> str:
    return f"{above / below:.2f}" if above and below else ""


# --- the command ---------------------------------------------------------------------------------------------------------


def net_and_batch(word: str) -> tuple[str, int]:
    """nin_crop48:128 as its parts."""
    net, _, batch = word.partition(":")
    if net not in NETS or not batch.isdigit() or not int(batch):
        raise argparse.ArgumentTypeError(f"'{word}' is not NET:BATCH with a NET of {', '.join(NETS)}")
    return net, int(batch)


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = [net_and_batch(word) for word in DEFAULT_NETS]
    parser.add_argument("--nets", nargs="+", type=net_and_batch, default=default, metavar="NET:BATCH", help=f"default: {' '.join(DEFAULT_NETS)}")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(DEFAULT_MODES), help=f"default: {' '.join(DEFAULT_MODES)}")
    parser.add_argument("--rounds", type=int, default=5, help="times that each mode is measured (default: 5)")
    parser.add_argument("--seconds", type=float, default=0.4, help="about so long each time (default: 0.4)")
    parser.add_argument("--minutes", type=float, default=9, help="stops after this time with what there is (default: 9)")
    parser.add_argument("--start-seconds", type=float, default=60, help="that a process has for its first steps, and for a round (default: 60)")
    parser.add_argument("--compile-seconds", type=float, default=180, help="the same for torch.compile's first steps (default: 180)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="PyTorch's (default: cuda)")
    parser.add_argument("--out", type=Path, help="folder for the results (default: none is kept)")
    parser.add_argument("--dry-run", action="store_true", help="LeNet with two images, PyTorch on the CPU, one round")
    args = parser.parse_args(words)
    if args.dry_run:
        args.nets, args.rounds, args.seconds, args.device = [("lenet", 2)], 1, 0.01, "cpu"
    return args


def groups(args: argparse.Namespace) -> list[list[Candidate]]:
    """What runs in rounds together: the modes of each net that start at once, then each net's compiled ones beside ours.

    The same row may be in two groups; its rounds add up. Where only such rows would start at once, they wait for the compiled ones."""
    rows = {(net, batch, mode): Candidate(net, batch, mode) for net, batch in args.nets for mode in MODES if mode in args.modes}
    quick = [[row for (*found, mode), row in rows.items() if tuple(found) == net and mode not in COMPILED] for net in args.nets]
    slow = [[row for (*found, mode), row in rows.items() if tuple(found) == net and mode in COMPILED] for net in args.nets]
    beside = [[row for row in first if row.mode in OURS and f"compile-{row.precision}" in args.modes] for first in quick]
    alone = [first for first, again, late in zip(quick, beside, slow) if first and not (late and first == again)]
    return alone + [[*ours, *late] for ours, late in zip(beside, slow) if late]


def main() -> None:
    args = arguments()
    end, todo = time.perf_counter() + 60 * args.minutes, groups(args)
    rows = list({row.name: row for group in todo for row in group}.values())
    rows.sort(key=lambda row: (args.nets.index((row.net, row.batch)), MODES.index(row.mode)))
    with tempfile.TemporaryDirectory() as folder:
        report = Report(args.out or Path(folder), rows)
        for group in todo:
            if time.perf_counter() < end:
                run_group(group, args, report, end)
                print(f"{group[0].net}:{group[0].batch} after {time.perf_counter() - end + 60 * args.minutes:.0f} s", file=sys.stderr, flush=True)
    print(text(rows))


if __name__ == "__main__":
    main()
