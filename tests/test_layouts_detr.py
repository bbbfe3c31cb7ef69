"""Weights of DINO's predecessors find their places.

`recorded/predecessor_keys.json.gz` has the names and shapes of the state dicts of the authors'
code, and of Hugging Face's transformers 4.57 with its default number of classes, 2.
"""

import gzip
import json
import re
from functools import cache
from pathlib import Path

import pytest
import torch
from detectron2.config import instantiate

from dino_d2.layouts.dino import detect_format, to_official
from dino_d2.layouts.renaming import CheckpointError
from dino_d2.weights import model_zoo
from dino_d2.weights.checkpointer import Checkpointer
from dino_d2.weights.fitting import DETECTORS
from dino_d2.weights.settings import EXPECTED

KEYS = Path(__file__).parent / "recorded" / "predecessor_keys.json.gz"
# name of the key list, its format, our config
MODELS = {
    "detr": ("detr", "detr_R_50_500ep"),
    "dab_detr": ("dab_detr", "dab_detr_R_50_50ep"),
    "dn_detr": ("dab_detr", "dn_detr_R_50_50ep"),
    "deformable_detr": ("deformable_detr", "deformable_detr_R_50_50ep"),
    "deformable_detr_refine": ("deformable_detr", "deformable_detr_R_50_refine_50ep"),
    "deformable_detr_two_stage": ("deformable_detr", "deformable_detr_R_50_two_stage_50ep"),
    "dab_deformable_detr": ("deformable_detr", "dab_deformable_detr_R_50_50ep"),
    "dn_deformable_detr": ("deformable_detr", "dn_deformable_detr_R_50_50ep"),
}
HUGGINGFACE = ("detr", "dab_detr", *(f"deformable_detr{x}" for x in ("", "_refine", "_two_stage")))
for _name in HUGGINGFACE:
    _form, _config = MODELS[_name]
    MODELS[f"huggingface_{_name}"] = f"huggingface_{_form}", _config
NAMES = pytest.mark.parametrize("name", MODELS)
DETREX_ONLY = {
    "dab_deformable_detr_two_stage": ("detrex_family", "dab_deformable_detr_R_50_two_stage_50ep")
}


@cache
def recorded():
    lists = json.loads(gzip.decompress(KEYS.read_bytes()))
    # By detrex's code, DAB-Deformable-DETR with the heads and the projection of other two stages.
    one, two = lists["dab_deformable_detr"], lists["deformable_detr_two_stage"]
    lists["dab_deformable_detr_two_stage"] = {
        key: shape for key, shape in one.items() if not key.startswith(("tgt_", "refpoint_"))
    } | {key: shape for key, shape in two.items() if re.search("_embed[.][0-6]|enc_output", key)}
    return lists


def theirs(name):
    """A state dict of their names and shapes, each tensor of one number of its own.

    Heads that are the same module under several names have the same numbers.
    """
    shared = name.removeprefix("huggingface_") == "deformable_detr"  # by all layers
    numbers = {}

    def tensor(key, shape):
        head = re.sub(r"^(transformer|model)\.decoder\.(?=(class|bbox)_embed\.)", "", key)
        head = head.replace("bbox_predictor.", "bbox_embed.")
        if shared:
            head = re.sub(r"^((class|bbox)_embed)\.\d+\.", r"\1.", head)
        return torch.tensor(float(numbers.setdefault(head, len(numbers) + 1))).expand(shape)

    return {key: tensor(key, shape) for key, shape in recorded()[name].items()}


@cache
def model_of(name):
    """On the meta device, with as many classes."""
    cfg = model_zoo.get_config(f"Predecessors/{(MODELS | DETREX_ONLY)[name][1]}.py").model
    cfg.num_classes = 2 if name.startswith("huggingface_") else 91
    with torch.device("meta"):
        return instantiate(cfg)


@NAMES
def test_the_format_is_detected_and_everything_has_its_place(name):
    state = theirs(name)
    form, model = MODELS[name][0], model_of(name)
    assert detect_format(state) == form
    converted = DETECTORS[form](state)
    own = model.state_dict()
    assert converted.keys() == own.keys()
    assert [key for key, x in converted.items() if x.shape != own[key].shape] == []
    for setting in ("position_temperature", "position_offset"):
        assert EXPECTED[form][setting] == getattr(model.encoder, setting)


def some_of(x):
    """The numbers of a tensor, of whose rows not many are together."""
    return x.flatten(1)[:, 0].tolist() if x.dim() > 1 else x.tolist()


@NAMES
def test_no_two_tensors_go_to_the_same_place_and_none_is_lost(name):
    state = theirs(name)
    converted = DETECTORS[MODELS[name][0]](state)
    numbers = {x.flatten()[0].item() for x in state.values()}
    found = {number for x in converted.values() for number in some_of(x)}
    assert found - {0.0} == numbers  # rows of zeros are ours


def attention_of(state, prefix):
    return torch.cat([state[f"{prefix}.{x}_proj.weight"] for x in "qkv"])


@pytest.mark.parametrize("name", ["huggingface_detr", "huggingface_deformable_detr"])
def test_what_hugging_face_splits_and_orders_otherwise(name):
    state = theirs(name)
    ours, prefix = DETECTORS[MODELS[name][0]](state), "model.decoder.layers.3"
    expected = attention_of(state, f"{prefix}.self_attn")
    assert torch.equal(ours["decoder.layers.3.self_attn.in_proj_weight"], expected)
    for norm, theirs_ in enumerate(("self_attn", "encoder_attn", "final"), 1):
        expected = state[f"{prefix}.{theirs_}_layer_norm.bias"]
        assert torch.equal(ours[f"decoder.layers.3.norm{norm}.bias"], expected)


@pytest.mark.parametrize("name", ["deformable_detr", "dn_deformable_detr"])
def test_norms_of_deformable_decoders_are_those_after_self_attention_first(name):
    """There, norm1 is behind cross-attention."""
    state = theirs(name)
    ours = DETECTORS[MODELS[name][0]](state)
    for norm, theirs_ in enumerate((2, 1, 3), 1):
        expected = state[f"transformer.decoder.layers.3.norm{theirs_}.bias"]
        assert torch.equal(ours[f"decoder.layers.3.norm{norm}.bias"], expected)


def detrex(state):
    """The official names of a deformable model as detrex has them."""
    table = (
        ("transformer.level_embed", "transformer.level_embeds"),
        ("query_embed.", "query_embedding."),
        ("label_enc.", "label_encoder."),
        (".linear1.", ".ffns.0.layers.0.0."),
        (".linear2.", ".ffns.0.layers.1."),
        ("input_proj.3.", "neck.extra_convs.0."),
        ("input_proj.", "neck.convs."),
        ("backbone.0.body.", "backbone."),
    )
    result = {}
    for key, x in state.items():
        new = key
        if ".encoder.layers." in key:
            new = new.replace(".self_attn.", ".attentions.0.")
            new = new.replace(".norm1.", ".norms.0.").replace(".norm2.", ".norms.1.")
        if ".decoder.layers." in key:
            new = new.replace(".self_attn.", ".attentions.0.attn.")
            new = new.replace(".cross_attn.", ".attentions.1.")
            for norm, theirs_ in ((2, 0), (1, 1), (3, 2)):
                new = new.replace(f".norm{norm}.", f".norms.{theirs_}.")
        for old, other in table:
            new = new.replace(old, other)
        if new.startswith("neck."):
            *first, part, kind = new.split(".")
            new = ".".join([*first, ("conv", "norm")[int(part)], kind])
        result[new] = x
    return result


@pytest.mark.parametrize(
    "name", [x for x, (form, _) in MODELS.items() if form == "deformable_detr"]
)
def test_detrex_has_the_same_under_other_names(name):
    official = {k: x for k, x in theirs(name).items() if not k.startswith("backbone.")}
    state = detrex(official)
    assert detect_format(state) == "detrex_family"
    ours = DETECTORS["detrex_family"](state)
    expected = DETECTORS["deformable_detr"](official)
    assert ours.keys() == expected.keys()
    assert all(torch.equal(x, expected[key]) for key, x in ours.items())


def test_two_stages_of_dab_deformable_detr_in_detrex_have_no_learned_queries():
    name = "dab_deformable_detr_two_stage"
    state = detrex({k: x for k, x in theirs(name).items() if not k.startswith("backbone.")})
    assert detect_format(state) == "detrex_family"
    ours, model = DETECTORS["detrex_family"](state), model_of(name).state_dict()
    shapes = {k: x.shape for k, x in model.items() if not k.startswith("backbone.")}
    assert {k: x.shape for k, x in ours.items()} == shapes
    assert len({x.flatten()[0].item() for x in state.values()}) == len(ours)  # none is lost
    expected = state["class_embed.6.bias"], state["bbox_embed.6.layers.2.bias"]
    heads = ours["query_selection.class_head.bias"], ours["query_selection.box_head.layers.2.bias"]
    assert all(torch.equal(*pair) for pair in zip(heads, expected, strict=True))


@pytest.mark.parametrize("name", ["detr", "dab_detr", "deformable_detr", "dab_deformable_detr"])
def test_official_dino_has_no_place_for_its_predecessors(name):
    state = model_of(name).state_dict()
    with pytest.raises(CheckpointError, match="official DINO has no (query|decoder|encoder)"):
        to_official(state)


def test_a_published_detr_is_loaded_for_other_classes_and_the_log_says_how_it_fits(
    tmp_path, caplog
):
    cfg = model_zoo.get_config("Predecessors/detr_R_50_500ep.py").model
    cfg.num_classes = 2
    model = instantiate(cfg)
    state = {key: x.clone() for key, x in theirs("detr").items()}
    state["class_embed.bias"] = torch.arange(92.0)  # of the category ids of COCO, and no object
    torch.save({"model": state}, tmp_path / "detr-r50.pth")
    Checkpointer(model, classes=["dog", "unicorn"]).load(str(tmp_path / "detr-r50.pth"))
    head = model.decoder.class_heads[0]
    assert head.bias[0] == 18  # a dog
    assert head.no_object.bias.tolist() == [91]
    number = state["transformer.decoder.layers.5.norm2.bias"]
    assert torch.equal(model.decoder.layers[5].norm2.bias.detach(), number)


def test_a_detr_without_its_class_head_is_loaded_but_for_it():
    """As people cut it off to train other classes."""
    state = {k: x for k, x in theirs("detr").items() if not k.startswith("class_embed")}
    ours = DETECTORS["detr"](state)
    missing = model_of("detr").state_dict().keys() - ours.keys()
    assert len(missing) == 4 and all("class_heads" in key for key in missing)


def test_weights_of_another_encoding_of_pixels_are_refused(tmp_path):
    """Deformable DETR's positions begin half a pixel earlier than DETR's."""
    cfg = model_zoo.get_config("Predecessors/detr_R_50_500ep.py").model
    cfg.num_classes, cfg.encoder.position_offset = 91, -0.5
    torch.save({"model": theirs("detr")}, tmp_path / "detr-r50.pth")
    with pytest.raises(CheckpointError, match="position_offset 0.0, but the model has -0.5"):
        Checkpointer(instantiate(cfg)).load(str(tmp_path / "detr-r50.pth"))
