"""Python values put into messages: dicts, lists, numbers and texts, as NetSpec's keywords give them."""

from __future__ import annotations

from typing import Any

import numpy as np
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from caffelite.errors import SpecError
from caffelite.schema.fields import is_repeated
from caffelite.schema.text import unknown_field_hint
from caffelite.schema.values import enum_hint

_EXPECTED = {
    FieldDescriptor.CPPTYPE_FLOAT: "a number",
    FieldDescriptor.CPPTYPE_DOUBLE: "a number",
    FieldDescriptor.CPPTYPE_BOOL: "True or False",
    FieldDescriptor.CPPTYPE_STRING: "a text",
}


def assign(message: Message, name: str, value: Any) -> None:
    """Sets the field `name`: a dict fills a message, a single value stands for a list of one, an enum's value may be its name.

    SpecError for a field that the message does not have, or a value that the field does not take.
    """
    field: Any = message.DESCRIPTOR.fields_by_name.get(name)
    if field is None:
        raise SpecError(f"{message.DESCRIPTOR.name} has no field '{name}'", hint=unknown_field_hint(message.DESCRIPTOR, name))
    listed = isinstance(value, (list, tuple)) or (isinstance(value, np.ndarray) and value.ndim > 0)
    if listed and not is_repeated(field):
        raise SpecError(f"'{name}' holds one value, found a list: {_shown(value)}")
    for item in value if listed else [value]:
        if field.cpp_type == FieldDescriptor.CPPTYPE_MESSAGE:
            _fill(getattr(message, name).add() if is_repeated(field) else getattr(message, name), field, item)
        else:
            _set(message, field, item)


def _fill(child: Message, field: Any, value: Any) -> None:
    if isinstance(value, dict):
        for name, item in value.items():
            assign(child, name, item)
        child.SetInParent()
    elif isinstance(value, type(child)):
        child.CopyFrom(value)
    else:
        raise SpecError(f"'{field.name}' takes a dict of {field.message_type.name}'s fields, found {_shown(value)}")


def _set(message: Any, field: Any, value: Any) -> None:
    plain = value.item() if isinstance(value, (np.generic, np.ndarray)) else value
    if field.cpp_type == FieldDescriptor.CPPTYPE_ENUM:
        plain = _enum_number(field, plain)
    try:
        if is_repeated(field):
            getattr(message, field.name).append(plain)
        else:
            setattr(message, field.name, plain)
    except (TypeError, ValueError) as error:
        raise SpecError(f"'{field.name}' takes {_EXPECTED.get(field.cpp_type, 'a whole number')}, found {_shown(value)}") from error


def _enum_number(field: Any, value: Any) -> int:
    known = field.enum_type.values_by_name
    number = known[value].number if value in known else value
    if number not in field.enum_type.values_by_number:
        raise SpecError(f"'{field.name}' has no value {_shown(value)}", hint=enum_hint(field.enum_type, str(value)))
    return int(number)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
