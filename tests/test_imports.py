"""Imports run one way: cli -> solver -> net -> graph -> layers -> {blob, fillers, schema} -> errors (docs/design.md), read from the source by ast."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

PACKAGE = Path(__file__).parent.parent / "caffelite"
# From the bottom up. A part may import parts of lower levels, and itself. Parts of one level do not know each other.
LEVELS = [
    {"errors", "blob", "caffelite_pb2"},
    {"environment", "files", "machine", "schema", "backends.contract"},
    {"fillers", "splits", "data", "hdf5"},
    {"layer"},
    {"net_spec"},
    {"layers", "legality"},
    {"graph"},
    {"memory", "params", "weights"},
    {"sharing"},
    {"fusion"},
    {"net"},
    {"backends"},
    {"solver"},
    {"pycaffe", "proto"},
    {"__init__"},
    {"cli"},
    {"__main__"},
]
LEVEL = {part: i for i, parts in enumerate(LEVELS) for part in parts}
# known_types() imports all layers so that they register themselves.
EXCEPTIONS = {("layer.py", "layers")}
ONLY_IN = {
    "lmdb": ("data/lmdb_source.py",),
    "caffelite_pb2": ("schema/",),
    "ctypes": (
        "backends/numpy/blas.py",
        "backends/onednn/",
        "backends/cuda/nvrtc.py",
        "backends/cuda/cupy_driver.py",
        "backends/cuda/tensor_map.py",
        "backends/cuda/emulator/",
    ),
    "cupy": ("backends/cuda/", "cli/device_query.py"),
    "matplotlib": ("cli/plot.py",),
    "h5py": ("hdf5.py",),
    "PIL": ("data/",),
    "tensorboardX": ("cli/tensorboard.py",),
}
LATE = {"matplotlib", "h5py", "PIL", "cupy", "tensorboardX"}  # costly or optional: imported where they are used, so that starting up is quick
THIRD_PARTY = {"numpy", "ml_dtypes", "google", "lmdb", "PIL", "matplotlib", "h5py", "cupy", "tensorboardX"}


class Import(NamedTuple):
    file: str
    line: int
    module: str  # "numpy.typing", or "caffelite.schema"
    top: bool  # at the module's top level

    @property
    def outside(self) -> str:
        """The first part of the module's name."""
        return self.module.split(".")[0]

    def __str__(self) -> str:
        return f"caffelite/{self.file}:{self.line} imports {self.module}"


def _is_typing_only(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def _walk(node: ast.AST, top: bool) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.Import, ast.ImportFrom)):
            yield child, top
        elif not _is_typing_only(child):
            yield from _walk(child, top and not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)))


def _modules(node: ast.Import | ast.ImportFrom) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    assert node.level == 0, "relative imports are not used here"
    return [f"{node.module}.{alias.name}" if node.module == "caffelite" else str(node.module) for alias in node.names]


def read_imports() -> list[Import]:
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).as_posix()
        if name == "caffelite_pb2.py":  # generated
            continue
        for node, top in _walk(ast.parse(path.read_text()), True):
            found += [Import(name, node.lineno, module, top) for module in _modules(node)]
    return found


IMPORTS = read_imports()
INSIDE = [i for i in IMPORTS if i.outside == "caffelite"]


def part_of_file(file: str) -> str:
    if file == "backends/contract.py":
        return "backends.contract"
    return file.split("/")[0].removesuffix(".py")


def part_of_module(module: str) -> str:
    names = module.split(".")[1:]
    if names[:2] == ["backends", "contract"]:
        return "backends.contract"
    exists = names and ((PACKAGE / names[0]).is_dir() or (PACKAGE / f"{names[0]}.py").exists())
    return names[0] if exists else "__init__"  # "from caffelite import __version__"


def test_every_part_has_a_level() -> None:
    assert len(INSIDE) > 200
    assert {part_of_file(i.file) for i in IMPORTS} | {part_of_module(i.module) for i in INSIDE} <= set(LEVEL)


def test_imports_run_one_way() -> None:
    wrong = []
    for i in INSIDE:
        here, there = part_of_file(i.file), part_of_module(i.module)
        if here != there and LEVEL[there] >= LEVEL[here] and (i.file, there) not in EXCEPTIONS:
            wrong.append(str(i))
    assert not wrong


def test_a_backend_knows_the_contract_environment_errors_files_and_numpy_alone() -> None:
    wrong = []
    for i in IMPORTS:
        folder = i.file.split("/")[1] if i.file.startswith("backends/") and i.file.count("/") > 1 else None
        if folder is None or i.outside in sys.stdlib_module_names | {"numpy", "ml_dtypes"}:
            continue
        allowed = [
            "caffelite.backends.contract",
            "caffelite.environment",
            "caffelite.errors",
            "caffelite.files",
            f"caffelite.backends.{folder}",
            "caffelite.backends.numpy",
        ]
        allowed += ["cupy"] if folder == "cuda" else []
        if not any(i.module == a or i.module.startswith(a + ".") for a in allowed):
            wrong.append(str(i))
    assert not wrong


@pytest.mark.parametrize("library", ONLY_IN)
def test_a_library_is_imported_where_it_belongs(library: str) -> None:
    wrong = [str(i) for i in IMPORTS if library in i.module.split(".") and not i.file.startswith(ONLY_IN[library])]
    assert not wrong


def test_costly_libraries_are_imported_where_they_are_used() -> None:
    assert not [str(i) for i in IMPORTS if i.outside in LATE and i.top and not i.file.startswith("backends/cuda/")]


def test_nothing_else_is_needed() -> None:
    known = set(sys.stdlib_module_names) | THIRD_PARTY | {"caffelite"}
    assert not [str(i) for i in IMPORTS if i.outside not in known]
