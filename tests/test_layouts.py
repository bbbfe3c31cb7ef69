"""State dicts of other implementations become ours, tensor by tensor, and back."""

import json
from functools import partial
from pathlib import Path

import layouts
import pytest
import torch
from detectron2.config import LazyConfig, instantiate

from dino_d2.data.coco_classes import COCO_80, COCO_91
from dino_d2.layouts.adapt import count_heads, repeat_heads, select_classes
from dino_d2.layouts.backbones import from_torchvision
from dino_d2.layouts.dino import detect_format, from_detrex, from_mmdet, from_official, to_official
from dino_d2.layouts.renaming import CheckpointError
from dino_d2.weights import model_zoo

GOLDEN = Path(__file__).parents[2] / "shared" / "golden"
LAYOUTS = {
    "official": (layouts.official, from_official),
    "detrex": (layouts.detrex, from_detrex),
    "mmdet": (layouts.mmdet, from_mmdet),
}
LABELS = "denoising.label_embed.weight"


@pytest.fixture
def make_state(make_dino, randomise):
    """Of a tiny model in which no two tensors are equal, other than by what layouts have not."""

    def make(**options):
        state = randomise(make_dino(**options)).state_dict()
        state[LABELS][-1] = 0  # our row for empty slots
        return state

    return make


def without_neck_bias(state):
    """mmdetection has none."""
    for key, x in state.items():
        if key.startswith("neck.") and key.endswith(".0.bias"):
            x.zero_()
    return state


def assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    assert [key for key, x in expected.items() if not torch.equal(actual[key], x)] == []


# ---- from the others


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("shared_heads", [True, False])
def test_every_tensor_of_every_layout_arrives_where_it_belongs(make_state, name, shared_heads):
    write, convert = LAYOUTS[name]
    state = make_state(shared_heads=shared_heads)
    state = without_neck_bias(state) if name == "mmdet" else state
    assert_same(convert(write(state)), state)


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_format_is_detected(make_state, name):
    state = make_state()
    assert detect_format(state) == "dino_d2"
    assert detect_format(LAYOUTS[name][0](state)) == name


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("official", "transformer.tgt_embed.weight"),
        ("detrex", "transformer.tgt_embed.weight"),
        ("mmdet", "memory_trans_fc.weight"),
    ],
)
def test_another_model_with_the_names_of_one_of_them_is_refused(make_state, name, key):
    """Deformable DETR has the sign by which the format is told, too."""
    given = LAYOUTS[name][0](make_state())
    del given[key]
    with pytest.raises(CheckpointError, match=f"this is neither DINO nor.*the names of {name}"):
        detect_format(given)


def test_a_model_of_relation_detr_is_not_taken_for_one_of_detrex(make_state):
    """Its names are in part detrex's, in part the official ones."""
    given = {
        key.replace("attentions.0.", "self_attn.") if ".encoder." in key else key: x
        for key, x in layouts.detrex(make_state()).items()
    }
    with pytest.raises(CheckpointError, match="this is neither DINO nor.*the names of detrex"):
        detect_format(given)


@pytest.mark.parametrize("key", ["stem.conv1.weight", "conv1_w", "backbone.0.body.conv1.weight"])
def test_no_format_is_detected_by_chance(key):
    assert detect_format({key: torch.ones(1)}) is None


@pytest.mark.parametrize("name", LAYOUTS)
def test_converting_changes_nothing_in_what_is_given(make_state, name):
    write, convert = LAYOUTS[name]
    given = write(make_state())
    before = {key: x.clone() for key, x in given.items()}
    convert(given)
    assert_same(given, before)


# ours, official, mmdetection; a ResNet has the same names in every stage and block
RESNET = """
stem.conv1.weight                   conv1.weight
stem.conv1.norm.weight              bn1.weight
stem.conv1.norm.running_mean        bn1.running_mean
res2.0.conv1.weight                 layer1.0.conv1.weight
res2.0.conv1.norm.bias              layer1.0.bn1.bias
res2.0.shortcut.weight              layer1.0.downsample.0.weight
res2.0.shortcut.norm.running_var    layer1.0.downsample.1.running_var
res3.3.conv3.weight                 layer2.3.conv3.weight
res4.22.conv2.norm.weight           layer3.22.bn2.weight
res5.2.conv3.norm.running_var       layer4.2.bn3.running_var
"""


@pytest.mark.parametrize(
    ("convert", "prefix"),
    [(from_official, "backbone.0.body."), (from_mmdet, "backbone."), (from_torchvision, "")],
)
def test_the_names_of_a_resnet(convert, prefix):
    names = [line.split() for line in RESNET.strip().splitlines()]
    given = {prefix + theirs: torch.rand(1) for _, theirs in names}
    expected = {f"backbone.{ours}": given[prefix + theirs] for ours, theirs in names}
    assert_same(convert(given), expected)


def test_a_swin_transformer_keeps_its_names():
    key = "layers.0.blocks.1.attn.relative_position_index"
    for convert, prefix in ((from_official, "backbone.0."), (from_detrex, "backbone.")):
        assert list(convert({prefix + key: torch.ones(1)})) == [f"backbone.{key}"]


def test_a_swin_transformer_of_mmdetection_merges_patches_in_another_order():
    """There, pixels of a patch come channel by channel, from left to right; at its authors', from
    top to bottom, each with all its channels."""
    pixels = torch.randn(2, 2, 3)  # (y, x, channel)
    weight, norm = torch.randn(5, 12), torch.randn(12)
    theirs = pixels.permute(2, 0, 1).flatten()
    ours = pixels.transpose(0, 1).flatten()
    prefix = "backbone.stages.1."
    state = from_mmdet(
        {
            f"{prefix}downsample.reduction.weight": weight,
            f"{prefix}downsample.norm.bias": norm,
            f"{prefix}blocks.0.attn.w_msa.qkv.weight": weight,
            f"{prefix}blocks.0.ffn.layers.0.0.bias": norm,
            "backbone.patch_embed.projection.bias": norm,
            "backbone.norm2.weight": norm,
        }
    )
    prefix = "backbone.layers.1."
    merged, bias = (state.pop(f"{prefix}downsample.{x}") for x in ("reduction.weight", "norm.bias"))
    torch.testing.assert_close(merged @ ours, weight @ theirs)
    torch.testing.assert_close(bias @ ours, norm @ theirs)
    assert state == {
        f"{prefix}blocks.0.attn.qkv.weight": weight,
        f"{prefix}blocks.0.mlp.fc1.bias": norm,
        "backbone.patch_embed.proj.bias": norm,
        "backbone.norm2.weight": norm,
    }


def test_the_official_decoder_does_not_count_its_norms_in_their_order():
    # norm2 is the one after self-attention, which comes first
    given = {f"transformer.decoder.layers.4.norm{i}.bias": torch.ones(1) for i in (2, 1, 3)}
    assert list(from_official(given)) == [f"decoder.layers.4.norm{i}.bias" for i in (1, 2, 3)]


@pytest.mark.parametrize(("projections", "downsamples"), [(3, 1), (4, 1), (3, 2), (4, 0)])
def test_official_levels_after_the_projections_are_downsamples(projections, downsamples):
    kernels = [1] * projections + [3] * downsamples
    given = {f"input_proj.{i}.0.weight": torch.rand(2, 2, k, k) for i, k in enumerate(kernels)}
    given |= {f"input_proj.{i}.1.bias": torch.rand(2) for i in range(len(kernels))}
    state = from_official(given)
    for i in range(projections):
        assert state[f"neck.projections.{i}.1.bias"] is given[f"input_proj.{i}.1.bias"]
    for i in range(downsamples):
        theirs = f"input_proj.{projections + i}."
        assert state[f"neck.downsamples.{i}.0.weight"] is given[f"{theirs}0.weight"]
        assert state[f"neck.downsamples.{i}.1.bias"] is given[f"{theirs}1.bias"]
    assert len(state) == len(given)
    assert_same(to_official(state), given)


def test_the_row_for_empty_slots_replaces_the_unused_official_one():
    rows = torch.rand(92, 4)
    state = from_official({"label_enc.weight": rows})
    assert torch.equal(state[LABELS], torch.cat([rows[:91], torch.zeros(1, 4)]))


@pytest.mark.parametrize(
    ("convert", "key"),
    [(from_detrex, "label_enc.weight"), (from_mmdet, "dn_query_generator.label_embedding.weight")],
)
def test_a_row_for_empty_slots_is_added_to_one_row_a_class(convert, key):
    rows = torch.rand(80, 4)
    assert torch.equal(convert({key: rows})[LABELS], torch.cat([rows, torch.zeros(1, 4)]))


def test_an_official_row_of_a_class_is_never_replaced():
    rows = torch.rand(2, 4)
    state = from_official(
        {"label_enc.weight": rows, "transformer.decoder.class_embed.0.bias": rows[0, :2]}
    )
    assert torch.equal(state[LABELS], torch.cat([rows, torch.zeros(1, 4)]))


@pytest.mark.parametrize("name", LAYOUTS)
def test_weights_for_inference_alone_need_no_label_embedding(make_state, name):
    write, convert = LAYOUTS[name]
    state = without_neck_bias(make_state())
    given = {k: x for k, x in write(state).items() if "label_e" not in k}
    del state[LABELS]
    assert_same(convert(given), state)


def test_heads_of_a_detr_without_proposals_stay_the_decoders(make_state):
    """There the last one is not the encoder's: there are as many heads as layers."""
    state = make_state(shared_heads=False)
    given = {k: x for k, x in layouts.detrex(state).items() if "_embed.2." not in k}
    converted = from_detrex(given)
    assert count_heads(converted) == 2
    assert not any("query_selection.class_head" in key for key in converted)


def test_the_neck_of_mmdetection_gets_a_bias_of_zeros_and_keeps_one_of_its_own():
    weight = {
        f"neck.{kind}.0.conv.weight": torch.rand(3, 2, 1, 1) for kind in ("convs", "extra_convs")
    }
    bias = {"neck.convs.0.conv.bias": torch.rand(3)}
    state = from_mmdet(weight | bias)
    assert torch.equal(state["neck.projections.0.0.bias"], bias["neck.convs.0.conv.bias"])
    assert torch.equal(state["neck.downsamples.0.0.bias"], torch.zeros(3))


# ---- back to the official layout


@pytest.mark.parametrize("shared_heads", [True, False])
def test_to_official_is_the_way_back(make_state, shared_heads):
    given = layouts.official(make_state(shared_heads=shared_heads))
    back = to_official(from_official(given))
    given["label_enc.weight"][-1] = 0
    assert_same(back, given)


def test_aliases_of_the_official_layout_are_one_tensor_each(make_state):
    state = to_official(make_state())
    keys = [f"{p}class_embed.{i}.bias" for p in ("", "transformer.decoder.") for i in (0, 1)]
    assert len({state[key].data_ptr() for key in keys}) == 1


# ---- heads


def test_one_head_stands_for_equal_ones_and_is_repeated(make_state):
    state = make_state(shared_heads=True)
    assert count_heads(state) == 1
    repeated = repeat_heads(state, 6)
    assert count_heads(repeated) == 6
    for leaf in ("class_heads.{}.weight", "box_heads.{}.layers.2.bias"):
        first, last = (repeated[f"decoder.{leaf.format(i)}"] for i in (0, 5))
        assert torch.equal(first, last)
    # a layer more is five of one class head's two tensors and of a box head's six
    assert len(repeated) == len(state) + 5 * 8


@pytest.mark.parametrize("key", ["class_embed.1.bias", "bbox_embed.0.layers.1.weight"])
def test_heads_that_differ_in_one_tensor_are_all_kept(make_state, key):
    given = layouts.official(make_state(shared_heads=True))
    assert count_heads(from_official(given)) == 1
    given[f"transformer.decoder.{key}"] = given[f"transformer.decoder.{key}"] + 1
    assert count_heads(from_official(given)) == 2


# ---- classes


def test_coco_by_contiguous_index_and_by_category_id():
    assert len(COCO_80) == 80 and len(COCO_91) == 91
    assert COCO_80[0] == COCO_91[1] == "person" and COCO_80[-1] == COCO_91[90] == "toothbrush"
    # ids that were never given out, and 0
    absent = [0, 12, 26, 29, 30, 45, 66, 68, 69, 71, 83]
    assert [i for i, name in enumerate(COCO_91) if name is None] == absent
    assert [name for name in COCO_91 if name] == list(COCO_80)


CLASS_TENSORS = ["query_selection.class_head.bias", "decoder.class_heads.0.weight", LABELS]


def test_classes_of_the_same_name_keep_their_rows_and_others_start_anew(make_state):
    state, initial = make_state(), make_state()
    selected, new = select_classes(state, ["cat", "DOG", None], ["Dog", "bird", "CAT"], initial)
    assert new == ["bird"]
    for key in CLASS_TENSORS:
        expected = torch.stack([state[key][1], initial[key][1], state[key][0]])
        assert torch.equal(selected[key][:3], expected), key
    assert not selected[LABELS][3].any()  # the row for empty slots
    rest = [key for key in state if key.startswith(("encoder", "decoder.box_heads"))]
    assert all(selected[key] is state[key] for key in rest)


def test_another_number_of_classes_keeps_the_rows_of_known_names(make_state):
    initial = make_state()
    state = make_state()
    for key in CLASS_TENSORS + ["query_selection.class_head.weight", "decoder.class_heads.0.bias"]:
        state[key] = torch.cat([state[key][:1]] * 5 + [state[key]])  # of 8 classes
    names = [*"abcdefgh"]
    selected, new = select_classes(state, names, ["h", "x", "f"], initial)
    assert new == ["x"]
    for key in CLASS_TENSORS:
        assert torch.equal(selected[key][0], state[key][7])
        assert torch.equal(selected[key][1], initial[key][1])
        assert torch.equal(selected[key][2], state[key][5])
        assert selected[key].shape == initial[key].shape


def test_without_a_known_name_the_tensors_of_classes_are_left_out(make_state):
    state, initial = make_state(), make_state()
    selected, new = select_classes(state, ["a", "b", "c"], ["d", "e", "f"], initial)
    assert new == ["d", "e", "f"]
    dropped = {
        *("query_selection.class_head.weight", "query_selection.class_head.bias"),
        *("decoder.class_heads.0.weight", "decoder.class_heads.0.bias", LABELS),
    }
    assert state.keys() - selected.keys() == dropped


def test_equally_many_classes_without_names_are_taken_for_the_same(make_state):
    state, initial = make_state(), make_state()
    selected, new = select_classes(state, None, ["a", "b", "c"], initial)
    assert new == []
    assert_same(selected, state)


def test_another_number_of_classes_without_names_is_not_guessed_at(make_state):
    state, initial = make_state(), make_state()
    for key in [key for key in state if "class_head" in key or key == LABELS]:
        state[key] = state[key][:-1]
    selected, new = select_classes(state, None, ["a", None, "c"], initial)
    assert new == ["a", "c"] and not set(CLASS_TENSORS) & selected.keys()


@pytest.mark.parametrize(
    ("source", "target", "rows"),
    [
        (["a", "A", "b"], ["A", "a", "b"], [1, 0, 2]),  # exactly before alike
        (["a", "x", "b"], ["A", "a", "B"], [None, 0, 2]),  # "A" would be a second "a"
        (["a", "A", "B"], ["b", "x", "a"], [2, None, 0]),
        (["aa", "AA", "b"], ["Aa", "b", "x"], [None, 2, None]),  # either could be meant
        (["x", "y", "b"], ["B", "b ", "y"], [2, None, 1]),
        (["b", "y", "z"], ["B", "bB", "B"], [None, None, None]),  # which of the two is it?
    ],
)
def test_upper_and_lower_case_matter_where_names_would_be_the_same_without(
    make_state, source, target, rows
):
    state, initial = make_state(), make_state()
    selected, new = select_classes(state, source, target, initial)
    assert new == [name for name, row in zip(target, rows, strict=True) if row is None]
    if len(new) == len(target):
        assert not set(CLASS_TENSORS) & selected.keys()
        return
    for key in CLASS_TENSORS:
        for i, row in enumerate(rows):
            expected = initial[key][i] if row is None else state[key][row]
            assert torch.equal(selected[key][i], expected), (key, i)


def test_classes_of_a_model_of_another_width_are_left_to_be_reported(make_state):
    state, initial = make_state(), make_state()
    state[LABELS] = state[LABELS][:, :8]
    selected, _ = select_classes(state, ["a", "b", "c"], ["c", "b", "a"], initial)
    assert selected[LABELS] is state[LABELS]


def test_selecting_classes_changes_nothing_in_what_is_given(make_state):
    state, initial = make_state(), make_state()
    copies = [{k: x.clone() for k, x in y.items()} for y in (state, initial)]
    select_classes(state, ["a", "b", "c"], ["c", "b", "x"], initial)
    assert_same(state, copies[0])
    assert_same(initial, copies[1])


# ---- the published key lists

needs_golden = pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"there is no {GOLDEN}")


def recorded(file):
    return json.loads((GOLDEN / file).read_text())


def official_state(file):
    """Random tensors, equal where the official one has two names for one."""
    state = {}
    for x in recorded(file)["keys"]:
        dtype = getattr(torch, x["dtype"])
        state[x["key"]] = (
            state[x["alias_of"]] if x["alias_of"] else torch.rand(x["shape"]).to(dtype)
        )
    return state


def of_shapes(shapes):
    return {key: torch.rand(shape) for key, shape in shapes.items()}


@pytest.fixture
def model_state(monkeypatch):
    """The state dict of a config's model, on the meta device."""

    def build(config, num_classes):
        cfg = model_zoo.get_config(f"{config}.py")
        overrides = [f"model.num_classes={num_classes}"]
        if "Swin" in config:  # stochastic depth has no weights, but needs another package
            overrides.append("model.backbone.drop_path_rate=0.0")
        # Swin reads its rates from a tensor while it is built
        monkeypatch.setattr(torch, "linspace", partial(torch.linspace, device="cpu"))
        with torch.device("meta"):
            return instantiate(LazyConfig.apply_overrides(cfg, overrides).model).state_dict()

    return build


def assert_fills(state, model_state):
    assert {key: (x.shape, x.dtype) for key, x in state.items()} == {
        key: (x.shape, x.dtype) for key, x in model_state.items()
    }


@needs_golden
@pytest.mark.filterwarnings("ignore:torch.meshgrid")
@pytest.mark.parametrize(
    ("file", "config", "number"),
    [
        ("original_4scale_keys.json", "dino_R_50_4scale_12ep", 626),
        ("original_swin_t_keys.json", "dino_Swin_T_224_4scale_12ep", 548),
        pytest.param(
            *("original_swin_l_keys.json", "dino_Swin_L_384_4scale_12ep", 716),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_every_official_key_has_its_place_and_comes_back(file, config, number, model_state):
    given = official_state(file)
    assert len(given) == number
    converted = from_official(given)
    assert_fills(converted, model_state(config, 91))
    given["label_enc.weight"][-1] = 0
    assert_same(to_official(converted), given)


@needs_golden
@pytest.mark.parametrize(
    ("variant", "number"), [("default_config_keys", 80), ("like_original_keys", 91)]
)
def test_every_key_of_detrex_has_its_place(variant, number, model_state):
    given = of_shapes(recorded("detrex_4scale_keys.json")[variant])
    assert len(given) == 634
    assert_fills(from_detrex(given), model_state("detrex/dino_R_50_4scale_12ep", number))


@needs_golden
def test_every_key_of_mmdetection_has_its_place(model_state):
    given = of_shapes(recorded("mmdet_4scale_keys.json")["default_config_keys"])
    assert len(given) == 627
    assert_fills(from_mmdet(given), model_state("detrex/dino_R_50_4scale_24ep", 80))


@needs_golden
def test_the_layouts_of_these_tests_are_those_recorded(model_state):
    """What the tests write themselves, above and elsewhere, are true names."""
    names = {x["key"] for x in recorded("original_4scale_keys.json")["keys"]}
    others = [recorded(f"{x}_4scale_keys.json")["default_config_keys"] for x in ("detrex", "mmdet")]
    state = model_state("detrex/dino_R_50_4scale_24ep", 80)
    writers = (layouts.official, layouts.detrex, layouts.mmdet)
    for write, expected in zip(writers, (names, *others), strict=True):
        assert {k for k in write(state) if not k.startswith("backbone")} == {
            k for k in expected if not k.startswith("backbone")
        }
