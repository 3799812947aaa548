"""The commands: one module each, imported only when it is called, so that `caffelite --help` starts at once.

A command module has `build_parser(prog) -> Parser` and `run(args) -> int` (the exit status).
"""

from __future__ import annotations

import importlib
from typing import Any

COMMANDS = {
    "train": "train a net from its solver file; resume, fine-tune",
    "test": "score a net with weights on its test data",
    "time": "measure forward and backward, layer by layer, or whole training steps",
    "summary": "show a net's layers, shapes, parameters and memory without running it",
    "check": "check net and solver files and the data they name",
    "convert": "turn images into an LMDB database",
    "mean": "compute a database's mean image",
    "preview": "draw what training makes of a net's images",
    "dataset": "draw a synthetic image data set",
    "plot": "draw the curves of a training run",
    "device-query": "show what this machine offers",
}


def load_command(name: str) -> Any:
    """The module of one of COMMANDS."""
    return importlib.import_module("caffelite.cli." + name.replace("-", "_"))
