"""pycaffe's `proto`: `from caffelite.proto import caffe_pb2`."""

from caffelite.proto import caffe_pb2

__all__ = ["caffe_pb2"]
