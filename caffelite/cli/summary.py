"""caffelite summary: layers, shapes, parameters, multiply-adds and memory of a net, without making an array."""

from __future__ import annotations

import argparse
import re
from dataclasses import asdict
from math import prod
from typing import Any

from caffelite import backends
from caffelite.backends.contract import Backend
from caffelite.cli.common import Parser, add_machine_flags, add_state_flags, asks_for_gpu, json_text, megabytes, open_backend, table
from caffelite.cli.specs import is_solver
from caffelite.errors import DataError
from caffelite.fusion import fuse
from caffelite.graph import Graph, Node, build_graph
from caffelite.layer import Layer
from caffelite.layers.data import DataLayer
from caffelite.memory import ITEM_BYTES, plan_memory
from caffelite.schema import pb, read_net, read_solver
from caffelite.solver.config import NetChoice, check_solver, test_choices, train_choice
from caffelite.solver.footprint import Footprint, footprint

HEAD = ("layer", "type", "top shapes", "parameters", "multiply-adds", "memory")
PARTS = {"copies": "their bfloat16 copies", "other": "scratch and rounding"}  # of a Footprint, where its own names do not do


def build_parser(prog: str) -> Parser:
    parser = Parser(
        prog,
        "Shows a net's layers, shapes, parameters, multiply-adds and memory without running it.\n"
        "A solver file shows its training net and its test nets, whatever --phase says.\n\n"
        "The size of the images comes from the databases. Where one cannot be read, images of crop_size and of as many channels as\n"
        "mean_value has entries (else three) are assumed, which is said.\n\n"
        "With --backend cuda it also says how much of a GPU's memory a run needs; no GPU has to be there.",
        f"{prog} models/nin/train_val.prototxt --phase TEST",
    )
    parser.add_argument("file", metavar="NET|SOLVER", help="a net or a solver, as prototxt")
    parser.add_argument(
        "--image", type=image_size, metavar="CxHxW", help="take the images of Data layers to be of this size, 3x64x64 say; no database is opened"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    add_state_flags(parser, phase=True)
    add_machine_flags(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    param, choices = nets_of(args)
    gpu = asks_for_gpu(args)
    backend = backends.counting() if gpu else open_backend(args)
    summaries = [summarise(choice, args, backend) for choice in choices]
    needs = footprint(choices, precision=args.precision, param=param, prepare=Images(args.image)) if gpu else None
    if args.json:
        print(json_text({"file": args.file, "nets": summaries} | ({"gpu_memory": needs.as_dict()} if needs else {})))
    else:
        print("\n\n".join("\n".join(_lines(summary)) for summary in summaries))
        print("".join(f"\n{line}" for line in gpu_lines(needs)) if needs else "", end="\n" if needs else "")
    return 0


def gpu_lines(needs: Footprint) -> list[str]:
    """What a run needs of a GPU's memory, and what for."""
    parts = {name: value for name, value in asdict(needs).items() if value and name != "peak"}
    named = ", ".join(f"{PARTS.get(name, name)} {megabytes(value)}" for name, value in parts.items())
    return [f"GPU memory     {megabytes(needs.peak)} predicted at the peak: {named}"]


def nets_of(args: argparse.Namespace) -> tuple[pb.SolverParameter | None, list[NetChoice]]:
    """The net that the file and the flags mean, or a solver and its training net and test nets."""
    if not is_solver(args.file):
        return None, [NetChoice(read_net(args.file), args.file, pb.Phase.Value(args.phase), args.level, tuple(args.stage))]
    spec = read_solver(args.file)
    check_solver(spec)
    spec.param.train_state.stage.extend(args.stage)
    if args.level:
        spec.param.train_state.level = args.level
    train = train_choice(spec)
    return spec.param, [train, *test_choices(spec, train)]


def image_size(text: str) -> tuple[int, int, int]:
    """An argparse type for "3x64x48": (channels, height, width)."""
    match = re.fullmatch(r"([1-9]\d*)[xX]([1-9]\d*)[xX]([1-9]\d*)", text)
    if not match:
        raise argparse.ArgumentTypeError(f"'{text}' is not CHANNELSxHEIGHTxWIDTH, 3x64x64 say")
    return int(match[1]), int(match[2]), int(match[3])


class Images:
    """Gives Data layers the size of their images where there is no database to ask. notes: what was assumed, for whom."""

    def __init__(self, given: tuple[int, int, int] | None) -> None:
        self.given = given
        self.notes: list[str] = []

    def __call__(self, layer: Layer) -> None:
        if not isinstance(layer, DataLayer):
            return
        if self.given:
            layer.source.assume(self.given)
            return
        try:
            _ = layer.source.item_shape
        except DataError as error:
            if image := layer.source.raw_shape:  # it is the mean that cannot be read, which changes no shape
                layer.source.assume(image)
                self.notes.append(f"layer '{layer.name}': {error.message}")
                return
            size, values = layer.param.transform_param.crop_size, len(layer.param.transform_param.mean_value)
            if not size:
                error.hint = "say how large its images are, as in --image 3x64x64; or make the database with `caffelite convert`"
                raise
            assumed = layer.source.assume((values if values > 1 else 3, size, size))
            self.notes.append(f"layer '{layer.name}': {error.message}; images of {'x'.join(map(str, assumed))} are assumed (--image CxHxW gives another size)")


def summarise(choice: NetChoice, args: argparse.Namespace, backend: Backend) -> dict[str, Any]:
    """Everything the summary of one net says, as plain data; memory in bytes."""
    compute = "bfloat16" if args.precision == "bfloat16" else "float32"
    images = Images(args.image)
    graph = build_graph(choice.spec, phase=choice.phase, level=choice.level, stages=choice.stages, compute=compute, prepare=images)
    try:
        fuse(graph, backend)
        training = choice.phase == pb.TRAIN and graph.has_backward
        plan = plan_memory(graph, backend, backward=training)
        parameters = sum(prod(p.spec.shape) for p in graph.owners)
        layers = [_layer(node) for node in graph.nodes]
        return {
            "net": graph.name,
            "file": graph.file,
            "phase": pb.Phase.Name(choice.phase),
            "precision": args.precision,
            "notes": images.notes,
            "layers": layers,
            "inputs": graph.inputs,
            "outputs": graph.outputs,
            "parameters": parameters,
            "parameter_bytes": 4 * parameters,
            "gradient_bytes": 4 * parameters if training else 0,
            "multiply_adds": sum(layer["multiply_adds"] for layer in layers),
            "batch": _batch(graph),
            "activation_bytes": plan.total_bytes,
            "peak_activation_bytes": plan.peak_bytes,
        }
    finally:
        for node in graph.nodes:
            node.layer.close()


def _layer(node: Node) -> dict[str, Any]:
    own = [top for i, top in enumerate(node.tops) if not node.in_place(i) and top.data_of is None and not top.absent]
    return {
        "name": node.name,
        "type": node.layer.type,
        "bottoms": [b.label for b in node.bottoms],
        "tops": [{"name": t.label, "shape": list(t.shape), "dtype": t.dtype} for t in node.tops],
        "in_place": node.written_in_place(),
        "parameters": sum(prod(p.spec.shape) for p in node.params if p.owner is p),
        "parameter_shapes": [list(p.spec.shape) for p in node.params],
        "multiply_adds": node.layer.multiply_adds([b.shape for b in node.bottoms]),
        "top_bytes": sum(prod(t.shape) * ITEM_BYTES[t.dtype] for t in own),
        "backward": node.needs_backward,
    }


def _batch(graph: Graph) -> int:
    return next((n.tops[0].shape[0] for n in graph.nodes if type(n.layer).is_source and n.tops and n.tops[0].shape), 1)


def _lines(summary: dict[str, Any]) -> list[str]:
    rows = [HEAD]
    for layer in summary["layers"]:
        shapes = ", ".join("x".join(map(str, top["shape"])) or "scalar" for top in layer["tops"]) or "-"
        rows.append(
            (
                layer["name"],
                layer["type"],
                shapes,
                f"{layer['parameters']:,}" if layer["parameters"] else "",
                f"{layer['multiply_adds']:,}" if layer["multiply_adds"] else "",
                "in place" if layer["in_place"] else megabytes(layer["top_bytes"]),
            )
        )
    training, batch = summary["gradient_bytes"] > 0, summary["batch"]
    lines = [f"{summary['net'] or 'unnamed net'} ({summary['file']}), phase {summary['phase']}, {summary['precision']}, batch {batch}"]
    lines += [f"note: {note}" for note in summary["notes"]]
    lines += ["", *table(rows, left=3), ""]
    lines.append(f"parameters     {summary['parameters']:,} ({megabytes(summary['parameter_bytes'])}" + (", as much again for gradients)" if training else ")"))
    lines.append(f"multiply-adds  {summary['multiply_adds']:,} in one forward pass, {summary['multiply_adds'] // max(batch, 1):,} for one item")
    what = "activations and their gradients" if training else "activations"
    peak, plain = megabytes(summary["peak_activation_bytes"]), megabytes(summary["activation_bytes"])
    lines.append(f"memory         {peak} at the peak for {what} ({plain} without reuse)")
    lines.append(f"outputs        {', '.join(summary['outputs']) or 'none'}")
    return lines
