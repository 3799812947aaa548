"""The only reader and writer of protobuf: text and binary files, with a place for every error, and Caffe's legacy upgrades."""

from caffelite import caffelite_pb2 as pb
from caffelite.schema.assign import assign
from caffelite.schema.binary import message_bytes, parse_blobs, parse_datum, read_blob, read_caffemodel, read_solverstate
from caffelite.schema.blobs import array_to_blob, blob_fits, blob_shape, blob_to_array, legacy_shape
from caffelite.schema.files import NetSpec, SolverSpec, net_from_text, read_net, read_solver, solver_from_text
from caffelite.schema.places import SourceMap
from caffelite.schema.text import parse_text, to_text

__all__ = [
    "NetSpec",
    "SolverSpec",
    "SourceMap",
    "array_to_blob",
    "assign",
    "blob_fits",
    "blob_shape",
    "blob_to_array",
    "legacy_shape",
    "message_bytes",
    "net_from_text",
    "parse_blobs",
    "parse_datum",
    "parse_text",
    "pb",
    "read_blob",
    "read_caffemodel",
    "read_net",
    "read_solver",
    "read_solverstate",
    "solver_from_text",
    "to_text",
]
