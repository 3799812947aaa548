"""Compiles proto/caffelite.proto into caffelite/caffelite_pb2.py and .pyi.

    python tools/generate_proto.py

Needs grpcio-tools 1.62.x (pip install "grpcio-tools==1.62.3"), whose output every protobuf runtime from 4.25 on reads. The
result is committed, so that installing caffelite needs no compiler.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main() -> int:
    """Runs protoc; returns its exit status."""
    command = [sys.executable, "-m", "grpc_tools.protoc", "--proto_path=proto", "--python_out=caffelite", "--pyi_out=caffelite", "caffelite.proto"]
    return subprocess.run(command, cwd=ROOT, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
