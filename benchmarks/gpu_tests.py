"""Runs the tests that concern the cuda backend, a process for each file and several at once, and tells what failed.

    python benchmarks/gpu_tests.py [FILE ...] [--out FOLDER] [--jobs 6] [--minutes 5] [--prefix "compute-sanitizer --tool memcheck"]

The products on tensor cores come first. A kernel that goes wrong can take its process's GPU context with it, so that tests after it fail for
no reason of their own: those that failed run once more at the end, each alone, and the last lines tell which of them failed then too.
--prefix: what each process runs under; its exit status counts besides the tests'. --out: a log and a JUnit file for each test file, tests.txt.
CAFFELITE_CUDA_DRIVER chooses the driver (default: cupy, a GPU).
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from surroundings import ROOT, environment, gpu_driver

FIRST = ("test_op_inner_product", "test_op_convolution", "test_cuda_gemm")
PATTERNS = ("test_op_*", "test_layer_*", "test_golden_*", "test_net", "test_net_random", "test_fusion", "test_sharing*", "test_solver_resume")
PATTERNS += (
    "test_solver_rules",
    "test_solver_footprint",
    "test_cuda_gemm_gaps",
    "test_cuda_training",
    "test_cuda_repeat",
    "test_cuda_input",
    "test_cuda_uploads",
    "test_cuda_tune",
    "test_cuda_tensor_map",
    "test_data_raw",
    "test_data_warp",
    "test_params",
    "test_memory",
    "test_contract",
    "test_docs",
    "test_cli_machine",
    "test_cli_time",
    "test_pycaffe*",
)
ALONE = 24  # failed tests that run once more
TOLD = 30  # failed tests that the last lines name
CUT_OFF = -1


def files() -> list[str]:
    """The names of the test files, those of FIRST before the rest."""
    found = [path.stem for pattern in (*FIRST, *PATTERNS) for path in sorted((ROOT / "tests").glob(f"{pattern}.py"))]
    return list(dict.fromkeys(found))


class Result(NamedTuple):
    """How a process of tests ended: its exit status (CUT_OFF: it ran out of time), seconds, counts, and each failed test with its message."""

    name: str
    status: int
    seconds: float
    passed: int
    failed: dict[str, str]

    @property
    def line(self) -> str:
        how = "cut off" if self.status == CUT_OFF else "ok" if not self.status else f"exit status {self.status}"
        return f"{self.name:32} {how:14} {self.passed:5} passed {len(self.failed):4} failed {self.seconds:7.1f} s"


def run(name: str, tests: Sequence[str], args: argparse.Namespace, end: float) -> Result:
    """Runs tests in a process of its own."""
    log, junit = args.out / f"{name}.log", args.out / f"{name}.xml"
    command = [*shlex.split(args.prefix), sys.executable, "-m", "pytest", "--backend", "cuda", "--tb=short", "-p", "no:cacheprovider"]
    command += ["-W", "default"]  # what other versions of packages warn of is not the backend's fault
    # Whatever plugins are installed there have no say.
    around = environment(CAFFELITE_CUDA_DRIVER=gpu_driver(), PYTEST_DISABLE_PLUGIN_AUTOLOAD="1")
    started = time.perf_counter()
    status = CUT_OFF
    if end - started > 1:
        with log.open("w") as out:
            status = bounded([*command, f"--junitxml={junit}", *tests], around, out, end - started)
    return Result(name, status, time.perf_counter() - started, *_outcome(junit))


def bounded(command: Sequence[str], around: dict[str, str], out: object, seconds: float) -> int:
    """The exit status of a command, or CUT_OFF: then it has been killed with all that it started."""
    process = subprocess.Popen(command, cwd=ROOT, env=around, stdout=out, stderr=subprocess.STDOUT, start_new_session=True)  # type: ignore[call-overload]
    try:
        return int(process.wait(seconds))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return CUT_OFF


def _outcome(junit: Path) -> tuple[int, dict[str, str]]:
    """How many tests passed, and the failed ones, as pytest names them, with the first line of what they say."""
    if not junit.exists():
        return 0, {}
    passed, failed = 0, {}
    for case in ElementTree.parse(junit).getroot().iter("testcase"):
        wrong = next((part for part in case if part.tag in ("failure", "error")), None)
        if wrong is not None:
            file = case.get("classname", "").replace(".", "/")
            failed[f"{file}.py::{case.get('name')}"] = (wrong.get("message") or "").partition("\n")[0][:200]
        elif all(part.tag != "skipped" for part in case):
            passed += 1
    return passed, failed


def report(results: Iterable[Result], alone: Iterable[Result]) -> str:
    """A line for each file, one for each failed test, and the sum."""
    results, again = list(results), {result.name: result for result in alone}
    lines = [result.line for result in results]
    failed = {test: message for result in results for test, message in result.failed.items()}
    for number, (test, message) in enumerate(failed.items()):
        retried = again.get(f"alone-{number}")
        note = "" if retried is None else " [alone: passes]" if not retried.status else " [alone: fails too]"
        lines.append(f"FAILED {test}{note} {message}")
    bad = [result.name for result in results if result.status]
    lines.append(f"{sum(result.passed for result in results)} passed, {len(failed)} failed, {len(bad)} of {len(results)} files not clean")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", default=files(), help="names of test files, without tests/ and .py (default: all that concern the backend)")
    parser.add_argument("--out", type=Path, help="folder for the logs (default: none is kept)")
    parser.add_argument("--jobs", type=int, default=min(6, os.cpu_count() or 1), help="processes at once (default: 6, or the processors)")
    parser.add_argument("--minutes", type=float, default=60, help="for everything (default: 60)")
    parser.add_argument("--prefix", default="", help="command that each process runs under")
    args = parser.parse_args()
    end = time.perf_counter() + 60 * args.minutes
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(args.jobs) as pool:
        args.out = (args.out or Path(folder)).resolve()
        args.out.mkdir(parents=True, exist_ok=True)
        waiting = [pool.submit(run, name, [f"tests/{name}.py"], args, end) for name in args.files]
        results = []
        for future in waiting:
            results.append(future.result())
            print(results[-1].line, *(f"  {test}: {said}" for test, said in list(results[-1].failed.items())[:3]), sep="\n", flush=True)
        failed = list({test: None for result in results for test in result.failed})[:ALONE]
        alone = list(pool.map(lambda pair: run(f"alone-{pair[0]}", [pair[1]], args, end), enumerate(failed)))
        text = report(results, [result for result in alone if result.status != CUT_OFF])
        (args.out / "tests.txt").write_text(text + "\n")
    told = text.splitlines()[len(results) :]
    print("", *told[:-1][:TOLD], *([f"... and {len(told) - 1 - TOLD} more"] if len(told) > TOLD + 1 else []), told[-1], sep="\n")
    return int(any(result.status for result in results))


if __name__ == "__main__":
    sys.exit(main())
