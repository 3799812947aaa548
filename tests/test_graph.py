"""The graph: layer selection, splits, wiring, in-place rules, backward pruning, parameter sharing."""

from __future__ import annotations

import pytest

from caffelite.errors import SpecError
from caffelite.fusion import fuse
from caffelite.graph import Graph, build_graph
from caffelite.layer import NOT_THERE, known_types
from caffelite.schema import net_from_text, pb

INPUT = 'layer { name: "in" type: "Input" top: "x" top: "t" input_param { shape { dim: 2 dim: 3 dim: 4 dim: 4 } shape { dim: 2 } } }\n'


def graph(text: str, phase: int = pb.TRAIN, **state) -> Graph:
    return build_graph(net_from_text(text, "net.prototxt"), phase=phase, **state)


def fails(text: str, **state) -> str:
    with pytest.raises(SpecError) as caught:
        graph(text, **state)
    return str(caught.value)


def conv(name: str, bottom: str, extra: str = "", outputs: int = 3) -> str:
    return layer("Convolution", name, bottom, name, f"{extra} convolution_param {{ num_output: {outputs} kernel_size: 1 }}")


def layer(kind: str, name: str, bottom: str, top: str, extra: str = "") -> str:
    bottoms = " ".join(f'bottom: "{b}"' for b in bottom.split())
    tops = " ".join(f'top: "{t}"' for t in top.split())
    return f'layer {{ name: "{name}" type: "{kind}" {bottoms} {tops} {extra} }}\n'


LOSS = layer("InnerProduct", "ip", "conv", "ip", "inner_product_param { num_output: 5 }") + layer("SoftmaxWithLoss", "loss", "ip t", "loss")


# --- selection -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "state", "kept"),
    [
        ("include { phase: TRAIN }", {}, True),
        ("include { phase: TEST }", {}, False),
        ("exclude { phase: TRAIN }", {}, False),
        ("include { min_level: 2 }", {"level": 1}, False),
        ("include { min_level: 2 max_level: 3 }", {"level": 3}, True),
        ("include { stage: 'a' stage: 'b' }", {"stages": ["a"]}, False),
        ("include { stage: 'a' stage: 'b' }", {"stages": ["b", "a"]}, True),
        ("include { not_stage: 'a' }", {"stages": ["a"]}, False),
        ("include { phase: TEST } include { stage: 'a' }", {"stages": ["a"]}, True),
        ("exclude { stage: 'a' not_stage: 'b' }", {"stages": ["a", "b"]}, True),
        ("include { }", {}, True),
    ],
)
def test_layers_are_kept_by_their_rules(rule: str, state: dict, kept: bool) -> None:
    names = [node.name for node in graph(INPUT + conv("conv", "x", rule), **state).nodes]
    assert ("conv" in names) == kept


def test_include_and_exclude_together_are_refused_with_their_place() -> None:
    text = fails(INPUT + conv("conv", "x", "include { phase: TRAIN } exclude { phase: TEST }"))
    assert text.startswith("net.prototxt:2:")
    assert "layer 'conv'" in text
    assert "both include and exclude" in text


def test_a_layers_own_phase_sets_behaviour_not_selection() -> None:
    built = graph(INPUT + layer("Dropout", "drop", "x", "y", "phase: TEST"))
    assert built.nodes[-1].layer.phase == pb.TEST


# --- wiring --------------------------------------------------------------------------------------------------------


def test_an_undefined_bottom_names_the_nearest_blob() -> None:
    text = fails(INPUT + conv("conv1", "x") + layer("ReLU", "relu", "conv", "y"))
    assert text.startswith("net.prototxt:3:")
    assert "bottom 'conv' is not produced" in text
    assert "did you mean 'conv1'?" in text


def test_a_duplicated_layer_name_names_the_first() -> None:
    text = fails(INPUT + conv("conv", "x") + layer("ReLU", "conv", "conv", "y"))
    assert "a second layer named 'conv'" in text
    assert "the first is at net.prototxt:2:" in text


def test_a_top_with_two_producers_is_refused() -> None:
    assert "top 'x' is already produced by layer 'in'" in fails(INPUT + layer("Power", "p", "t", "x"))


def test_blobs_used_twice_get_a_split_after_their_producer() -> None:
    built = graph(INPUT + conv("conv", "x") + layer("ReLU", "r", "conv", "conv") + layer("Power", "a", "conv", "a") + layer("Power", "b", "conv", "b"))
    assert [n.name for n in built.nodes] == ["in", "conv", "r", "conv_r_0_split", "a", "b"]
    split = built.nodes[3]
    assert [t.name for t in split.tops] == ["conv_r_0_split_0", "conv_r_0_split_1"]
    assert built.nodes[5].bottoms == [split.tops[1]]


def test_an_explicit_loss_weight_counts_as_a_use_and_moves_to_the_split() -> None:
    built = graph(INPUT + layer("Power", "p", "x", "p", "loss_weight: 0.5") + layer("Power", "q", "p", "q"))
    split = built.nodes[2]
    assert split.loss_weights == [0.5, 0.0]
    assert built.nodes[1].loss_weights == [0.0]
    assert built.nodes[3].bottoms == [split.tops[1]]


def test_outputs_are_in_byte_order_of_their_names() -> None:
    built = graph(INPUT + layer("Slice", "s", "x", "b a B"))
    assert built.outputs == ["B", "a", "b", "t"]
    assert built.inputs == ["x", "t"]


def test_a_loss_layer_without_top_gets_an_anonymous_one() -> None:
    built = graph(
        INPUT
        + conv("conv", "x")
        + layer("InnerProduct", "ip", "conv", "ip", "inner_product_param { num_output: 5 }")
        + layer("SoftmaxWithLoss", "loss", "ip t", "")
    )
    assert built.outputs == []
    assert built.nodes[-1].loss_weights == [1.0]


def test_too_many_param_entries_are_refused_at_the_first_extra() -> None:
    text = fails(INPUT + conv("conv", "x", "param { } param { } param { lr_mult: 1 }"))
    assert "3 param entries" in text
    assert "2 parameter blob(s)" in text


def test_a_wrong_number_of_loss_weights_is_refused() -> None:
    assert "2 loss_weight value(s) for 1 top(s)" in fails(INPUT + conv("conv", "x", "loss_weight: 1 loss_weight: 0"))


# --- in place ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "chain",
    [
        layer("ReLU", "r", "conv", "conv"),
        layer("ReLU", "r", "conv", "conv") + layer("Dropout", "d", "conv", "conv"),
        layer("BatchNorm", "b", "conv", "conv") + layer("Scale", "s", "conv", "conv") + layer("ReLU", "r", "conv", "conv"),
        layer("Sigmoid", "s", "conv", "conv"),
    ],
)
def test_safe_chains_in_place_are_accepted(chain: str) -> None:
    graph(INPUT + conv("conv", "x") + chain + LOSS)


@pytest.mark.parametrize(
    ("chain", "message"),
    [
        (layer("LRN", "n", "conv", "conv"), "LRN cannot work in place"),
        (layer("Sigmoid", "s", "conv", "conv") + layer("ReLU", "r", "conv", "conv"), "layer 's' (Sigmoid) needs for its gradient"),
        (layer("ReLU", "r", "conv", "conv") + layer("Scale", "s", "conv", "conv"), "layer 'r' (ReLU) needs for its gradient"),
        (layer("ELU", "e", "conv", "conv") + layer("Dropout", "d", "conv", "conv"), "layer 'e' (ELU) needs for its gradient"),
        (layer("Power", "p", "conv", "conv"), "Power cannot work in place"),
    ],
)
def test_chains_that_compute_wrong_gradients_in_place_are_refused(chain: str, message: str) -> None:
    assert message in fails(INPUT + conv("conv", "x") + chain + LOSS)


def test_power_in_place_is_fine_where_no_backward_runs() -> None:
    graph(INPUT + layer("Power", "p", "x", "x") + conv("conv", "x"), phase=pb.TEST)


def test_in_place_over_a_blob_that_another_layer_reads_is_refused() -> None:
    text = fails(INPUT + conv("conv", "x") + layer("Power", "p", "conv", "p") + layer("ReLU", "r", "conv", "conv"))
    assert "writes 'conv' in place, but layer 'p' reads the same blob" in text


# --- backward ------------------------------------------------------------------------------------------------------


def test_backward_stops_below_the_lowest_learned_parameter() -> None:
    frozen = "param { lr_mult: 0 } param { lr_mult: 0 }"
    built = graph(INPUT + conv("c1", "x", frozen) + conv("conv", "c1") + LOSS)
    assert {n.name: n.needs_backward for n in built.nodes} == {"in": False, "c1": False, "conv": True, "ip": True, "loss": True}
    assert next(n for n in built.nodes if n.name == "conv").propagate_down == [False]


def test_layers_that_reach_no_loss_do_not_run_backward() -> None:
    built = graph(INPUT + conv("conv", "x") + conv("side", "x") + LOSS)
    assert not next(n for n in built.nodes if n.name == "side").needs_backward


def test_propagate_down_false_cuts_the_gradient() -> None:
    built = graph(INPUT + conv("c1", "x") + conv("conv", "c1", "propagate_down: false") + LOSS)
    assert not next(n for n in built.nodes if n.name == "c1").needs_backward


def test_force_backward_reaches_the_inputs_but_not_the_labels() -> None:
    built = graph("force_backward: true\n" + INPUT + conv("conv", "x") + LOSS)
    nodes = {n.name: n for n in built.nodes}
    assert nodes["conv"].propagate_down == [True]
    assert nodes["loss"].propagate_down == [True, False]


# --- parameters ----------------------------------------------------------------------------------------------------


def test_named_parameters_have_one_owner() -> None:
    shared = 'param { name: "w" lr_mult: 2 } param { name: "b" }'
    built = graph(INPUT + conv("c1", "x", shared) + conv("c2", "c1", 'param { name: "w" } param { name: "b" decay_mult: 0 }'))
    assert [p.label for p in built.owners] == ["c1/0", "c1/1"]
    assert built.nodes[2].params[0].owner is built.nodes[1].params[0]
    assert [(p.lr_mult, p.decay_mult) for p in built.owners] == [(2, 1), (1, 0)]


def test_two_multipliers_for_one_shared_parameter_are_refused() -> None:
    text = fails(INPUT + conv("c1", "x", 'param { name: "w" lr_mult: 2 }') + conv("c2", "c1", 'param { name: "w" lr_mult: 3 }'))
    assert "lr_mult 3 here and 2 in layer 'c1'" in text


def test_shared_shapes_must_agree_unless_permissive() -> None:
    first = conv("c1", "x", 'param { name: "w" }', outputs=3)
    assert "the shapes are (6, 3, 1, 1) and (3, 3, 1, 1)" in fails(INPUT + first + conv("c2", "c1", 'param { name: "w" }', outputs=6))
    wide = layer("InnerProduct", "ip", "c1", "ip", 'param { name: "w" share_mode: PERMISSIVE } inner_product_param { num_output: 3 axis: 3 bias_term: false }')
    assert "equal counts are needed" in fails(INPUT + first + wide)


# --- fusion --------------------------------------------------------------------------------------------------------


def test_a_relu_in_place_after_a_convolution_is_fused() -> None:
    built = graph(INPUT + conv("conv", "x") + layer("ReLU", "r", "conv", "conv") + LOSS)
    fuse(built)
    assert built.nodes[1].layer.relu is True
    assert [n.name for n in built.nodes if n.forward_fused] == ["r"]


@pytest.mark.parametrize(
    "after", [layer("ReLU", "r", "conv", "conv", "relu_param { negative_slope: 0.1 }"), layer("ReLU", "r", "conv", "y"), layer("Dropout", "d", "conv", "conv")]
)
def test_nothing_else_is_fused(after: str) -> None:
    built = graph(INPUT + conv("conv", "x") + after)
    fuse(built)
    assert not any(n.forward_fused for n in built.nodes)


def test_caffes_other_layer_types_are_told_from_slips() -> None:
    """The nearest name would be a wrong one for who means Caffe's Deconvolution."""
    text = fails(INPUT + 'layer { name: "d" type: "Deconvolution" bottom: "x" top: "d" }')
    assert "net.prototxt:2:19: layer 'd': Caffe's layer type 'Deconvolution' is not there in caffelite\n  those that are there: Accuracy, BatchNorm, " in text
    assert "did you mean" not in text
    assert "`caffelite convert`" in fails('layer { name: "d" type: "ImageData" top: "d" }')
    assert "unknown layer type 'Deconvolutoin'\n  did you mean 'Convolution'?" in fails(
        INPUT + 'layer { name: "d" type: "Deconvolutoin" bottom: "x" top: "d" }'
    )


def test_all_of_caffes_layer_types_are_there_or_known_not_to_be() -> None:
    old = [value.name for value in pb.V1LayerParameter.LayerType.DESCRIPTOR.values if value.name != "NONE"]
    spec = net_from_text("".join(f'layers {{ name: "{name}" type: {name} }}\n' for name in old))
    types = {layer.type for layer in spec.param.layer}
    assert len(types) == len(old)
    assert types <= NOT_THERE | set(known_types())
    assert not NOT_THERE & set(known_types())


def test_fillers_are_checked_before_anything_is_allocated() -> None:
    text = (
        INPUT
        + 'layer { name: "c" type: "Convolution" bottom: "x" top: "c" convolution_param { num_output: 1 kernel_size: 1 weight_filler { type: "xaver" } } }'
    )
    assert "net.prototxt:2:109: layer 'c': unknown filler type 'xaver': did you mean 'xavier'?" in fails(text)


# --- what Caffe gets wrong silently ------------------------------------------------------------------------------------


def test_layers_without_a_name_are_refused_too() -> None:
    text = fails(INPUT + layer("ReLU", "", "x", "a") + layer("ReLU", "", "a", "b"))
    assert "net.prototxt:3:" in text
    assert "a second layer without a name" in text


def test_in_place_over_the_tops_of_a_split_is_refused() -> None:
    text = fails(INPUT + conv("conv", "x") + layer("Split", "s", "conv", "a b") + layer("ReLU", "r", "a", "a"))
    assert "layer 'r': writes 'a' in place, which lies in the memory of 'conv'" in text


def test_a_loss_weight_that_its_own_gradient_would_overwrite_is_refused() -> None:
    chain = INPUT + conv("conv", "x") + layer("ReLU", "r", "conv", "conv", "loss_weight: 0.1")
    assert "layer 'r': 'conv' has a loss weight and is written in place" in fails(chain)
    frozen = chain.replace("num_output: 3", "num_output: 3 bias_term: false").replace('"conv"  convolution', '"conv" param { lr_mult: 0 } convolution')
    assert graph(frozen).nodes[-1].loss_weights == [pytest.approx(0.1)]


def test_an_implicit_loss_weight_with_another_gradient_is_refused() -> None:
    top = layer("Power", "again", "loss", "again", "loss_weight: 1")
    text = fails(INPUT + conv("conv", "x") + LOSS + top)
    assert "layer 'loss': layer 'again' sends a gradient into 'loss', which is a loss itself\n  write loss_weight: 1 here" in text
    built = graph(INPUT + conv("conv", "x") + LOSS.replace('top: "loss" ', 'top: "loss" loss_weight: 1') + top)
    assert [n.loss_weights for n in built.nodes[-3:]] == [[0.0], [1.0, 0.0], [1.0]]


def test_each_top_keeps_its_own_loss_weight_when_one_gets_a_split() -> None:
    built = graph(INPUT + layer("Slice", "s", "x", "a b c", "loss_weight: 0.5 loss_weight: 0.25 loss_weight: 0.125") + layer("Power", "p", "a", "p"))
    assert [n.loss_weights for n in built.nodes[1:3]] == [[0.0, 0.25, 0.125], [0.5, 0.0]]


def test_labels_that_would_need_a_gradient_are_refused_under_force_backward_too() -> None:
    text = "force_backward: true\n" + INPUT + conv("conv", "x") + layer("InnerProduct", "ip", "conv", "ip", "inner_product_param { num_output: 5 }")
    learned = layer("InnerProduct", "lab", "x", "lab", "inner_product_param { num_output: 1 }")
    assert "SoftmaxWithLoss has no gradient for its bottom 'lab'" in fails(text + learned + layer("SoftmaxWithLoss", "loss", "ip lab", "loss"))


def test_losses_without_tops_have_blobs_of_their_own() -> None:
    losses = "".join(layer("EuclideanLoss", f"l{i}", "x y", "") for i in range(3))
    built = graph(INPUT + layer("Power", "p", "x", "y") + losses)
    assert [n.tops[0].name for n in built.nodes if n.layer.is_loss] == ["(automatic)", "(automatic)_1", "(automatic)_2"]
    assert built.outputs == ["t"]
    assert all(built.blobs[n.tops[0].name].persistent for n in built.nodes if n.layer.is_loss)


def test_what_is_printed_of_a_graph_grows_with_its_layers() -> None:
    """Not with the paths through it, of which each sum makes twice as many."""

    def length(sums: int) -> int:
        text = conv("b0", "x") + "".join(layer("Eltwise", f"b{i + 1}", f"b{i} x", f"b{i + 1}") for i in range(sums))
        return len(repr(graph(INPUT + text)))

    assert length(6) < 2.5 * length(3)
