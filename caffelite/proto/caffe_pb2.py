"""Caffe's messages under the name that programs know: caffe_pb2.NetParameter(), caffe_pb2.BlobProto(), caffe_pb2.TRAIN."""

from typing import Any

from caffelite.schema import pb


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(f"module 'caffelite.proto.caffe_pb2' has no attribute '{name}'")
    return getattr(pb, name)


def __dir__() -> list[str]:
    return dir(pb)
