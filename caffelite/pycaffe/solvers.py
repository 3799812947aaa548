"""pycaffe's solvers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from caffelite.pycaffe.mirror import called_back, engine_runs
from caffelite.pycaffe.net import Net
from caffelite.pycaffe.settings import new_backend, settings
from caffelite.schema import pb, read_solver
from caffelite.solver.listeners import Listener
from caffelite.solver.loop import Solver as EngineSolver


class SolverParameters:
    """The few settings pycaffe shows of a solver; base_lr can be changed."""

    def __init__(self, param: pb.SolverParameter) -> None:
        self._param = param
        self.max_iter, self.display, self.layer_wise_reduce = param.max_iter, param.display, param.layer_wise_reduce

    @property
    def base_lr(self) -> float:
        return self._param.base_lr

    @base_lr.setter
    def base_lr(self, value: float) -> None:
        self._param.base_lr = value


class _Callback(Listener):
    """A pair of functions from Solver.add_callback."""

    def __init__(self, on_start: Callable[[], object], on_gradients_ready: Callable[[], object]) -> None:
        self._start, self._gradients_ready = on_start, on_gradients_ready

    def on_iteration_start(self, iteration: int) -> None:
        self._start()

    def on_gradients(self, iteration: int) -> None:
        self._gradients_ready()


class Solver:
    """A solver made from a prototxt; `.net` and `.test_nets` share parameters as in training from the command line."""

    TYPE: str | None = None

    def __init__(self, solver_file: str | Path) -> None:
        spec = read_solver(solver_file)
        if self.TYPE:
            spec.param.type = self.TYPE
        if spec.param.random_seed < 0 and settings.seed is not None:
            spec.param.random_seed = settings.seed
        self._solver = EngineSolver(spec, backend=new_backend(), observe=True, effects={})  # Ctrl-C interrupts, as in any Python program
        self.net = Net.of(self._solver.net)
        self.test_nets = [Net.of(net) for net in self._solver.test_nets]
        self.param = SolverParameters(spec.param)

    @property
    def iter(self) -> int:
        """Updates done."""
        return self._solver.iter

    @property
    def lr(self) -> float:
        """The rate of the next update; reading it can advance multistep, as in Caffe."""
        return self._solver.lr

    def step(self, iterations: int) -> None:
        """Runs some iterations, with the tests, displays and snapshots that fall due."""
        with engine_runs():
            self._solver.step(iterations)

    def solve(self, resume_file: str | Path | None = None) -> None:
        """Trains up to max_iter, from a saved state if given."""
        with engine_runs():
            self._solver.solve(resume_file)

    def restore(self, state_file: str | Path) -> None:
        """Takes up the run saved in a .solverstate file."""
        with engine_runs():
            self._solver.restore(state_file)

    def snapshot(self) -> None:
        """Writes the model and the solver's state."""
        with engine_runs():
            self._solver.snapshot()

    def share_weights(self, net: Net) -> None:
        """Lets `net` use the train net's parameter values."""
        net.share_with(self.net)

    def apply_update(self) -> None:
        """One update from the gradients that are in the net."""
        with engine_runs():
            self._solver.apply_update()

    def add_callback(self, on_start: Callable[[], object], on_gradients_ready: Callable[[], object]) -> None:
        """Calls on_start() at the start of each iteration, on_gradients_ready() when its gradients are complete, before the update."""
        self._solver.listeners.append(_Callback(called_back(on_start), called_back(on_gradients_ready)))


class SGDSolver(Solver):
    TYPE = "SGD"


class NesterovSolver(Solver):
    TYPE = "Nesterov"


class AdaGradSolver(Solver):
    TYPE = "AdaGrad"


class RMSPropSolver(Solver):
    TYPE = "RMSProp"


class AdaDeltaSolver(Solver):
    TYPE = "AdaDelta"


class AdamSolver(Solver):
    TYPE = "Adam"


_SOLVERS: dict[str, type[Solver]] = {str(cls.TYPE): cls for cls in (SGDSolver, NesterovSolver, AdaGradSolver, RMSPropSolver, AdaDeltaSolver, AdamSolver)}


def get_solver(solver_file: str | Path) -> Solver:
    """The solver of the type that the file names."""
    return _SOLVERS.get(read_solver(solver_file).param.type, Solver)(solver_file)
