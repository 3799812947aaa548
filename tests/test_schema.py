"""Text format: what is read, what is refused and where, and how files that are no prototxt are answered."""

from __future__ import annotations

import builtins
import math
from pathlib import Path
from typing import Any

import pytest

from caffelite.errors import SpecError, Where
from caffelite.schema import SourceMap, net_from_text, parse_text, pb, read_net, read_solver, to_text
from caffelite.schema.files import LARGEST_TEXT

FORMS: list[tuple[str, Any]] = [
    ('name: "a"', pb.NetParameter(name="a")),
    ("name: 'it\"s'", pb.NetParameter(name='it"s')),
    ('name: "a" \'b\'\n  "c"', pb.NetParameter(name="abc")),
    (r'name: "\a\b\f\n\r\t\v\\\'\"\?"', pb.NetParameter(name="\a\b\f\n\r\t\v\\'\"?")),
    (r'name: "\101\x42\103\u00e9\U0001f600"', pb.NetParameter(name="ABCé😀")),
    (r'name: "\303\251 é"', pb.NetParameter(name="é é")),
    (r'name: "\\" input: "\\\""', pb.NetParameter(name="\\", input=['\\"'])),
    ('# first\nname: "a" # "b"\n#', pb.NetParameter(name="a")),
    ('name: "a", input: "x"; input: "y"', pb.NetParameter(name="a", input=["x", "y"])),
    ("input_dim: 1 input_dim: 0x1F input_dim: 017 input_dim: -3 input_dim: - 0X2", pb.NetParameter(input_dim=[1, 31, 15, -3, -2])),
    ("input_dim: [1, 2,3] input_dim: [] input_dim: 4", pb.NetParameter(input_dim=[1, 2, 3, 4])),
    ("input_dim: [2147483647, -2147483648]", pb.NetParameter(input_dim=[2147483647, -2147483648])),
    ("state: { phase: TRAIN }", pb.NetParameter(state=pb.NetState(phase=pb.TRAIN))),
    ("state < level: 2 >", pb.NetParameter(state=pb.NetState(level=2))),
    ("state {}", pb.NetParameter(state=pb.NetState())),
    ("state { phase: 1 }", pb.NetParameter(state=pb.NetState(phase=pb.TEST))),
    ("state { phase: 0x1 }", pb.NetParameter(state=pb.NetState(phase=pb.TEST))),
    (
        "layer { pooling_param { pool: 02 } }",
        pb.NetParameter(layer=[pb.LayerParameter(pooling_param=pb.PoolingParameter(pool=pb.PoolingParameter.STOCHASTIC))]),
    ),
    (r'name: "\U0010ffff\ue000\ud7ff"', pb.NetParameter(name="\U0010ffff\ue000\ud7ff")),
    ("input_shape [{ dim: 1 }, < dim: [2, 3] >]", pb.NetParameter(input_shape=[pb.BlobShape(dim=[1]), pb.BlobShape(dim=[2, 3])])),
    ("force_backward: true", pb.NetParameter(force_backward=True)),
    ("force_backward: False", pb.NetParameter(force_backward=False)),
    ("force_backward: t", pb.NetParameter(force_backward=True)),
    ("force_backward: 0x1", pb.NetParameter(force_backward=True)),
    ("force_backward: 0", pb.NetParameter(force_backward=False)),
    ("layer{loss_weight:[1,.5,2.,1e-3,2F,1.5f,-0,-.25E+2]}", pb.NetParameter(layer=[pb.LayerParameter(loss_weight=[1, 0.5, 2, 1e-3, 2, 1.5, -0.0, -25])])),
    ("layer{loss_weight: inf loss_weight: -Infinity}", pb.NetParameter(layer=[pb.LayerParameter(loss_weight=[math.inf, -math.inf])])),
    ("layer{loss_weight: 123456789012345678901234567890}", pb.NetParameter(layer=[pb.LayerParameter(loss_weight=[123456789012345678901234567890])])),
    ("layer{clip_param{min: -1 max: 1}}", pb.NetParameter(layer=[pb.LayerParameter(clip_param=pb.ClipParameter(min=-1, max=1))])),
    ('\ufeffname: "a"\r\ninput: "b"\r\n', pb.NetParameter(name="a", input=["b"])),
    ("", pb.NetParameter()),
]


@pytest.mark.parametrize(("text", "expected"), FORMS, ids=[form[0][:40] for form in FORMS])
def test_reads_every_form(text: str, expected: pb.NetParameter) -> None:
    net = pb.NetParameter()
    parse_text(text, net)
    assert net == expected


def test_nan_and_negative_zero() -> None:
    layer = pb.LayerParameter()
    parse_text("loss_weight: nan loss_weight: -nan loss_weight: -0.0", layer)
    assert math.isnan(layer.loss_weight[0])
    assert math.isnan(layer.loss_weight[1])
    assert math.copysign(1, layer.loss_weight[2]) == -1


def test_bytes_fields_take_any_byte() -> None:
    datum = pb.Datum()
    parse_text(r'data: "\000\377\x7f"', datum)
    assert datum.data == b"\x00\xff\x7f"


ERRORS = [
    ('name: "n"\nlayer {\n  nam: "x"\n}', 3, 3, "LayerParameter has no field 'nam'", "did you mean 'name'?"),
    ("layer {\n  kernel_size: 3\n}", 2, 3, "LayerParameter has no field 'kernel_size'", "field of convolution_param, pooling_param"),
    ("layer { clip_param { low: 1 } }", 1, 22, "ClipParameter has no field 'low'", "its fields are min, max"),
    ("layer {\n\tpooling_param { pool: AVG } }", 2, 24, "'pool' has no value 'AVG'", "did you mean AVE?"),
    ("layer { pooling_param { pool: x } }", 1, 31, "'pool' has no value 'x'", "it takes MAX, AVE, STOCHASTIC"),
    ("layer { pooling_param { pool: 9 } }", 1, 31, "'pool' has no value with number 9", "it takes MAX, AVE"),
    ('layer { pooling_param { pool: "MAX" } }', 1, 31, "expected one of MAX, AVE, STOCHASTIC for 'pool', found \"MAX\"", "without quotes"),
    ("name: conv", 1, 7, "expected a string in quotes for 'name', found 'conv'", 'write name: "conv"'),
    ('name "a"', 1, 6, "expected ':' after 'name', found \"a\"", None),
    ('name: "a\n', 1, 7, 'no closing " on its line', "close the quote"),
    ("name: 'a\\'", 1, 7, "no closing ' on its line", None),
    (r'name: "a\qb"', 1, 9, r"unknown escape \q in a string", r"write a backslash as \\"),
    (r'name: "\777"', 1, 8, r"\777 is more than one byte", None),
    (r'name: "\ud800"', 1, 8, "not a Unicode character", None),
    (r'name: "\400"', 1, 8, r"\400 is more than one byte", None),
    (r'name: "\udfff"', 1, 8, "not a Unicode character", None),
    (r'name: "\U00110000"', 1, 8, "not a Unicode character", None),
    (r'name: "\377"', 1, 7, "the string of 'name' is not UTF-8", None),
    ('name: "a" name: "b"', 1, 11, "'name' is given twice; it was already set on line 1", "keep one"),
    ("state {}\nstate {}", 2, 1, "'state' is given twice; it was already set on line 1", None),
    ("state [{}]", 1, 7, "'state' holds one value, found a list", None),
    ("input_dim: [1 2]", 1, 15, "expected ',' or ']' in the list of 'input_dim', found '2'", None),
    ("input_dim: [1,]", 1, 15, "expected a whole number for 'input_dim', found ']'", None),
    ("input_dim: 1.0", 1, 12, "expected a whole number for 'input_dim', found '1.0'", None),
    ('input_dim: "3"', 1, 12, "expected a whole number for 'input_dim', found \"3\"", "write input_dim: 3 without quotes"),
    ('input_dim: "-3"', 1, 12, "expected a whole number for 'input_dim', found \"-3\"", None),
    ('force_backward: "true"', 1, 17, "expected true or false for 'force_backward', found \"true\"", "write force_backward: true without quotes"),
    ('force_backward: "yes"', 1, 17, "expected true or false for 'force_backward', found \"yes\"", None),
    ('layer { loss_weight: "1e-3" }', 1, 22, "expected a number for 'loss_weight', found \"1e-3\"", "write loss_weight: 1e-3 without quotes"),
    ('layer { loss_weight: "." }', 1, 22, "expected a number for 'loss_weight', found \".\"", None),
    ("// name", 1, 1, "unexpected character '/'", "a comment begins with #"),
    ("input_dim: 2147483648", 1, 12, "takes -2147483648 to 2147483647, found 2147483648", None),
    ("input_dim: 08", 1, 12, "expected a whole number for 'input_dim', found '08'", None),
    ("input_dim: 0x", 1, 12, "'0x' is not a number", None),
    ("input_dim: 3x", 1, 12, "'3x' is not a number", "leave a space"),
    ("layer { pooling_param { pad: -1 } }", 1, 30, "'pad' takes 0 to 4294967295, found -1", None),
    ("layer { pooling_param { pad: 4294967296 } }", 1, 30, "'pad' takes 0 to 4294967295, found 4294967296", None),
    ("layer { pooling_param { pool: -1 } }", 1, 31, "'pool' has no value with number -1", None),
    ("input_shape { dim: 9223372036854775808 }", 1, 20, "'dim' takes -9223372036854775808 to 9223372036854775807", None),
    ("input_shape { dim: -9223372036854775809 }", 1, 20, "'dim' takes -9223372036854775808 to 9223372036854775807", None),
    ("layer { loss_weight: 0x10 }", 1, 22, "expected a number for 'loss_weight', found '0x10'", None),
    ("layer { loss_weight: true }", 1, 22, "expected a number for 'loss_weight', found 'true'", None),
    ("force_backward: yes", 1, 17, "expected true or false for 'force_backward', found 'yes'", None),
    ("force_backward: 2", 1, 17, "expected true or false for 'force_backward', found '2'", None),
    ('layer { name: "a"\n', 1, 7, "the '{' that opens here is never closed", "add a '}'"),
    ("state <\n}", 2, 1, "expected '>' to close the '<' of line 1, found '}'", None),
    ('name: "a"\n}', 2, 1, "found '}', but no message is open", None),
    ('layer {\n  name: "a"\nlayer { }', 3, 1, "no field 'layer'", "is a '}' missing before it? The '{' of line 1 is"),
    ("layer {\n  pooling_param {\n    pad: 1\n  top: 'a'\n}", 4, 3, "no field 'top'", "a field of LayerParameter: is a '}' missing"),
    ('layers { type: "Data" }', 1, 16, "expected one of NONE, ", "a layer whose type is in quotes is written layer { ... }"),
    ('layers { type: "DATA" }', 1, 16, "expected one of NONE, ", "write type: DATA without quotes"),
    ("state: 3", 1, 8, "expected '{' to open 'state', found '3'", "write state { ... }"),
    ("layer {\n  clip_param { max: 3 }\n}", 2, 3, "ClipParameter needs 'min'", "add min: ..."),
    ("name:", 1, 6, "expected a string in quotes for 'name', found the end of the file", None),
    ("[ext]: 1", 1, 1, "expected a field name of NetParameter, found '['", None),
    ("name\xa0: 1", 1, 5, "U+00A0 (no-break space)", None),
    ("name: \x01", 1, 7, "U+0001", "binary file"),
    ("{" * 100_000, 1, 1, "expected a field name of NetParameter, found '{'", None),
    ("state { " * 100_000, 1, 9, "NetState has no field 'state'", None),
]


@pytest.mark.parametrize(("text", "line", "column", "message", "hint"), ERRORS, ids=[error[3][:50] for error in ERRORS])
def test_refuses_with_a_place(text: str, line: int, column: int, message: str, hint: str | None) -> None:
    with pytest.raises(SpecError) as caught:
        net_from_text(text, "net.prototxt")
    assert caught.value.where == Where("net.prototxt", line, column)
    assert message in caught.value.message
    if hint is not None:
        assert hint in (caught.value.hint or "")


def test_hostile_text_ends_in_a_short_error() -> None:
    million = 1_000_000
    for text in ('name: "' + "\\n" * million, "a" * million, "input_dim: " + "9" * million, "layer { phase: " + "x" * million + " }", "#\n" * million + "}"):
        with pytest.raises(SpecError) as caught:
            net_from_text(text)
        assert len(str(caught.value)) < 400


PLACES = """name: "net"
layer {
  name: "c"
  convolution_param {
    kernel_size: 3
    kernel_size: 5
    weight_filler { type: "msra" }
  }
}
layer { bottom: ["a",
  "b"] }
"""


@pytest.mark.parametrize(
    ("path", "line", "column"),
    [
        (("name",), 1, 1),
        (("layer",), 2, 1),
        (("layer", 0, "name"), 3, 3),
        (("layer", 0, "convolution_param", "kernel_size", 1), 6, 5),
        (("layer", 0, "convolution_param", "weight_filler", "type"), 7, 21),
        (("layer", 0, "convolution_param", "stride"), 4, 3),
        (("layer", 0, "pooling_param", "stride"), 2, 1),
        (("layer", 1, "bottom"), 10, 18),
        (("layer", 1, "bottom", 1), 11, 3),
    ],
)
def test_source_map_knows_every_field(path: tuple[str | int, ...], line: int, column: int) -> None:
    assert net_from_text(PLACES, "n.prototxt").where.at(*path) == Where("n.prototxt", line, column)


def test_to_text_is_read_back() -> None:
    net = net_from_text(PLACES).param
    assert net_from_text(to_text(net)).param == net


def test_required_values_of_the_outermost_message() -> None:
    with pytest.raises(SpecError, match="ClipParameter needs 'max'"):
        parse_text("min: 1", pb.ClipParameter())


def test_child_and_unknown_places() -> None:
    places = net_from_text(PLACES, "n.prototxt").where
    assert places.child("layer").where == Where("n.prototxt", 2, 1)
    assert places.child("layer", 1).at("bottom", 1) == Where("n.prototxt", 11, 3)
    assert places.child("state").where == places.where
    assert SourceMap.unknown().at("layer", 3, "name") is None


# --- files ---


def test_missing_file_and_folder(tmp_path: Path) -> None:
    missing = tmp_path / "no.prototxt"
    with pytest.raises(SpecError, match=r"no such file \(expected a net prototxt\)") as caught:
        read_net(missing)
    assert caught.value.where == Where(str(missing))
    with pytest.raises(SpecError, match=r"folder, expected a solver prototxt"):
        read_solver(tmp_path)
    with pytest.raises(SpecError) as caught:
        read_net(tmp_path / "none" / "no.prototxt")
    assert "does not exist" in (caught.value.hint or "")
    with pytest.raises(SpecError, match="cannot be read"):
        read_net("a\0b")


def test_unreadable_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "n.prototxt"

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(builtins, "open", refuse)
    with pytest.raises(SpecError, match=r"cannot be read: Permission denied"):
        read_net(path)


def test_not_utf8_has_a_place(tmp_path: Path) -> None:
    path = tmp_path / "n.prototxt"
    path.write_bytes('name: "é"\n# né'.encode() + b'\xe9\nname: "x"')
    with pytest.raises(SpecError, match="byte 0xe9 is not UTF-8") as caught:
        read_net(path)
    assert caught.value.where == Where(str(path), 2, 5)


def test_binary_and_huge_files(tmp_path: Path) -> None:
    model = tmp_path / "x.caffemodel"
    model.write_bytes(pb.NetParameter(name="n", input=["\0"]).SerializeToString())
    with pytest.raises(SpecError, match="the file is binary, expected a net prototxt") as caught:
        read_net(model)
    assert "--weights" in (caught.value.hint or "")
    huge = tmp_path / "huge.prototxt"
    huge.write_bytes(b"# nothing\n" * (LARGEST_TEXT // 10 + 1))
    with pytest.raises(SpecError, match="larger than 16 MiB"):
        read_net(huge)


def test_bom_and_crlf_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "n.prototxt"
    path.write_bytes(b'\xef\xbb\xbfname: "a"\r\nlayer { nme: 1 }\r\n')
    with pytest.raises(SpecError) as caught:
        read_net(path)
    assert caught.value.where == Where(str(path), 2, 9)
