"""Reads one scalar value of protobuf text format into what the field holds."""

from __future__ import annotations

import difflib
import re
from typing import Any

from google.protobuf.descriptor import EnumDescriptor, FieldDescriptor

from caffelite.errors import SpecError
from caffelite.schema.tokens import NAME, NUMBER, STRING, SYMBOL, Token, Tokens

_INT_RANGES = {
    FieldDescriptor.CPPTYPE_INT32: (-(2**31), 2**31 - 1),
    FieldDescriptor.CPPTYPE_INT64: (-(2**63), 2**63 - 1),
    FieldDescriptor.CPPTYPE_UINT32: (0, 2**32 - 1),
    FieldDescriptor.CPPTYPE_UINT64: (0, 2**64 - 1),
}
_INTEGER = re.compile(r"(?P<hex>0[xX][0-9a-fA-F]+)|(?P<octal>0[0-7]+)|(?P<decimal>0|[1-9][0-9]*)")
_BOOLS = {"true": True, "True": True, "t": True, "false": False, "False": False, "f": False}
_ESCAPE = re.compile(r"\\(?:(?P<octal>[0-7]{1,3})|[xX](?P<hex>[0-9a-fA-F]{1,2})|u(?P<u4>[0-9a-fA-F]{4})|U(?P<u8>[0-9a-fA-F]{8})|(?P<plain>.))")
_PLAIN = {"a": b"\a", "b": b"\b", "f": b"\f", "n": b"\n", "r": b"\r", "t": b"\t", "v": b"\v", "\\": b"\\", "'": b"'", '"': b'"', "?": b"?"}


def read_scalar(tokens: Tokens, field: FieldDescriptor) -> Any:
    """Takes one value: int, float, bool, str or bytes as `field` holds; an enum value as its number."""
    kind = field.cpp_type
    if kind in _INT_RANGES:
        return _read_int(tokens, field)
    if kind in (FieldDescriptor.CPPTYPE_FLOAT, FieldDescriptor.CPPTYPE_DOUBLE):
        return _read_float(tokens, field)
    if kind == FieldDescriptor.CPPTYPE_BOOL:
        return _read_bool(tokens, field)
    if kind == FieldDescriptor.CPPTYPE_ENUM:
        return _read_enum(tokens, field)
    return _read_string(tokens, field)


def _expected(tokens: Tokens, field: FieldDescriptor, what: str, token: Token | None = None, hint: str | None = None) -> SpecError:
    token = token or tokens.now
    return tokens.fail(f"expected {what} for '{field.name}', found {token}", token, hint)


def _sign(tokens: Tokens) -> tuple[Token, bool]:
    first = tokens.now
    return first, tokens.accept("-")


def _read_int(tokens: Tokens, field: FieldDescriptor) -> int:
    first, negative = _sign(tokens)
    digits = tokens.now
    match = _INTEGER.fullmatch(digits.text) if digits.kind == NUMBER else None
    if match is None:
        raise _expected(tokens, field, "a whole number", hint=_unquoted(field, digits, r"\d+"))
    tokens.take()
    least, most = _INT_RANGES[field.cpp_type]
    # Longer digit strings are out of range anyway, and int() refuses thousands of digits.
    magnitude = int(digits.text, {"hex": 16, "octal": 8, "decimal": 10}[str(match.lastgroup)]) if len(digits.text) < 64 else 2**64
    value = -magnitude if negative else magnitude
    if not least <= value <= most:
        shown = f"-{digits.text}" if negative else digits.text
        raise tokens.fail(f"'{field.name}' takes {least} to {most}, found {shown[:40]}", first)
    return value


def _unquoted(field: FieldDescriptor, found: Token, pattern: str) -> str | None:
    """A hint for a value that would do if it stood without quotes."""
    text = found.text[1:-1] if found.kind == STRING else ""
    return f"write {field.name}: {text} without quotes" if re.fullmatch(pattern, text, re.ASCII) and len(text) < 40 else None


def _read_float(tokens: Tokens, field: FieldDescriptor) -> float:
    _, negative = _sign(tokens)
    token = tokens.now
    value: float | None = None
    if token.kind == NUMBER and not re.match(r"0[xX0-9]", token.text):
        value = float(token.text.rstrip("fF"))
    elif token.kind == NAME and re.fullmatch("(?i)(inf(inity)?|nan)f?", token.text):
        value = float(token.text.lower()[:3])
    if value is None:
        raise _expected(tokens, field, "a number", hint=_unquoted(field, token, r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?"))
    tokens.take()
    return -value if negative else value


def _read_bool(tokens: Tokens, field: FieldDescriptor) -> bool:
    token = tokens.now
    value = _BOOLS.get(token.text) if token.kind == NAME else None
    match = _INTEGER.fullmatch(token.text) if token.kind == NUMBER else None
    if match is not None:
        value = {"0": False, "1": True}.get(token.text.lower().removeprefix("0x").lstrip("0") or "0")
    if value is None:
        raise _expected(tokens, field, "true or false", hint=_unquoted(field, token, "true|false"))
    tokens.take()
    return value


def _read_enum(tokens: Tokens, field: FieldDescriptor) -> int:
    enum: Any = field.enum_type
    first, negative = _sign(tokens)
    token = tokens.now
    if token.kind == NAME and not negative:
        value = enum.values_by_name.get(token.text)
        if value is None:
            raise tokens.fail(f"'{field.name}' has no value {token}", hint=enum_hint(enum, token.text))
        tokens.take()
        return int(value.number)
    match = _INTEGER.fullmatch(token.text) if token.kind == NUMBER else None
    if match is None or len(token.text) > 20:
        raise _expected(tokens, field, "one of " + ", ".join(_names(enum)), hint=_enum_text_hint(field, token))
    tokens.take()
    number = int(token.text, {"hex": 16, "octal": 8, "decimal": 10}[str(match.lastgroup)]) * (-1 if negative else 1)
    if number not in enum.values_by_number:
        raise tokens.fail(f"'{field.name}' has no value with number {number}", first, enum_hint(enum, ""))
    return number


def _enum_text_hint(field: FieldDescriptor, found: Token) -> str | None:
    if found.kind != STRING:
        return None
    enum: Any = field.enum_type
    message: Any = field.containing_type
    if found.text[1:-1] in enum.values_by_name:
        return f"write {field.name}: {found.short[1:-1]} without quotes"
    if message.name == "V1LayerParameter":
        return "'layers' is Caffe's older form; a layer whose type is in quotes is written layer { ... }"
    return None


def _names(enum: EnumDescriptor) -> list[str]:
    return [value.name for value in enum.values]


def enum_hint(enum: EnumDescriptor, name: str) -> str:
    """Names near `name`, or all the names of the enum."""
    names = _names(enum)
    near = difflib.get_close_matches(name[:64].upper(), names, n=1, cutoff=0.6)
    if near:
        return f"did you mean {near[0]}?"
    return "it takes " + ", ".join(names)


def _read_string(tokens: Tokens, field: FieldDescriptor) -> str | bytes:
    first = tokens.now
    if first.kind != STRING:
        word = first.kind in (NAME, NUMBER)
        raise _expected(tokens, field, "a string in quotes", hint=f'write {field.name}: "{first.short}"' if word else None)
    pieces = []
    while tokens.now.kind == STRING:
        pieces.append(_unescape(tokens, tokens.now))
        tokens.take()
    value = b"".join(pieces)
    if field.type == FieldDescriptor.TYPE_BYTES:
        return value
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError as error:
        raise tokens.fail(f"the string of '{field.name}' is not UTF-8", first, "write other bytes only in bytes fields") from error


def _unescape(tokens: Tokens, token: Token) -> bytes:
    body = token.text[1:-1]
    if "\\" not in body:
        return body.encode("utf-8", "surrogatepass")
    out, position = [], 0
    for match in _ESCAPE.finditer(body):
        out.append(body[position : match.start()].encode("utf-8", "surrogatepass"))
        position = match.end()
        out.append(_escape_bytes(tokens, token, match))
    out.append(body[position:].encode("utf-8", "surrogatepass"))
    return b"".join(out)


def _escape_bytes(tokens: Tokens, token: Token, match: re.Match[str]) -> bytes:
    place = Token(SYMBOL, match.group(), token.offset + 1 + match.start())
    if match["plain"] is not None:
        plain = _PLAIN.get(match["plain"])
        if plain is None:
            raise tokens.fail(f"unknown escape {match.group()} in a string", place, r"write a backslash as \\")
        return plain
    number = match["u4"] or match["u8"]
    if number is not None:
        point = int(number, 16)
        if point > 0x10FFFF or 0xD800 <= point <= 0xDFFF:
            raise tokens.fail(f"{match.group()} is not a Unicode character", place)
        return chr(point).encode()
    value = int(match["hex"], 16) if match["hex"] else int(match["octal"], 8)
    if value > 255:
        raise tokens.fail(f"{match.group()} is more than one byte", place)
    return bytes([value])
