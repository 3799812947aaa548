"""Facts about message fields that the protobuf runtimes from 4.25 on spell differently."""

from __future__ import annotations

from typing import Any

LABEL_REPEATED, LABEL_REQUIRED = 3, 2  # numbers of google.protobuf.FieldDescriptorProto.Label


def is_repeated(field: Any) -> bool:
    """True for a repeated field."""
    known: bool | None = getattr(field, "is_repeated", None)
    return _label(field) == LABEL_REPEATED if known is None else known


def is_required(field: Any) -> bool:
    """True for a proto2 `required` field."""
    known: bool | None = getattr(field, "is_required", None)
    return _label(field) == LABEL_REQUIRED if known is None else known


def _label(field: Any) -> int:
    return int(field.label)
