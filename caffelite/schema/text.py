"""Reads protobuf text format as strictly as Caffe does, and remembers where every field stands."""

from __future__ import annotations

import difflib
from typing import Any

from google.protobuf import text_format
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from caffelite.errors import SpecError
from caffelite.schema.fields import is_repeated, is_required
from caffelite.schema.places import SourceMap
from caffelite.schema.tokens import END, NAME, Token, Tokens
from caffelite.schema.values import read_scalar

_CLOSING = {"{": "}", "<": ">"}


def parse_text(text: str, message: Message, file: str = "<text>") -> SourceMap:
    """Fills `message` from protobuf text format and returns where its fields stand.

    All of the format is read (comments, lists, nested messages in {} or <>, every number and string form). SpecError at
    file:line:column for anything Caffe refuses too: unknown fields and enum values, values of a wrong type or range,
    a singular field given twice, missing required values, unbalanced braces.
    """
    reader = _Reader(Tokens(text.removeprefix("\ufeff"), file))
    root = SourceMap(reader.tokens.where(0))
    reader.read_fields(message, root, closing="", opened=None)
    reader.check_required(message, None)
    return root


def to_text(message: Message) -> str:
    """`message` in text format, as Caffe's parser and parse_text read it."""
    return text_format.MessageToString(message)


class _Reader:
    """Recursive descent; the depth is bounded by the schema, as an unknown field ends the reading."""

    def __init__(self, tokens: Tokens) -> None:
        self.tokens = tokens
        self._open: list[tuple[Any, Token]] = []  # the messages around the one being read: descriptor, opening brace of what is inside

    def read_fields(self, message: Message, places: SourceMap, closing: str, opened: Token | None) -> None:
        """Reads fields up to `closing` ("" stands for the end of the file), and takes it."""
        tokens = self.tokens
        while True:
            if tokens.now.kind == END:
                if opened is not None:
                    hint = f"add a '{closing}', or look for one missing further down"
                    raise tokens.fail(f"the '{opened.text}' that opens here is never closed: found the end of the file", opened, hint)
                return
            if tokens.is_symbol("}>"):
                if opened is not None and tokens.now.text == closing:
                    tokens.take()
                    return
                raise self._stray_closing(closing, opened)
            self._read_field(message, places)
            tokens.accept(";,")

    def _stray_closing(self, closing: str, opened: Token | None) -> SpecError:
        found = self.tokens.now
        if opened is None:
            return self.tokens.fail(f"found {found}, but no message is open", hint="remove it, or look for a '{' missing further up")
        return self.tokens.fail(f"expected '{closing}' to close the '{opened.text}' of line {self.tokens.where(opened.offset).line}, found {found}")

    def _read_field(self, message: Message, places: SourceMap) -> None:
        tokens = self.tokens
        name = tokens.now
        if name.kind != NAME:
            raise tokens.fail(f"expected a field name of {message.DESCRIPTOR.name}, found {name}")
        field: Any = message.DESCRIPTOR.fields_by_name.get(name.text)
        if field is None:
            hint = self._unclosed_hint(name.text) or unknown_field_hint(message.DESCRIPTOR, name.text)
            raise tokens.fail(f"{message.DESCRIPTOR.name} has no field {name}", name, hint)
        tokens.take()
        colon = tokens.accept(":")
        if not is_repeated(field):
            self._check_first(field, name, places)
        if field.cpp_type != FieldDescriptor.CPPTYPE_MESSAGE and not colon:
            raise tokens.fail(f"expected ':' after '{field.name}', found {tokens.now}")
        if tokens.is_symbol("["):
            self._read_list(message, field, name, places)
        else:
            self._read_value(message, field, name, places)

    def _unclosed_hint(self, name: str) -> str | None:
        """What to do about a field of a message further out: its writer thought that the messages inside that one were closed."""
        for descriptor, opened in reversed(self._open):
            if name in descriptor.fields_by_name:
                missing, line = _CLOSING[opened.text], self.tokens.where(opened.offset).line
                return f"'{name}' is a field of {descriptor.name}: is a '{missing}' missing before it? The '{opened.text}' of line {line} is still open"
        return None

    def _check_first(self, field: FieldDescriptor, name: Token, places: SourceMap) -> None:
        earlier = places.children.get((field.name, 0))
        if earlier is not None and earlier.where is not None:
            at = f"line {earlier.where.line}"
            raise self.tokens.fail(f"'{field.name}' is given twice; it was already set on {at}", name, "keep one of the two")

    def _read_list(self, message: Message, field: FieldDescriptor, name: Token, places: SourceMap) -> None:
        tokens = self.tokens
        opened = tokens.take()
        if not is_repeated(field):
            raise tokens.fail(f"'{field.name}' holds one value, found a list", opened, "remove the [ and ]")
        if tokens.accept("]"):
            return
        while True:
            self._read_value(message, field, tokens.now, places)
            if tokens.accept("]"):
                return
            if not tokens.accept(","):
                raise tokens.fail(f"expected ',' or ']' in the list of '{field.name}', found {tokens.now}")

    def _read_value(self, message: Message, field: FieldDescriptor, place: Token, places: SourceMap) -> None:
        """Reads one value into `field`; `place` is the token that stands for it in the source map."""
        target: Any = getattr(message, field.name)
        node = SourceMap(self.tokens.where(place.offset))
        if field.cpp_type == FieldDescriptor.CPPTYPE_MESSAGE:
            index = len(target) if is_repeated(field) else 0
            places.children[(field.name, index)] = node
            child = target.add() if is_repeated(field) else target
            child.SetInParent()
            self._read_message(child, field, place, node)
            return
        value = read_scalar(self.tokens, field)
        if is_repeated(field):
            places.children[(field.name, len(target))] = node
            target.append(value)
        else:
            places.children[(field.name, 0)] = node
            setattr(message, field.name, value)

    def _read_message(self, child: Message, field: FieldDescriptor, place: Token, node: SourceMap) -> None:
        tokens = self.tokens
        opened = tokens.now
        if not tokens.accept("{<"):
            raise tokens.fail(f"expected '{{' to open '{field.name}', found {opened}", hint=f"write {field.name} {{ ... }}")
        self._open.append((field.containing_type, opened))
        self.read_fields(child, node, _CLOSING[opened.text], opened)
        self._open.pop()
        self.check_required(child, place)

    def check_required(self, message: Message, place: Token | None) -> None:
        """SpecError for the first `required` field that is not set; nested messages checked themselves."""
        missing = [f.name for f in message.DESCRIPTOR.fields if is_required(f) and not message.HasField(f.name)]
        if missing:
            raise self.tokens.fail(f"{message.DESCRIPTOR.name} needs {' and '.join(repr(m) for m in missing)}", place, f"add {missing[0]}: ...")


def unknown_field_hint(descriptor: Any, name: str) -> str:
    """What to write instead of a field name that `descriptor` does not have."""
    names = [field.name for field in descriptor.fields]
    near = difflib.get_close_matches(name[:64].lower(), names, n=2, cutoff=0.6)
    if near:
        return f"did you mean {' or '.join(repr(n) for n in near)}?"
    inside = [f.name for f in descriptor.fields if f.message_type is not None and name in f.message_type.fields_by_name]
    if inside:
        some = ", ".join(inside[:4]) + (", ..." if len(inside) > 4 else "")
        return f"'{name}' is a field of {some}: write it inside that message"
    if len(names) > 20:
        return "no known name is near; see the field reference"
    return f"its fields are {', '.join(names)}"
