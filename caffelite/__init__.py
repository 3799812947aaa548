"""caffelite: a Caffe-style engine in Python."""

__version__ = "0.1.0"
