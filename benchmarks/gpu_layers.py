"""Times each layer on a GPU and sets it beside the roofline: `caffelite time --model --gpu 0 --json`, for several nets and precisions.

    python benchmarks/gpu_layers.py [--nets nin_crop48:128 alexnet:256] [--precisions bfloat16 tf32 float32] [--out FOLDER]

Prints a table for each; --out keeps each answer as layers-NET-BATCH-PRECISION.json.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

from gpu_rate import caffelite
from gpu_step import net_and_batch
from nets import on_constants, write_solver

from caffelite.cli.common import table
from caffelite.cli.roofline import gpu_lines, gpu_table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nets", nargs="+", type=net_and_batch, default=[("nin_crop48", 128), ("alexnet", 256)], metavar="NET:BATCH")
    parser.add_argument("--precisions", nargs="+", choices=("bfloat16", "tf32", "float32"), default=["bfloat16", "tf32", "float32"])
    parser.add_argument("--iterations", type=int, default=30)
    parser.add_argument("--gpu", default="0", metavar="ID")
    parser.add_argument("--out", type=Path, help="folder for the JSON objects (default: none are kept)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        out = args.out or Path(name)
        out.mkdir(parents=True, exist_ok=True)
        for net, batch in args.nets:
            model = write_solver(Path(name), on_constants(net, batch), net).with_name(f"{net}.prototxt")
            for precision in args.precisions:
                flags = ["--model", model, "--gpu", args.gpu, "--precision", precision, "--iterations", args.iterations, "--json"]
                result = json.loads(caffelite("time", *flags))
                (out / f"layers-{net}-{batch}-{precision}.json").write_text(json.dumps(result, indent=1) + "\n")
                print(f"\n{net}, batch {batch}, {precision}: forward {result['forward_ms']:.3f} ms, backward {result['backward_ms']:.3f} ms")
                print(*table(gpu_table(result), left=2), *gpu_lines(result), sep="\n", flush=True)


if __name__ == "__main__":
    sys.exit(main())
