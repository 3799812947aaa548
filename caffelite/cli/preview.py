"""caffelite preview: a picture of what training makes of a net's images."""

from __future__ import annotations

import argparse
from pathlib import Path

from caffelite.cli.common import Parser, add_state_flags, named_file, whole_number
from caffelite.cli.specs import load_net
from caffelite.errors import SpecError
from caffelite.graph import select_layers
from caffelite.layers.data import DataLayer
from caffelite.schema import NetSpec, pb


def build_parser(prog: str) -> Parser:
    parser = Parser(
        prog,
        "Draws what training sees of a net's images: a row for each of the first records, on the left as it is stored (its\n"
        "centre, where there is a crop_size), then cropped, mirrored, rotated, zoomed and lit as drawn for one epoch after\n"
        "another. Mean and scale are left out.",
        f"{prog} models/nin/train_val.prototxt preview.png",
    )
    parser.add_argument("net", metavar="NET", help="the net, as prototxt; of several Data layers the first in phase TRAIN is shown")
    parser.add_argument("out", type=named_file, metavar="OUT.png", help="the picture to write")
    parser.add_argument("--images", type=whole_number(1), default=6, metavar="N", help="how many records, a row each (default: 6)")
    parser.add_argument("--draws", type=whole_number(1), default=7, metavar="N", help="how many epochs, a column each (default: 7)")
    parser.add_argument("--seed", type=whole_number(0), default=0, metavar="N", help="the run's random_seed (default: 0)")
    add_state_flags(parser, phase=False)
    return parser


def run(args: argparse.Namespace) -> int:
    from caffelite.data.images import encode_image
    from caffelite.data.preview import preview
    from caffelite.files import write_atomically

    if Path(args.out).suffix.lower() != ".png":
        raise SpecError(f"OUT.png is '{args.out}', expected a name that ends in .png")
    layer = data_layer(load_net(args.net), args)
    param = layer.param
    try:
        pixels = preview(param.data_param, param.transform_param, layer.fail, args.seed, layer.stream, args.images, args.draws)
    finally:
        layer.close()
    png = encode_image(pixels, "png")
    write_atomically(args.out, lambda file: file.write(png))
    often = "once" if args.draws == 1 else f"{args.draws} times"
    print(f"{args.out}: images of layer '{layer.name}' from {param.data_param.source}, each as stored and {often} as drawn with seed {args.seed}")
    return 0


def data_layer(spec: NetSpec, args: argparse.Namespace) -> DataLayer:
    """The first Data layer of the training net. SpecError when it has none."""
    state = pb.NetState(phase=pb.TRAIN, level=args.level, stage=[*spec.param.state.stage, *args.stage])
    for param, where in select_layers(spec, state):
        if param.type == "Data":
            return DataLayer(param, pb.TRAIN, where)
    raise SpecError("the net has no Data layer in phase TRAIN", where=spec.where.at(), hint="there are no images to be shown")
