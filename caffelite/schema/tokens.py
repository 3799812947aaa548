"""Cuts protobuf text format into tokens, each with its place."""

from __future__ import annotations

import re
import unicodedata
from typing import NamedTuple

from caffelite.errors import SpecError, Where

NAME, NUMBER, STRING, SYMBOL, END = "name", "number", "string", "symbol", "end"

_BLANK = re.compile(r"[ \n\t\r\v\f]*")
_COMMENT = re.compile(r"#[^\n]*")
# Strings without escapes; those with some are cut by hand, as a pattern with a loop inside takes gigabytes on hostile input.
_TOKEN = re.compile(
    r"""(?P<name>[A-Za-z_][A-Za-z0-9_]*)
      | (?P<number>0[xX][0-9a-fA-F]+ | (?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?[fF]?)
      | (?P<string>"[^"\\\n]*" | '[^'\\\n]*')
      | (?P<symbol>[{}<>\[\]:;,\-])""",
    re.VERBOSE,
)
_WORD = re.compile(r"[A-Za-z0-9_.+]")
_SHOWN = 40  # longest excerpt of the file that a message repeats


class Token(NamedTuple):
    """One token: its kind, its text as written, and its offset in the file's text."""

    kind: str
    text: str
    offset: int

    def __str__(self) -> str:
        if self.kind == END:
            return "the end of the file"
        return self.short if self.kind == STRING else f"'{self.short}'"

    @property
    def short(self) -> str:
        """The text, cut where it is too long for a message."""
        return self.text if len(self.text) <= _SHOWN else self.text[: _SHOWN - 3] + "..."


class Tokens:
    """The tokens of a text, one ahead at a time. `now` is the token not yet taken."""

    def __init__(self, text: str, file: str) -> None:
        self.text, self.file = text, file
        self._known = (0, 1)  # an offset and its line; places are mostly asked for in order
        self._end = 0
        self.now = self._next()

    def take(self) -> Token:
        """Returns the current token and moves on."""
        token = self.now
        self.now = self._next()
        return token

    def is_symbol(self, symbols: str) -> bool:
        """True when the current token is one of these one-character symbols."""
        return self.now.kind == SYMBOL and self.now.text in symbols

    def accept(self, symbols: str) -> bool:
        """Takes the current token if it is one of these symbols."""
        found = self.is_symbol(symbols)
        if found:
            self.take()
        return found

    def where(self, offset: int) -> Where:
        """Line and column of an offset, both counted from 1."""
        start, line = self._known if self._known[0] <= offset else (0, 1)
        line += self.text.count("\n", start, offset)
        self._known = (offset, line)
        return Where(self.file, line, offset - self.text.rfind("\n", 0, offset))

    def fail(self, message: str, token: Token | None = None, hint: str | None = None) -> SpecError:
        """A SpecError placed at a token (the current one unless given)."""
        return SpecError(message, where=self.where((token or self.now).offset), hint=hint)

    def _next(self) -> Token:
        start = self._skip(self._end)
        if start >= len(self.text):
            self._end = start
            return Token(END, "", start)
        match = _TOKEN.match(self.text, start)
        if match is None:
            return self._escaped_string(start)
        self._end = match.end()
        token = Token(str(match.lastgroup), match.group(), start)
        if token.kind == NUMBER and _WORD.match(self.text, self._end):
            raise self.fail(f"'{self._word(start)}' is not a number", token, "leave a space between a number and a name")
        return token

    def _escaped_string(self, start: int) -> Token:
        """The string token at `start`, whose closing quote is the first one after an even number of backslashes."""
        quote = self.text[start]
        if quote not in "\"'":
            raise self._unreadable(start)
        line_end = self.text.find("\n", start)
        line_end = len(self.text) if line_end < 0 else line_end
        end = self.text.find(quote, start + 1, line_end)
        while end >= 0:
            before = end
            while self.text[before - 1] == "\\":
                before -= 1
            if (end - before) % 2 == 0:
                self._end = end + 1
                return Token(STRING, self.text[start : end + 1], start)
            end = self.text.find(quote, end + 1, line_end)
        raise self._unreadable(start)

    def _skip(self, position: int) -> int:
        while True:
            blank = _BLANK.match(self.text, position)
            position = blank.end() if blank else position
            comment = _COMMENT.match(self.text, position)
            if comment is None:
                return position
            position = comment.end()

    def _word(self, start: int) -> str:
        end = start
        while end < len(self.text) and end - start < _SHOWN and _WORD.match(self.text, end):
            end += 1
        return self.text[start:end]

    def _unreadable(self, start: int) -> SpecError:
        found = self.text[start]
        token = Token(SYMBOL, found, start)
        if found in "\"'":
            return self.fail(f"the string that starts here has no closing {found} on its line", token, "close the quote; strings cannot span lines")
        shown = f"'{found}'" if found.isprintable() else f"U+{ord(found):04X} ({unicodedata.name(found, 'a control character').lower()})"
        what = "is this a binary file?" if ord(found) < 32 else "expected a field name, a value or one of { } < > [ ] : ; ,"
        what = "a comment begins with #" if found == "/" else what
        return self.fail(f"unexpected character {shown}", token, what)
