"""Moves fields from one message to another together with their places in the file."""

from __future__ import annotations

from typing import Any

from google.protobuf.message import Message

from caffelite.schema.fields import is_repeated
from caffelite.schema.places import SourceMap


class Draft:
    """A message under construction and the map of where its parts come from."""

    def __init__(self, message: Any, places: SourceMap) -> None:
        self.message, self.places = message, places

    def inside(self, name: str, place: SourceMap) -> Draft:
        """The sub-message `name`, made if it is not there yet; `place` stands for it if it is new."""
        getattr(self.message, name).SetInParent()
        return Draft(getattr(self.message, name), self.places.children.setdefault((name, 0), SourceMap(place.where)))

    def entry(self, name: str, index: int, place: SourceMap) -> Draft:
        """Entry `index` of the repeated message `name`, padded with empty entries up to it."""
        entries = getattr(self.message, name)
        while len(entries) <= index:
            entries.add()
        return Draft(entries[index], self.places.children.setdefault((name, index), SourceMap(place.where)))

    def put(self, name: str, value: Any, place: SourceMap) -> None:
        """Sets a singular field, or appends to a repeated one."""
        field = self.message.DESCRIPTOR.fields_by_name[name]
        index = len(getattr(self.message, name)) if is_repeated(field) else 0
        self.places.children[(name, index)] = place
        if is_repeated(field):
            getattr(self.message, name).append(value)
        elif isinstance(value, Message):
            getattr(self.message, name).CopyFrom(value)
        else:
            setattr(self.message, name, value)

    def copy(self, source: Draft, name: str, to: str | None = None) -> None:
        """Copies the field `name` of `source`, all its entries when repeated, if it is set."""
        field = source.message.DESCRIPTOR.fields_by_name[name]
        if is_repeated(field):
            for index, value in enumerate(getattr(source.message, name)):
                self.put(to or name, value, source.places.child(name, index))
        elif source.message.HasField(name):
            self.put(to or name, getattr(source.message, name), source.places.child(name))

    def drop(self, name: str) -> None:
        """Clears a field and forgets its places."""
        self.message.ClearField(name)
        self.places.children = {key: node for key, node in self.places.children.items() if key[0] != name}
