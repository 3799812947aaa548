"""Shared by all tests: the backends to test, a seeded generator, guarded arrays, and the tests that need larger data.

--backend NAME restricts the `backend` fixture to one backend, and fails if that one does not load. Tests marked `testdata` run only
where CAFFELITE_TESTDATA names a folder with golden/ and data/.
"""

from __future__ import annotations

import os
import platform
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from arrays import Maker

from caffelite import backends
from caffelite.errors import BackendError

TESTDATA = "CAFFELITE_TESTDATA"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--backend", metavar="NAME", help="test this backend alone; it must load")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", f"testdata: needs the folder that {TESTDATA} names")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if os.environ.get(TESTDATA):
        return
    left_out = [item for item in items if item.get_closest_marker("testdata")]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not item.get_closest_marker("testdata")]


def _backend_names(config: pytest.Config) -> list[str]:
    chosen = config.getoption("--backend")
    if chosen:
        return [chosen]
    names = []
    for name in backends.NAMES:
        try:
            backends.get(name)
        except BackendError:
            continue
        names.append(name)
    return names


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "backend" in metafunc.fixturenames and "backend" in metafunc._arg2fixturedefs:
        definition = metafunc._arg2fixturedefs["backend"][-1]
        if definition.func.__module__ == __name__:
            metafunc.parametrize("backend", _backend_names(metafunc.config), indirect=True, scope="session")


@pytest.fixture(scope="session")
def backend(request: pytest.FixtureRequest) -> Any:
    """Each backend that loads here, in turn; oneDNN does even the smallest products itself here."""
    chosen = backends.get(request.param)
    if hasattr(chosen, "small_products"):
        chosen.small_products = 0
    return chosen


@pytest.fixture(scope="session")
def cuda() -> Any:
    """The cuda backend, on a GPU or emulated. Skips where neither is asked for; where CAFFELITE_CUDA_DRIVER names a driver, it must load."""
    try:
        return backends.get("cuda")
    except BackendError as error:
        if os.environ.get("CAFFELITE_CUDA_DRIVER"):
            raise
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def onednn() -> Any:
    """The backend; it must load where its wheel exists, and is skipped on other machines."""
    try:
        chosen: Any = backends.get("onednn")
    except BackendError as error:
        if sys.platform == "linux" and platform.machine() == "x86_64":
            raise
        pytest.skip(str(error))
    chosen.small_products = 0
    return chosen


@pytest.fixture
def no_numpy(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], list[str]]:
    """no_numpy(op) counts the calls of NumPy's implementation of an op."""

    def watch(op: str) -> list[str]:
        calls: list[str] = []
        owner = next(cls for cls in backends.get("numpy").__class__.__mro__ if op in vars(cls))
        plain = vars(owner)[op]

        def counted(*args: Any, **options: Any) -> Any:
            calls.append(op)
            return plain(*args, **options)

        monkeypatch.setattr(owner, op, counted)
        return calls

    return watch


@pytest.fixture
def reference() -> Any:
    """The numpy backend, whose float64 arithmetic gradient checks use."""
    return backends.get("numpy")


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    """Seeded by the test's own name, so that tests do not depend on each other."""
    return np.random.default_rng(zlib.crc32(request.node.name.encode()))


@pytest.fixture
def make(backend: Any) -> Iterator[Maker]:
    """Makes arrays of the backend between guard zones, which are checked when the test has ended."""
    maker = Maker(backend)
    yield maker
    maker.check()


@pytest.fixture
def testdata() -> Path:
    """The folder with golden/ and data/; for tests marked `testdata`."""
    return Path(os.environ[TESTDATA])
