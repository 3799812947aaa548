"""What to say when a GPU's memory does not do: how much the run needs in all, how much there is, and what would fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from caffelite.cli.common import megabytes
from caffelite.errors import CaffeliteError, OutOfMemoryError
from caffelite.schema import NetSpec, SolverSpec, pb
from caffelite.solver.config import NetChoice, test_choices, train_choice
from caffelite.solver.footprint import footprint


@contextmanager
def explained(choices: Callable[[], Sequence[NetChoice]], precision: str, param: pb.SolverParameter | None = None) -> Iterator[None]:
    """Adds to an OutOfMemoryError what it takes to do without. choices, param: what runs, as for footprint()."""
    try:
        yield
    except OutOfMemoryError as error:
        with suppress(CaffeliteError):  # where it cannot be foretold, the error says what it knows
            _explain(error, choices(), precision, param)
        raise


def nets_of(spec: SolverSpec) -> list[NetChoice]:
    """A solver's training net and its test nets."""
    train = train_choice(spec)
    return [train, *test_choices(spec, train)]


def with_snapshot(error: OutOfMemoryError, last: Path | None) -> None:
    """Adds where the run can be taken up again."""
    if last:
        error.hint = f"{error.hint}\n  the last snapshot is whole: {last}"


def _explain(error: OutOfMemoryError, choices: Sequence[NetChoice], precision: str, param: pb.SolverParameter | None) -> None:
    room, needs = error.free + error.used, footprint(choices, precision=precision, param=param).peak
    error.message = f"out of memory on {error.device}: this run needs {megabytes(needs)} in all; {megabytes(room)} of {megabytes(error.total)} are available"
    if needs <= room:
        error.hint = "other programs, or pieces in between, take up the rest: nvidia-smi shows who; or lower batch_size"
        return
    advice = []
    if batch := fitting_batch(choices, precision, param, room, needs):
        advice.append(f"batch_size {batch} fits")
    if precision == "float32" and (smaller := footprint(choices, precision="bfloat16", param=param).peak) <= room:
        advice.append(f"--precision bfloat16 needs {megabytes(smaller)}")
    error.hint = "; ".join(advice) or "not even batch_size 1 fits: use a smaller net, or a GPU with more memory"


def fitting_batch(choices: Sequence[NetChoice], precision: str, param: pb.SolverParameter | None, room: int, most: int) -> int:
    """The largest number that batch sizes may be cut down to so that `room` bytes do; 0 if there is none, or the net has no batch size to change.

    most: what the whole batches need, which is more than `room`. Memory is nearly affine in the batch, so one guess is nearly right; what is returned
    has been planned and found to fit, and one more not to.
    """

    def needs(batch: int) -> int:
        return footprint([replace(choice, spec=cut(choice.spec, batch)) for choice in choices], precision=precision, param=param).peak

    fits, fails = 0, max(batches(choice.spec) for choice in choices)
    if fails <= 1:
        return 0
    least = needs(1)
    guess = 1 + (room - least) * (fails - 1) // max(most - least, 1)
    while fails - fits > 1:
        guess = min(max(guess, fits + 1), fails - 1)
        if needs(guess) <= room:
            fits, guess = guess, guess + 1  # often the very next one fails
        else:
            fails, guess = guess, guess - 1
    return fits


def cut(spec: NetSpec, batch: int) -> NetSpec:
    """The net with batches of at most `batch`: Data layers' batch_size, and axis 0 of Input's and DummyData's tops."""
    param = pb.NetParameter()
    param.CopyFrom(spec.param)
    for layer in param.layer:
        if layer.type == "Data":
            layer.data_param.batch_size = min(layer.data_param.batch_size, batch)
        for shape in (*layer.input_param.shape, *layer.dummy_data_param.shape):
            if shape.dim:
                shape.dim[0] = min(shape.dim[0], batch)
    return NetSpec(param, spec.where, spec.file)


def batches(spec: NetSpec) -> int:
    """The largest batch of the net's sources."""
    sizes = [layer.data_param.batch_size for layer in spec.param.layer if layer.type == "Data"]
    sizes += [shape.dim[0] for layer in spec.param.layer for shape in (*layer.input_param.shape, *layer.dummy_data_param.shape) if shape.dim]
    return max(sizes, default=0)
