"""Text format against google.protobuf.text_format: random messages in every spelling it writes, and random damage."""

from __future__ import annotations

import random
import re
import warnings
from typing import Any

import pytest
from google.protobuf import text_format
from google.protobuf.descriptor import FieldDescriptor as Field
from google.protobuf.message import Message

from caffelite.errors import SpecError
from caffelite.schema import parse_text, pb
from caffelite.schema.fields import is_repeated

TYPES: list[type[Message]] = [pb.NetParameter, pb.SolverParameter, pb.LayerParameter, pb.Datum, pb.BlobProto, pb.RunState]
LETTERS = ["a", "B", "0", " ", '"', "'", "\\", "\n", "\t", "é", "日", "\x01", "#", "{", "😀"]
DAMAGE = list("{}<>[]:;,-\"'#\\0123x.efnt _\n")
# Spellings that Python's reader (some version of it) lets pass and Caffe's (C++) refuses: 1_000, +1, 010 for a float, and a
# backslash before any character.
LENIENT = re.compile(r"is not a number|unexpected character '\+'|unknown escape|expected a number for .* found '0\d")

INTS = {
    Field.CPPTYPE_INT32: (-(2**31), 2**31 - 1),
    Field.CPPTYPE_INT64: (-(2**63), 2**63 - 1),
    Field.CPPTYPE_UINT32: (0, 2**32 - 1),
    Field.CPPTYPE_UINT64: (0, 2**64 - 1),
}


def _scalar(rng: random.Random, field: Any) -> Any:
    kind = field.cpp_type
    if kind in INTS:
        least, most = INTS[kind]
        return rng.choice([least, most, max(least, rng.randint(-999, 999))])
    if kind in (Field.CPPTYPE_FLOAT, Field.CPPTYPE_DOUBLE):
        return rng.choice([0.0, -0.0, 1e-40, float("inf"), float("-inf"), float("nan"), rng.gauss(0, 1), 3e38, 1e-8, 0.1])
    if kind == Field.CPPTYPE_BOOL:
        return rng.random() < 0.5
    if kind == Field.CPPTYPE_ENUM:
        return rng.choice(field.enum_type.values).number
    if field.type == Field.TYPE_BYTES:
        return bytes(rng.randrange(256) for _ in range(rng.randint(0, 6)))
    return "".join(rng.choice(LETTERS) for _ in range(rng.randint(0, 8)))


def _fill(rng: random.Random, message: Any, density: float) -> None:
    for field in message.DESCRIPTOR.fields:
        if rng.random() > density and message.DESCRIPTOR.name != "ClipParameter":  # its fields are required
            continue
        target = getattr(message, field.name)
        for _ in range(rng.randint(1, 3) if is_repeated(field) else 1):
            if field.cpp_type == Field.CPPTYPE_MESSAGE:
                child = target.add() if is_repeated(field) else target
                child.SetInParent()
                _fill(rng, child, density * 0.6)
            elif is_repeated(field):
                target.append(_scalar(rng, field))
            else:
                setattr(message, field.name, _scalar(rng, field))


def _random_text(rng: random.Random) -> tuple[Any, str]:
    message = rng.choice(TYPES)()
    _fill(rng, message, rng.choice([0.03, 0.1, 0.3]))
    flags = {name: rng.random() < 0.4 for name in ("as_one_line", "use_short_repeated_primitives", "pointy_brackets", "as_utf8")}
    return message, text_format.MessageToString(message, **flags)


def _wire(message: Message) -> bytes:
    return message.SerializeToString(deterministic=True)  # equality of messages fails on NaN


def test_reads_what_protobuf_writes() -> None:
    rng = random.Random(1)
    for _ in range(300):
        message, text = _random_text(rng)
        read = type(message)()
        parse_text(text, read)
        assert _wire(read) == _wire(message), text


def _damaged(rng: random.Random, text: str) -> str:
    letters = list(text)
    for _ in range(rng.randint(1, 2)):
        at = rng.randrange(len(letters) + 1)
        action = rng.randrange(4)
        if action == 0:
            del letters[at : at + 1]
        elif action == 1:
            letters.insert(at, rng.choice(DAMAGE))
        elif action == 2:
            letters[at : at + 1] = [rng.choice(DAMAGE)]
        else:
            letters[at:at] = letters[at : at + rng.randint(1, 20)]
    return "".join(letters)


def _protobuf_reads(kind: type[Message], text: str) -> bytes | None:
    """What protobuf makes of the text; None when it refuses (by a warning where a string holds an unknown escape)."""
    message = kind()
    text = re.sub(r"-\s+", "-", text)  # Python's reader alone wants the sign at the number
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            text_format.Parse(text, message)
        except (text_format.ParseError, UnicodeError, DeprecationWarning):
            return None
    return _wire(message)


@pytest.mark.parametrize("seed", range(4))
def test_agrees_with_protobuf_on_damaged_text(seed: int) -> None:
    rng = random.Random(100 + seed)
    refused = accepted = 0
    for _ in range(400):
        message, text = _random_text(rng)
        if len(text) > 2000:
            continue
        for _ in range(4):
            damaged = _damaged(rng, text)
            ours = type(message)()
            expected = _protobuf_reads(type(message), damaged)
            error = None
            try:
                parse_text(damaged, ours)
            except SpecError as caught:
                error = caught
            if error is None:
                assert _wire(ours) == expected, damaged
                accepted += 1
            else:
                assert error.where is not None
                assert error.where.line
                assert expected is None or LENIENT.search(error.message), (damaged, error)
                refused += 1
    assert refused > 50
    assert accepted > 50
