"""A place that is soon full: a tmpfs of 1 MiB where this process may mount one, else a limit on the size of files."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

ROOM = 2**20
LIMITED = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv.pop(1)),) * 2)
from caffelite.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


class SmallDisk:
    """path: a folder. run: caffelite in a process for which the folder is small."""

    def __init__(self, path: Path, mounted: bool) -> None:
        self.path, self.mounted, self.limit = path, mounted, ROOM

    def run(self, *argv: str) -> subprocess.CompletedProcess[str]:
        """The command's result."""
        start = ["-m", "caffelite"] if self.mounted else ["-c", LIMITED, str(self.limit)]
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
        return subprocess.run([sys.executable, *start, *argv], capture_output=True, text=True, timeout=300, env=environment)

    def fill(self) -> None:
        """Leaves no room at all."""
        self.limit = 0
        with suppress(OSError), open(self.path / "filler", "wb", buffering=0) as file:
            while self.mounted:
                file.write(bytes(4096))


@contextmanager
def small_disk_at(path: Path) -> Iterator[SmallDisk]:
    """A SmallDisk at a folder: a tmpfs of ROOM bytes if this process may mount one."""
    try:
        mount = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={ROOM}", "tmpfs", str(path)], capture_output=True, check=False)
        mounted = mount.returncode == 0
    except OSError:  # there is no such command
        mounted = False
    try:
        yield SmallDisk(path, mounted)
    finally:
        if mounted:
            subprocess.run(["umount", str(path)], check=True)
