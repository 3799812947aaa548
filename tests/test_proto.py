"""The compiled schema against Caffe's field table and against proto/caffelite.proto."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import numpy as np
import pytest
from google.protobuf import descriptor_pb2

from caffelite.schema import pb

ROOT = Path(__file__).resolve().parent.parent
OWN_FIELDS_FROM = 5000
OWN_MESSAGES = {"RunState", "DataCursor", "DataParameter.Cache"}  # and enums

Row = tuple[str, ...]  # (name, number, type, label, packed, default) of a field, (name, number) of an enum value
Schema = dict[tuple[str, str], Row]

_DEFINITION = descriptor_pb2.FileDescriptorProto()
pb.DESCRIPTOR.CopyToProto(_DEFINITION)
_TYPES = descriptor_pb2.FieldDescriptorProto
_NAMES = {number: name.removeprefix("TYPE_").lower() for name, number in _TYPES.Type.items()}
_LABELS = {number: name.removeprefix("LABEL_").lower() for name, number in _TYPES.Label.items()}


def _number(text: str) -> str:
    try:
        return f"{np.float32(text):.9g}"  # all fields with a fractional default are floats
    except ValueError:
        return text


def _field_row(field: descriptor_pb2.FieldDescriptorProto) -> Row:
    kind = _NAMES[field.type]
    if kind in ("message", "enum"):
        kind = f"{kind}:{field.type_name.rsplit('.', 1)[1]}"
    repeated = field.label == _TYPES.LABEL_REPEATED
    packed = ("packed" if field.options.packed else "unpacked") if repeated else ""
    default = _number(field.default_value) if field.HasField("default_value") else None
    return (field.name, str(field.number), kind, _LABELS[field.label], packed, str(default))


def _compiled() -> Schema:
    rows: Schema = {}

    def add_enum(enum: descriptor_pb2.EnumDescriptorProto, prefix: str) -> None:
        for value in enum.value:
            rows[prefix + enum.name, value.name] = (value.name, str(value.number))

    for enum in _DEFINITION.enum_type:
        add_enum(enum, "")
    for message in _DEFINITION.message_type:
        assert not message.nested_type
        for enum in message.enum_type:
            add_enum(enum, message.name + ".")
        for field in message.field:
            rows[message.name, field.name] = _field_row(field)
    return rows


def _table() -> Schema:
    rows: Schema = {}
    path = ROOT / "tests" / "data" / "caffe-proto-fields.csv"
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            if row["kind"] == "enum_value":
                rows[row["message"], row["name"]] = (row["name"], row["number"])
                continue
            kind = row["type"]
            if ":" in kind:
                kind = kind.split(":")[0] + ":" + kind.rsplit(":", 1)[1].rsplit(".", 1)[-1]
            default = row["default"].strip('"') if row["default"].startswith('"') else _number(row["default"]) if row["default"] else "None"
            rows[row["message"], row["name"]] = (row["name"], row["number"], kind, row["label"], row["packed"], default)
    return rows


def test_every_row_of_caffes_table_is_compiled() -> None:
    compiled, table = _compiled(), _table()
    assert len(table) == 534
    assert {key: compiled.get(key) for key in table} == table


def test_our_own_fields_start_at_5000() -> None:
    own = {key: row for key, row in _compiled().items() if key not in _table() and key[0] not in OWN_MESSAGES}
    assert own
    assert all(int(row[1]) >= OWN_FIELDS_FROM for row in own.values()), own


_LINE = re.compile(
    r"(?P<open>message|enum)\s+(?P<message>\w+)\s*\{"
    r"|(?P<label>optional|repeated|required)\s+(?P<type>\w+)\s+(?P<field>\w+)\s*=\s*(?P<number>\d+)\s*(?:\[(?P<options>[^\]]*)\])?;"
    r"|(?P<value>\w+)\s*=\s*(?P<value_number>-?\d+)\s*;|(?P<close>\})"
)


def _written(text: str) -> Schema:
    """The schema as the .proto file itself states it."""
    text = re.sub(r"//[^\n]*", "", text)
    enums = set(re.findall(r"enum\s+(\w+)", text))
    messages = set(re.findall(r"message\s+(\w+)", text))
    rows: Schema = {}
    stack: list[str] = []
    for match in _LINE.finditer(text.split("package caffelite;")[1]):
        if match["open"]:
            stack.append(match["message"])
        elif match["close"]:
            stack.pop()
        elif match["value"]:
            rows[".".join(stack), match["value"]] = (match["value"], match["value_number"])
        else:
            kind = match["type"]
            kind = f"enum:{kind}" if kind in enums else f"message:{kind}" if kind in messages else kind
            options = dict(part.split("=") for part in re.sub(r"\s", "", match["options"] or "").split(",") if part)
            packed = ("packed" if options.get("packed") == "true" else "unpacked") if match["label"] == "repeated" else ""
            default = _number(options["default"].strip('"')) if "default" in options else "None"
            rows[".".join(stack), match["field"]] = (match["field"], match["number"], kind, match["label"], packed, default)
    assert not stack
    return rows


def test_the_committed_module_is_what_the_proto_file_says() -> None:
    assert _written((ROOT / "proto" / "caffelite.proto").read_text()) == _compiled()


@pytest.mark.parametrize(
    ("good", "bad"),
    [
        ("repeated int64 dim = 1 [packed = true];", "repeated int64 dim = 1;"),
        ("optional float std = 6 [default = 1];", "optional float std = 6 [default = 2];"),
        ("optional uint32 group = 5 [default = 1];", "optional uint32 group = 50 [default = 1];"),
    ],
)
def test_the_comparison_notices_a_changed_line(good: str, bad: str) -> None:
    text = (ROOT / "proto" / "caffelite.proto").read_text()
    assert good in text
    assert _written(text.replace(good, bad, 1)) != _compiled()


def test_package_and_syntax() -> None:
    assert _DEFINITION.package == "caffelite"
    assert _DEFINITION.syntax in ("", "proto2")
