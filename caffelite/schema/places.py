"""Where the fields of a message stand in the file that it was read from."""

from __future__ import annotations

from dataclasses import dataclass, field

from caffelite.errors import Where


@dataclass
class SourceMap:
    """Where each field of a message stands in its file; a tree that mirrors the message.

    `children[(field name, index)]` is the map of one value; singular fields use index 0.
    """

    where: Where | None = None
    children: dict[tuple[str, int], SourceMap] = field(default_factory=dict)

    @staticmethod
    def unknown() -> SourceMap:
        """The map of a message that came from no text file."""
        return SourceMap()

    def child(self, name: str, index: int = 0) -> SourceMap:
        """The map of one field's value; this place itself when that field was not in the file."""
        return self.children.get((name, index)) or SourceMap(self.where)

    def at(self, *path: str | int) -> Where | None:
        """The place of a path such as at("convolution_param", "kernel_size", 1), or of its deepest part that was written."""
        node, parts = self, list(path)
        while parts:
            name = str(parts.pop(0))
            index = int(parts.pop(0)) if parts and isinstance(parts[0], int) else 0
            node = node.child(name, index)
        return node.where
