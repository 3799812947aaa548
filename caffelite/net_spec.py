"""pycaffe's NetSpec: nets written in Python, as NetParameter messages.

    from caffelite import layers as L, params as P, NetSpec

    n = NetSpec()
    n.data, n.label = L.Data(source="train_lmdb", backend=P.Data.LMDB, batch_size=64, ntop=2)
    n.pool1 = L.Pooling(n.data, pool=P.Pooling.MAX, kernel_size=2, stride=2)
    print(n.to_proto())  # a prototxt

`caffelite.layers` hands out `layer_function` for the names of layer types, `caffelite.params` `enum_values` for those of their messages.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from caffelite.errors import SpecError, did_you_mean, nearest
from caffelite.layer import NOT_THERE, known_types
from caffelite.schema import assign, pb


class NameNotFound(SpecError, AttributeError):
    """A SpecError for an attribute, so that hasattr and getattr's default work."""


class Top:
    """The n-th top of a layer, as a bottom for others."""

    def __init__(self, fn: Function, n: int) -> None:
        self.fn, self.n = fn, n

    def to_proto(self) -> pb.NetParameter:
        """The net that ends in this top."""
        return to_proto(self)


class Function:
    """A layer to be: its type, the Tops it takes and its keywords. `tops` are `ntop` (1 unless given) new Tops.

    A keyword that ends in "param" is a field of LayerParameter; another is one of the type's own message (PoolingParameter for Pooling) where
    that has it, else one of LayerParameter. SpecError for other keywords, values that do not fit, and inputs that are no Tops.
    """

    def __init__(self, type_name: str, inputs: Iterable[Any], params: dict[str, Any]) -> None:
        self.type_name, self.inputs, self.params = type_name, list(inputs), dict(params)
        for index, top in enumerate(self.inputs):
            if not isinstance(top, Top):
                raise SpecError(f"L.{type_name}: input {index} is {type(top).__name__}, expected a layer's top", hint=_SEVERAL if _several(top) else None)
        self.ntop, self.in_place = self.params.pop("ntop", 1), self.params.pop("in_place", False)
        if not isinstance(self.ntop, int) or self.ntop < 0:
            raise SpecError(f"L.{type_name}: ntop is {self.ntop!r}, expected how many tops it has")
        if self.in_place and self.ntop != len(self.inputs):
            raise SpecError(f"L.{type_name}: {len(self.inputs)} input(s) and {self.ntop} top(s), expected one top over each input with in_place")
        self.tops = tuple(Top(self, n) for n in range(self.ntop))
        self.to_layer("", [], [])  # so that a wrong keyword is told where it stands

    def to_layer(self, name: str, bottoms: Iterable[str], tops: Iterable[str]) -> pb.LayerParameter:
        """The layer's message. The keywords `name`, `bottom` and `top` count more than, and follow, these."""
        layer = pb.LayerParameter(name=name, type=self.type_name, bottom=bottoms, top=tops)
        for key, value in self.params.items():
            self._assign(layer, key, value)
        return layer

    def _assign(self, layer: pb.LayerParameter, key: str, value: Any) -> None:
        own = own_field(self.type_name)
        inside = own.message_type.fields_by_name if own is not None and not key.endswith("param") else {}
        try:
            assign(getattr(layer, own.name) if key in inside else layer, key, value)
        except SpecError as error:
            known = key in inside or key in layer.DESCRIPTOR.fields_by_name
            near = None if known else nearest(key, inside)
            message = error.message if known else f"there is no field '{key}'"
            raise SpecError(f"L.{self.type_name}: {message}", hint=f"did you mean '{near}'?" if near else error.hint) from error


class NetSpec:
    """Tops by name: `n.conv1 = L.Convolution(n.data, ...)` names a blob and its layer "conv1"; `n["conv1"]` does for any name.

    `n.tops` holds them in the order they were set. A layer that only others need gets its type and a number as its name.
    """

    tops: OrderedDict[str, Top | Function]

    def __init__(self) -> None:
        super().__setattr__("tops", OrderedDict())

    def __setattr__(self, name: str, value: Any) -> None:
        if not isinstance(value, (Top, Function)):
            raise SpecError(f"n.{name} is given {type(value).__name__}, expected a layer's top", hint=_SEVERAL if _several(value) else None)
        self.tops[name] = value

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "tops":
            raise AttributeError(name)
        if name not in self.tops:
            raise NameNotFound(f"the net has no top '{name}'", hint=did_you_mean(name, self.tops) if self.tops else "it has none yet")
        return self.tops[name]

    def __delattr__(self, name: str) -> None:
        self.__getattr__(name)
        del self.tops[name]

    __setitem__, __getitem__, __delitem__ = __setattr__, __getattr__, __delattr__

    def to_proto(self) -> pb.NetParameter:
        """The net as a message, whose str() is a prototxt: the named layers in their order, each after those that it needs."""
        return _net(self.tops.values(), {top: name for name, top in self.tops.items()})


def to_proto(*tops: Top | Function) -> pb.NetParameter:
    """The net of all layers that `tops` need, named by their types and numbers."""
    for top in tops:
        if not isinstance(top, (Top, Function)):
            raise SpecError(f"to_proto is given {type(top).__name__}, expected layers' tops", hint=_SEVERAL if _several(top) else None)
    return _net(tops, {})


def layer_function(type_name: str) -> Callable[..., Any]:
    """What makes layers of a type: f(*bottoms, **keywords) returns the Top, a tuple of them for an ntop of 2 or more, or for 0 the Function.

    Takes Caffe's types that are not in caffelite as well, for nets that are written for Caffe. NameNotFound for other names.
    """
    if type_name not in NOT_THERE and type_name not in known_types():
        near = nearest(type_name, {*known_types(), *NOT_THERE})
        hint = f"did you mean '{near}'?" if near else f"known types: {', '.join(known_types())}"
        raise NameNotFound(f"unknown layer type '{type_name}'", hint=hint)

    def make(*inputs: Any, **params: Any) -> Any:
        made = Function(type_name, inputs, params)
        return made if made.ntop == 0 else made.tops[0] if made.ntop == 1 else made.tops

    make.__name__ = make.__qualname__ = type_name
    return make


class EnumValues:
    """The numbers of a message's enum values, by name."""

    def __init__(self, message: str, values: dict[str, int]) -> None:
        self._message, self._values = message, values

    def __getattr__(self, name: str) -> int:
        if name.startswith("_"):
            raise AttributeError(name)
        if name not in self._values:
            raise NameNotFound(f"{self._message} has no enum value '{name}'", hint=did_you_mean(name, self._values))
        return self._values[name]


def enum_values(name: str) -> EnumValues:
    """The enum values of the message `name` + "Parameter": enum_values("Pooling").MAX. NameNotFound where there are none."""
    found = {key.removesuffix("Parameter"): message for key, message in _messages() if message.enum_values_by_name}
    if name not in found:
        raise NameNotFound(f"{name}Parameter has no enum values", hint=did_you_mean(name, sorted(found)))
    return EnumValues(found[name].name, {value.name: value.number for value in found[name].enum_values_by_name.values()})


def own_field(type_name: str) -> Any:
    """LayerParameter's field for the message that bears the type's name, or None."""
    fields: Iterable[Any] = pb.LayerParameter.DESCRIPTOR.fields
    return next((f for f in fields if f.message_type is not None and f.message_type.name == f"{type_name}Parameter"), None)


def _messages() -> Iterator[tuple[str, Any]]:
    messages: dict[str, Any] = dict(pb.DESCRIPTOR.message_types_by_name)
    return ((name, message) for name, message in messages.items() if name.endswith("Parameter"))


_SEVERAL = "a layer with ntop=2 gives two tops: n.data, n.label = L.Data(..., ntop=2)"


def _several(value: Any) -> bool:
    return isinstance(value, tuple) and any(isinstance(top, Top) for top in value)


def _net(ends: Iterable[Top | Function], names: dict[Top | Function, str]) -> pb.NetParameter:
    names, counts, layers = dict(names), Counter[str](), OrderedDict[Function, pb.LayerParameter]()

    def name_of(what: Top | Function, type_name: str) -> str:
        if what not in names:
            counts[type_name] += 1
            names[what] = f"{type_name}{counts[type_name]}"
        return names[what]

    for fn in _in_order(ends):
        bottoms = [layers[top.fn].top[top.n] for top in fn.inputs]
        tops = bottoms if fn.in_place else [name_of(top, fn.type_name) for top in fn.tops]
        named = fn if fn in names or not fn.tops else fn.tops[0]
        layers[fn] = fn.to_layer(name_of(named, fn.type_name), bottoms, tops)
    return pb.NetParameter(layer=layers.values())


def _in_order(ends: Iterable[Top | Function]) -> Iterator[Function]:
    """What the ends need, each after its inputs. Without recursion, which Python ends at nets of some hundred layers."""
    seen: set[Function] = set()
    waiting = [(end.fn if isinstance(end, Top) else end, False) for end in reversed(list(ends))]
    while waiting:
        fn, inputs_done = waiting.pop()
        if inputs_done:
            yield fn
        elif fn not in seen:
            seen.add(fn)
            waiting.append((fn, True))
            waiting += [(top.fn, False) for top in reversed(fn.inputs)]
