"""What the commands share: Caffe's flags, hints for mistyped words, and errors told in plain words."""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from caffelite import environment
from caffelite.errors import BackendError, CaffeliteError, SpecError, Where, did_you_mean, nearest

if TYPE_CHECKING:
    from caffelite.backends.contract import Backend

PRECISIONS = ("float32", "tf32", "bfloat16")
FLAG = re.compile(r"--?([A-Za-z][A-Za-z0-9_-]+)(=.*)?", re.DOTALL)


def normalise(argv: Iterable[str]) -> list[str]:
    """Caffe's spellings in ours: -solver and --solver are one flag, sigint_effect is sigint-effect."""
    result = []
    for word in argv:
        match = FLAG.fullmatch(word)
        result.append(f"--{match[1].replace('_', '-')}{match[2] or ''}" if match else word)
    return result


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are SpecErrors that name the nearest flag. Flags are never guessed from a beginning."""

    def __init__(self, prog: str, description: str, example: str) -> None:
        super().__init__(
            prog=prog,
            description=description,
            epilog=f"example:\n  {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        self._first = "-"  # the first word of what is parsed

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        """The parsed flags. SpecError for an unknown flag, a bad value or a word too many."""
        for word in argv:  # before argparse, which would rather speak of a required flag that the mistyped one was meant to be
            if word.startswith("--") and word != "--" and word.split("=")[0] not in self._option_string_actions:
                raise self._unexpected(word)
        self._first = next(iter(argv), "-")
        args, rest = self.parse_known_args(argv)
        if rest:
            raise self._unexpected(rest[0])
        return args

    def error(self, message: str) -> NoReturn:
        hint, missing = self.see_help, re.fullmatch("the following arguments are required: (--[a-z]+).*", message)
        if missing and not self._first.startswith("-"):  # the flag's value without the flag
            hint = f"did you mean {missing[1]} {self._first}?"
        raise SpecError(message.removeprefix("argument "), hint=hint)

    @property
    def see_help(self) -> str:
        """Where to read on."""
        return f"see {self.prog} --help"

    def _unexpected(self, word: str) -> SpecError:
        if not word.startswith("-"):
            return SpecError(f"unexpected word '{word}'", hint=self.see_help)
        flag = word.split("=")[0]
        near = nearest(flag, [option for option in self._option_string_actions if option.startswith("--")])
        return SpecError(f"unknown flag {flag}", hint=f"did you mean {near}?" if near else self.see_help)


def one_of(*choices: str) -> Callable[[str], str]:
    """An argparse type for one of `choices`, with the nearest one named in the error."""

    def convert(text: str) -> str:
        if text in choices:
            return text
        near = nearest(text, choices)
        raise argparse.ArgumentTypeError(f"'{text}' is not one of {', '.join(choices)}" + (f"; did you mean {near}?" if near else ""))

    return convert


def whole_number(least: int) -> Callable[[str], int]:
    """An argparse type for a whole number of at least `least`."""

    def convert(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(f"'{text}' is not a whole number of at least {least}")
        return value

    return convert


def named_file(text: str) -> str:
    """An argparse type for a file or folder to be written, which the standard output cannot take the place of."""
    if text == "-":
        raise argparse.ArgumentTypeError("'-', the standard output, will not do; give a name (./- if that is the name)")
    return text


def comma_list(text: str) -> list[str]:
    """An argparse type for "a,b,c"; empty entries are dropped."""
    return [part.strip() for part in text.split(",") if part.strip()]


def add_machine_flags(parser: argparse.ArgumentParser) -> None:
    """--backend, --precision, --threads and --gpu."""
    group = parser.add_argument_group("machine")
    group.add_argument("--backend", metavar="NAME", help="auto, onednn, numpy or cuda (default: CAFFELITE_BACKEND, else auto: the fastest for CPUs that loads)")
    group.add_argument(
        "--precision",
        type=one_of(*PRECISIONS),
        default="float32",
        metavar="TYPE",
        help="float32 (default); tf32: float32 with products rounded to 11 bits (GPUs alone); or bfloat16 activations. Weights stay float32",
    )
    group.add_argument("--threads", type=whole_number(1), metavar="N", help="CPU threads (default: all this process may use)")
    group.add_argument("--gpu", metavar="ID", help="run on GPU number ID (the cuda backend; nothing falls back to the CPU in silence)")


def add_state_flags(parser: argparse.ArgumentParser, *, phase: bool, whose: str = "the net's", others: str = "") -> None:
    """--level and --stage, and --phase where a command serves both. whose: which net's state it is, for the help; others: what the others' is."""
    group = parser.add_argument_group("state")
    if phase:
        group.add_argument("--phase", type=one_of("TRAIN", "TEST"), metavar="P", help="TRAIN or TEST (default: %(default)s)", default="TRAIN")
    group.add_argument("--level", type=int, default=0, metavar="N", help=f"{whose} level, for include and exclude rules (default: 0){others}")
    group.add_argument("--stage", type=comma_list, default=[], metavar="A,B", help=f"{whose} stages, for include and exclude rules{others}")


def open_backend(args: argparse.Namespace, *, gpu_mode: Where | None = None, device: int = 0) -> Backend:
    """The backend that the flags and CAFFELITE_BACKEND ask for. gpu_mode: where a solver file says solver_mode: GPU; device: and which.

    BackendError for a backend or a GPU that cannot be used; a backend named by flag or environment wins over solver_mode.
    What makes a GPU slow, such as being none, is said on the standard error stream.
    """
    backend = _chosen_backend(args, gpu_mode, device)
    slow = backend.supports(args.precision)
    if slow and backend.name == "cuda":
        print(f"caffelite: note: {slow}", file=sys.stderr)
    if driver := getattr(backend, "driver", None):
        driver.tell = _Compiling()
    return backend


class _Compiling:
    """Says, at the first kernels that have to be compiled, what it is that takes so long."""

    def __init__(self) -> None:
        self._said = False

    def __call__(self, stem: str) -> None:
        if not self._said:
            self._said = True
            text = f"caffelite: note: compiling CUDA kernels ({stem} and what else is needed), which takes some seconds; they are kept for other runs"
            print(text, file=sys.stderr, flush=True)


def asks_for_gpu(args: argparse.Namespace) -> bool:
    """Whether the flags or CAFFELITE_BACKEND ask for the cuda backend. SpecError as for open_backend."""
    if args.gpu is not None:
        return _gpu_number(args) >= 0
    return _named_backend(args) == "cuda"


def _chosen_backend(args: argparse.Namespace, gpu_mode: Where | None, device: int) -> Backend:
    from caffelite import backends

    if args.gpu is not None:
        return backends.get("cuda", device=_gpu_number(args))
    name = _named_backend(args)
    if gpu_mode and not name:
        return _gpu_of_solver(gpu_mode, device)
    try:
        return backends.get(name or "auto", threads=args.threads)
    except BackendError as error:
        if name and not args.backend:
            error.message += f" (asked for by the environment: {environment.BACKEND}={name})"
        raise


def _named_backend(args: argparse.Namespace) -> str | None:
    """The backend that --backend names, or else the environment. SpecError for one that does not exist."""
    from caffelite import backends

    known = ("auto", *backends.NAMES)
    if args.backend and args.backend not in known:
        raise SpecError(f"unknown backend '{args.backend}'", hint=did_you_mean(args.backend, known))
    return args.backend or environment.one_of(environment.BACKEND, known)


def _gpu_number(args: argparse.Namespace) -> int:
    """The number that --gpu gives. SpecError for anything else, and beside another --backend."""
    if args.backend not in (None, "cuda"):
        raise SpecError(f"--gpu {args.gpu} and --backend {args.backend} exclude each other", hint="leave one of them out")
    if not args.gpu.isdecimal():
        raise SpecError(f"--gpu takes the number of one GPU, found '{args.gpu}'", hint="caffelite device-query lists them; one at a time is used")
    return int(args.gpu)


def _gpu_of_solver(place: Where, device: int) -> Backend:
    """The GPU of solver_mode: GPU. BackendError, at that place, when it cannot be used."""
    from caffelite import backends

    try:
        return backends.get("cuda", device=device)
    except BackendError as error:
        hint = f"{error.hint}; or pass --backend onednn (or numpy), which wins over solver_mode"
        raise BackendError(f"solver_mode: GPU, but {error.message}", where=place, hint=hint) from error


# --- errors ------------------------------------------------------------------------------------------------------------


def report(error: BaseException) -> int:
    """Prints an error in one to three lines on stderr and returns the exit status."""
    if isinstance(error, KeyboardInterrupt):
        print("caffelite: interrupted", file=sys.stderr)
        return 130
    trace(error)
    known = _known(error)
    if known:
        print(f"caffelite: error: {known}", file=sys.stderr)
        return known.exit_code
    print(f"caffelite: internal error: {type(error).__name__}: {_first_line(error)}", file=sys.stderr)
    print(f"  this is a fault in caffelite, not in your files; {_keep_traceback(error)}", file=sys.stderr)
    return 1


def trace(error: BaseException) -> None:
    """Prints where an error came from, if the environment asks for it."""
    if environment.text(environment.DEBUG):
        traceback.print_exception(type(error), error, error.__traceback__)


def _known(error: BaseException) -> CaffeliteError | None:
    if isinstance(error, CaffeliteError):
        return error
    if isinstance(error, MemoryError):
        detail = f": {_first_line(error)}" if str(error) else ""
        return CaffeliteError(f"not enough memory{detail}", hint="a smaller batch_size, or --precision bfloat16, needs less; caffelite summary shows how much")
    if isinstance(error, OSError):
        name = f"{error.filename}: " if error.filename else ""
        return CaffeliteError(f"{name}{error.strerror or error}")
    return None


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0]


def _keep_traceback(error: BaseException) -> str:
    """Writes the traceback to a file of its own; says where, or how else to see it."""
    try:
        with tempfile.NamedTemporaryFile("w", prefix="caffelite-error-", suffix=".txt", delete=False, encoding="utf-8") as file:
            traceback.print_exception(type(error), error, error.__traceback__, file=file)
        return f"the details are in {file.name}"
    except OSError:
        return "run again with CAFFELITE_DEBUG=1 for details"


# --- formats -----------------------------------------------------------------------------------------------------------


def table(rows: Sequence[Sequence[str]], *, left: int = 1) -> list[str]:
    """Lines of an aligned table; the first row is the head, the first `left` columns stand left, the others right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [cell.ljust(width) if i < left else cell.rjust(width) for i, (cell, width) in enumerate(zip(row, widths))]
        lines.append("  ".join(cells).rstrip())
    return [lines[0], "  ".join("-" * width for width in widths), *lines[1:]]


def number(value: float) -> str:
    """A number as C++ streams print it: six significant digits."""
    return f"{value:g}"


def megabytes(count: float) -> str:
    """Bytes as megabytes of 2^20, less than a tenth of one as kilobytes of 2^10, and less than a tenth of those as they are."""
    if 0 < count < 2**10 / 10:
        return f"{count:,.0f} bytes"
    return f"{count / 2**20:,.1f} MB" if count >= 2**20 / 10 or not count else f"{count / 2**10:,.1f} KB"


def driver_of(backend: Backend) -> str | None:
    """What the cuda backend runs on, "cupy" (a GPU) or "emulator"; None for a CPU backend."""
    name = getattr(getattr(backend, "driver", None), "name", None)
    return None if name is None else str(name)


def machine_name(backend: str, driver: str | None) -> str:
    """A backend's name for people, who should not take an emulated GPU for one."""
    return f"{backend} (emulated)" if driver == "emulator" else backend


def peak_device_mb(backend: Backend) -> float | None:
    """The most memory that a run has taken on a GPU, in megabytes of 2^20; None on a CPU."""
    peak = backend.peak_bytes()
    return None if peak is None else round(peak / 2**20, 3)


def json_text(value: Any) -> str:
    """One line of strict JSON; NaN and infinity, which JSON lacks, become null."""
    import json

    return json.dumps(_finite(value), allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if value - value == 0 else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value
