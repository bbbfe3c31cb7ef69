"""Mask DINO's parts against slow implementations, and what holds for any image and batch.

That it computes what its authors' code does is for `test_golden_mask.py`.
"""

from math import exp, log

import numpy as np
import pytest
import torch
from detectron2.config import instantiate
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, PolygonMasks
from outputs import run_detector
from torch.nn import functional as F

from dino_d2 import resizing
from dino_d2.boxes import cxcywh_to_xyxy
from dino_d2.export import Exportable, ExportError, compare, export
from dino_d2.layouts.maskdino import from_maskdino, to_maskdino
from dino_d2.layouts.renaming import CheckpointError
from dino_d2.modeling import (
    DistinctQuerySelection,
    MaskCriterion,
    MaskDecoder,
    MaskMatcher,
    MixedQuerySelection,
    PixelEmbedding,
    PureQuerySelection,
    StaticQueries,
    UnifiedQuerySelection,
    mask_loss,
)
from dino_d2.modeling.masks import mask_boxes, mask_logits, sample_maps
from dino_d2.modeling.segmentation import panoptic_map, semantic_map
from dino_d2.predictor import Predictor
from dino_d2.resizing import in_parts, resize_masks
from dino_d2.structures import MaskDetections, MaskPredictions, Pixels
from dino_d2.weights import model_zoo


def whole(maps):
    """Pixel embeddings of images without padding."""
    return Pixels(maps, maps.new_ones(len(maps), 2))


# ---- masks at points


def test_masks_are_sampled_as_grid_sample_does():
    masks = torch.rand(5, 9, 7) > 0.5
    which = torch.tensor([4, 0, 0, 2])
    points = torch.rand(4, 50, 2) * 1.2 - 0.1  # some are outside
    points[0, :4] = torch.tensor([[0.0, 0.0], [1.0, 1.0], [0.0, 1.0], [0.5, 0.5]])
    grid = 2 * points[:, :, None] - 1
    expected = F.grid_sample(masks[which][:, None].float(), grid, align_corners=False)[:, 0, :, 0]
    torch.testing.assert_close(mask_loss.sample_masks(masks, which, points), expected)


def test_a_logit_at_a_point_is_that_of_the_pixel_embedding_there():
    embeddings, maps, points = torch.randn(3, 8), torch.randn(8, 6, 5), torch.rand(1, 40, 2)
    of_maps = mask_loss.sample(mask_logits(embeddings, maps)[None], points)[0]
    of_pixels = embeddings @ mask_loss.sample(maps[None], points)[0]
    torch.testing.assert_close(of_maps, of_pixels)


@pytest.mark.parametrize("padding", ["zeros", "border"])
def test_samples_are_not_taken_in_bfloat16(padding):
    maps, points = torch.randn(1, 8, 256, 256).bfloat16(), torch.rand(1, 50, 40, 2)
    expected = sample_maps(maps.double(), points.double(), padding)
    assert expected.dtype == torch.float64
    torch.testing.assert_close(
        sample_maps(maps, points, padding), expected.float(), atol=1e-3, rtol=0
    )


def test_costs_of_masks_hardly_change_in_bfloat16(make_mask_dino):
    """Points and the maps at them are as in float32; only embeddings are rounded."""
    maps, masks = torch.randn(8, 128, 128), torch.zeros(2, 128, 128, dtype=torch.bool)
    masks[0, :70], masks[1, :, 40:] = True, True
    known, labels = torch.ones(2, dtype=torch.bool), torch.zeros(2, dtype=torch.int64)
    truth = mask_loss.MaskTruth(
        labels, torch.rand(2, 4), masks, known, known, maps.bfloat16().float(), torch.ones(2)
    )
    criterion = make_mask_dino().criterion
    torch.manual_seed(0)
    expected = criterion.at_points(truth)
    torch.manual_seed(0)
    narrow = truth._replace(boxes=truth.boxes.bfloat16(), pixels=truth.pixels.bfloat16())
    found = criterion.at_points(narrow)
    assert torch.equal(found.masks, expected.masks) and found.pixels.dtype == torch.bfloat16
    torch.testing.assert_close(found.pixels, expected.pixels.bfloat16())


def test_costs_are_means_over_points():
    logits, masks = torch.randn(4, 30).double(), torch.rand(3, 30).double()
    entropy, dice = (
        mask_loss.pairwise_cross_entropy(logits, masks),
        mask_loss.pairwise_dice(logits, masks),
    )
    for i, row in enumerate(logits.tolist()):
        p = [1 / (1 + exp(-x)) for x in row]
        for j, target in enumerate(masks.tolist()):
            pairs = list(zip(p, target, strict=True))
            expected = -sum(t * log(x) + (1 - t) * log(1 - x) for x, t in pairs) / 30
            assert entropy[i, j].item() == pytest.approx(expected)
            overlap = sum(x * t for x, t in pairs)
            expected = 1 - (2 * overlap + 1) / (sum(p) + sum(target) + 1)
            assert dice[i, j].item() == pytest.approx(expected)


def test_the_least_certain_points_are_kept(make_mask_dino):
    criterion = make_mask_dino(num_points=40).criterion
    maps = torch.full((2, 8, 8), 9.0)
    maps[:, :, 4:] = 0.0  # uncertain at the right
    points = criterion.uncertain_points(maps, torch.ones(2))
    assert points.shape == (2, 40, 2)
    assert (points[:, :30, 0] > 0.4).all()  # three quarters
    half = torch.tensor([0.5, 1.0])  # the right half is padding: nothing is drawn there
    at = mask_loss.sample(maps[:, None], criterion.uncertain_points(maps, half) * half)
    assert (at > 4).all()


# ---- boxes of masks


@pytest.mark.parametrize("exclusive", [False, True])
def test_boxes_of_masks_are_tight(exclusive):
    logits = torch.full((1, 3, 6, 8), -1.0)
    logits[0, 0, 1:4, 2:7] = 1.0
    logits[0, 1, 5, 7] = 1.0
    maps = logits.flatten(1, 2)[:, :, :].view(1, 3, 6, 8)
    boxes = mask_boxes(torch.eye(3)[None], whole(maps), exclusive)
    corners = cxcywh_to_xyxy(boxes)[0] * torch.tensor([8, 6, 8, 6])
    less = 1 if exclusive else 0
    expected = [
        [2, 1, 7 - less, 4 - less],
        [7, 5, 8 - less, 6 - less],
        [8, 6, 8, 6] if exclusive else [0] * 4,
    ]
    torch.testing.assert_close(corners, torch.tensor(expected).float())


def test_boxes_of_masks_are_relative_to_the_image_without_padding():
    maps = torch.full((1, 1, 4, 8), -1.0)
    maps[0, 0, :3, 1:6] = 1.0  # the image is 4 x 4 pixels wide, the rest padding
    boxes = mask_boxes(torch.ones(1, 1, 1), Pixels(maps, torch.tensor([[0.5, 1.0]])))
    expected = torch.tensor([0.25, 0.0, 1.0, 0.75])
    torch.testing.assert_close(cxcywh_to_xyxy(boxes)[0, 0], expected)


# ---- the detector


def test_there_is_a_prediction_before_the_first_layer(make_mask_dino, make_mask_batch):
    model = make_mask_dino()
    images = model.preprocess_images(make_mask_batch(1))
    output = run_detector(model, images)
    first, *layers = output.result.layers
    assert len(layers) == 2
    assert torch.equal(first.boxes, output.result.queries.reference)
    assert not first.boxes.requires_grad and layers[0].boxes.requires_grad


@pytest.mark.parametrize("counts", [(3, 2), (0, 2), (0, 0), (25, 1)], ids=str)
def test_every_parameter_takes_part_in_a_step(make_mask_dino, make_mask_batch, counts):
    model = make_mask_dino()
    losses = model(make_mask_batch(*counts, sizes=[(64, 64), (48, 80)]))
    assert {name.split("_")[1] for name in losses} == {"class", "bbox", "giou", "mask", "dice"}
    sum(losses.values()).backward()
    without = [name for name, x in model.named_parameters() if x.grad is None]
    assert not without
    assert all(torch.isfinite(x.grad).all() for x in model.parameters())


def test_losses_do_not_depend_on_how_many_maps_are_made_at_once(
    make_mask_dino, make_mask_batch, monkeypatch
):
    model, batch, losses = make_mask_dino(), make_mask_batch(3, 2), []
    table = torch.rand(1, 1000, 2)
    monkeypatch.setattr(
        mask_loss, "draw_points", lambda n, count, like: table[:, :count].expand(n, -1, -1)
    )
    for elements in (1, 2**23):
        monkeypatch.setattr(mask_loss, "MAP_ELEMENTS", elements)
        torch.manual_seed(1)
        losses.append(model(batch))
    torch.testing.assert_close(*losses)


def test_a_mask_that_nobody_knows_neither_costs_nor_is_learned(make_mask_dino, make_mask_batch):
    model, batch = make_mask_dino(), make_mask_batch(2)
    losses = []
    for known in ([True, True], [True, False], [False, False]):
        batch[0]["instances"].has_mask = torch.tensor(known)
        torch.manual_seed(1)
        losses.append({name: x.item() for name, x in model(batch).items()})
    everything, some, nothing = losses
    assert 0 < some["loss_mask_dn"] < everything["loss_mask_dn"]
    assert all(x == 0 for name, x in nothing.items() if "mask" in name or "dice" in name)
    boxes = MaskMatcher(mask_cost=0.0, dice_cost=0.0)
    (target,) = model.prepare_targets(batch)
    predictions = MaskPredictions(
        torch.randn(1, 1, 9, 3), torch.rand(1, 1, 9, 4), torch.randn(1, 1, 9, 64)
    )
    truth = mask_loss.PointTruth(
        target.labels, target.boxes, torch.rand(2, 30), target.known, torch.randn(64, 30)
    )
    costs = [matcher.costs(predictions, [truth]) for matcher in (MaskMatcher(), boxes)]
    torch.testing.assert_close(*costs)


def test_boxes_without_masks_are_refused(make_mask_dino, make_batch):
    with pytest.raises(ValueError, match="boxes but no masks"):
        make_mask_dino()(make_batch(2))


def test_polygons_are_rasterised(make_mask_dino, make_mask_batch):
    batch = make_mask_batch(1)
    instances = batch[0]["instances"]
    instances.gt_masks = PolygonMasks([[[8.0, 8.0, 40.0, 8.0, 40.0, 24.0, 8.0, 24.0]]])
    (target,) = make_mask_dino().prepare_targets(batch)
    assert target.masks.sum() == 32 * 16 and target.masks[0, 8:24, 8:40].all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_detections_do_not_depend_on_the_batch(make_mask_dino, make_mask_batch, randomise, dtype):
    model = make_mask_dino().eval()
    randomise(model.decoder.mask_head)
    batch = make_mask_batch(1, 1, sizes=[(50, 70), (37, 90)])
    batch[1] |= {"height": 74, "width": 180}
    with torch.no_grad(), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        together, alone = model(batch), [model([x])[0] for x in batch]
    for both, one, size in zip(together, alone, [(50, 70), (74, 180)], strict=True):
        both, one = both["instances"], one["instances"]
        assert both.pred_masks.shape == (20, *size) and both.pred_masks.dtype == torch.bool
        assert torch.equal(both.pred_masks, one.pred_masks)
        assert torch.equal(both.scores, one.scores)
        assert (both.scores.diff() <= 0).all() and (both.scores >= 0).all()


def test_what_nms_suppresses_has_masks_too(make_mask_dino, make_mask_batch):
    model = make_mask_dino().eval()
    model.nms = 0.1
    with torch.no_grad():
        (found,) = model(make_mask_batch(1))
    assert len(found["instances"]) + len(found["suppressed"]) == 20
    assert found["suppressed"].pred_masks.shape[1:] == (64, 64)


def test_masks_are_resized_as_maps_of_logits(monkeypatch):
    """To the padded image, cut to the image, to the size wanted."""
    logits, (height, width) = torch.randn(5, 8, 10).double(), (29, 37)
    padded = F.interpolate(logits[None], (32, 40), mode="bilinear", align_corners=False)
    cut = padded[..., :height, :width]
    maps = F.interpolate(cut, (58, 50), mode="bilinear", align_corners=False)[0]
    logits[3] = -1.0
    maps[3] = -1.0
    masks, certainty = resize_masks(logits, 4, (height, width), (58, 50))
    assert torch.equal(masks, maps > 0)
    expected = [x[x > 0].sigmoid().mean() if (x > 0).any() else torch.tensor(0.0) for x in maps]
    torch.testing.assert_close(certainty, torch.stack(expected).double())


def panoptic_slowly(scores, labels, maps, stuff, overlap):
    """As the published code does it: query after query, all maps at once."""
    masks = maps.sigmoid()
    owner = (scores[:, None, None] * masks).argmax(0)
    ids, segments, of_stuff = torch.zeros(maps.shape[1:], dtype=torch.int32), [], {}
    for k, label in enumerate(labels.tolist()):
        won, mask = owner == k, masks[k] >= 0.5
        if not (won & mask).any() or won.sum() / mask.sum() < overlap:
            continue
        if label not in of_stuff:
            segments.append((len(segments) + 1, label, label not in stuff))
        ids[won & mask] = of_stuff.get(label, len(segments))
        if label in stuff:
            of_stuff.setdefault(label, len(segments))
    return ids, segments


@pytest.mark.parametrize("count", [0, 1, 16, 40])
def test_segments_are_those_of_all_maps_at_once(count):
    scores, labels = torch.rand(count).double(), torch.randint(4, (count,))
    maps = 4 * torch.randn(count, 7, 9).double()
    if count > 1:
        maps[1] = maps[0]  # of equals, the first wins
        scores[1] = scores[0]
    expected, segments = torch.zeros(7, 9), []
    if count:
        expected, segments = panoptic_slowly(scores, labels, maps, {1, 3}, 0.02)
    parts = (x.clone() for x in in_parts(maps))
    ids, ours = panoptic_map(scores, labels, parts, (7, 9), {1, 3}, 0.02)
    assert [(x["id"], x["category_id"], x["isthing"]) for x in ours] == segments
    assert ids.dtype == torch.int32 and torch.equal(ids, expected.int())
    assert count < 40 or {x["category_id"] for x in ours} == {0, 1, 2, 3}


def test_scores_of_pixels_are_sums_over_queries():
    scores, maps = torch.rand(40, 5).double(), torch.randn(40, 7, 9).double()
    expected = torch.einsum("qk,qhw->khw", scores, maps.sigmoid())
    torch.testing.assert_close(semantic_map(scores, in_parts(maps), (7, 9)), expected)


@pytest.mark.parametrize("instance_on", [True, False])
def test_maps_have_the_size_that_is_asked_for_and_few_are_made_at_once(
    make_mask_dino, make_mask_batch, randomise, monkeypatch, instance_on
):
    model, made = make_mask_dino().eval(), []
    randomise(model.decoder.mask_head)
    randomise(model.decoder.class_heads)
    model.instance_on, model.panoptic_on, model.semantic_on = instance_on, True, True
    model.stuff_classes, model.overlap_threshold = frozenset([0]), 0.0
    (x, y) = make_mask_batch(1, 1, sizes=[(50, 70), (37, 90)])
    y |= {"height": 74, "width": 180}
    resize = resizing.interpolate
    monkeypatch.setattr(
        resizing, "interpolate", lambda maps, size: made.append(len(maps)) or resize(maps, size)
    )
    with torch.no_grad():
        together, alone = model([x, y]), [model([x])[0], model([y])[0]]
    assert max(made) == resizing.MASKS_AT_ONCE < 20
    for one, other, size in zip(together, alone, [(50, 70), (74, 180)], strict=True):
        (ids, segments), (others, _) = one["panoptic_seg"], other["panoptic_seg"]
        assert torch.equal(ids, others) and ids.shape == size and segments
        assert {0, *(part["id"] for part in segments)} >= set(ids.unique().tolist())
        assert one["sem_seg"].shape == (3, *size)
        torch.testing.assert_close(one["sem_seg"], other["sem_seg"])
        assert ("instances" in one) == instance_on
        assert not instance_on or (one["instances"].pred_classes > 0).all()  # stuff is not counted


@pytest.mark.parametrize(
    "selection", [MixedQuerySelection, DistinctQuerySelection, StaticQueries, PureQuerySelection]
)
def test_queries_may_come_from_elsewhere(make_mask_dino, make_mask_batch, selection):
    model, batch = make_mask_dino(), make_mask_batch(2, 1)
    model.query_selection = selection(num_queries=20, embed_dim=64, num_classes=3)
    losses = model(batch)
    of_proposals = {name for name in losses if name.endswith("_enc")}
    kinds = {f"loss_{kind}_enc" for kind in ("class", "bbox", "giou")}
    assert of_proposals == (set() if selection is StaticQueries else kinds)
    sum(losses.values()).backward()
    assert not [name for name, x in model.named_parameters() if x.grad is None]
    with torch.no_grad():
        assert model.eval()(batch)[0]["instances"].pred_masks.shape == (20, 64, 64)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("CRITERION", "SetCriterion", "criterion of Mask DINO has to be a MaskCriterion"),
        ("MATCHER.NAME", "HungarianMatcher", "matcher of Mask DINO has to be a MaskMatcher"),
        ("BRANCHES", ["OneToManyHead"], "OneToManyHead .* does not support masks"),
        ("PASSES", ["SeparatePass"], "SeparatePass .* does not support masks"),
    ],
)
def test_parts_that_do_not_know_masks_are_refused(key, value, said):
    cfg = model_zoo.get_config("quickstart_masks")
    options = ["MODEL.DEVICE", "meta", "MODEL.DINO.NUM_CLASSES", 3, "MODEL.DINO.RELATION", ""]
    cfg.merge_from_list([*options, f"MODEL.DINO.{key}", value])
    with pytest.raises(ValueError, match=said):
        build_model(cfg)


@pytest.mark.parametrize(
    ("key", "value"),
    [("QUERY_SELECTION", "UnifiedQuerySelection"), ("CRITERION", "MaskCriterion")],
)
def test_parts_that_need_masks_are_refused_without(key, value):
    cfg = model_zoo.get_config("quickstart")
    cfg.merge_from_list(["MODEL.DEVICE", "meta", "MODEL.DINO.NUM_CLASSES", 3])
    cfg.merge_from_list([f"MODEL.DINO.{key}", value])
    with pytest.raises(ValueError, match=f"{value} is for MaskDINO, and the model is a DINO"):
        build_model(cfg)


def test_wrong_options_are_sentences():
    common = {"embed_dim": 32, "num_classes": 3}
    with pytest.raises(ValueError, match="initialize_box_type is 'boxes'"):
        UnifiedQuerySelection(num_queries=5, initialize_box_type="boxes", **common)
    with pytest.raises(ValueError, match="oversample is 0.5"):
        MaskCriterion(matcher=MaskMatcher(), oversample=0.5)
    with pytest.raises(CheckpointError, match="keep the layout of dino_d2"):
        to_maskdino({"query_selection.class_head.bias": torch.zeros(3)}, coarsest_first=True)
    with pytest.raises(ValueError, match="one class head"):
        MaskDecoder(shared_heads=False, num_heads=4, **common)
    with pytest.raises(ValueError, match="need the feature 'res2'"):
        PixelEmbedding(input_shape={"res3": None})


def semantic(**options):
    """A small Mask DINO with learned queries and class scores by a softmax."""
    cfg = model_zoo.get_config("quickstart_masks")
    options = {"QUERY_SELECTION": "StaticQueries", "LOSS.CLASS_LOSS": "SoftmaxLoss"} | options
    options |= {"NUM_CLASSES": 3, "RELATION": "", "NUM_QUERIES": 9, "TEST.SEMANTIC_ON": True}
    changes = [x for k, v in options.items() for x in (f"MODEL.DINO.{k}", v)]
    cfg.merge_from_list(["MODEL.DEVICE", "cpu", *changes])
    return build_model(cfg).eval()


def test_scores_of_pixels_by_a_softmax_leave_out_no_object(make_mask_batch):
    model, batch = semantic(), make_mask_batch(1)
    images = model.preprocess_images(batch)
    with torch.no_grad():
        last = run_detector(model, images).result.layers[-1]
        maps = model(batch)[0]["sem_seg"]
        pixels = run_detector(model, images).pixels.maps[0]
    logits = mask_logits(last.masks[0], pixels)
    size = tuple(images.tensor.shape[-2:])
    whole = F.interpolate(logits[None], size, mode="bilinear", align_corners=False)[0].sigmoid()
    scores = last.logits[0].softmax(-1)[:, :3]
    expected = torch.einsum("qk,qhw->khw", scores, whole[:, :64, :64])
    torch.testing.assert_close(maps, expected, atol=1e-5, rtol=1e-4)


def test_learned_queries_and_no_object_have_their_place_in_the_published_layout(randomise):
    model = randomise(semantic())
    state = {k: x for k, x in model.state_dict().items() if not k.endswith("batches_tracked")}
    theirs, prefix = to_maskdino(state, coarsest_first=True), "sem_seg_head.predictor."
    shapes = {
        x: tuple(theirs[f"{prefix}{x}"].shape) for x in ("class_embed.bias", "query_embed.weight")
    }
    assert shapes == {"class_embed.bias": (4,), "query_embed.weight": (9, 4)}
    assert f"{prefix}query_feat.weight" in theirs
    assert theirs[f"{prefix}class_embed.bias"][3] == state["decoder.class_heads.0.no_object.bias"]
    again = from_maskdino(theirs)
    state["denoising.label_embed.weight"][-1] = 0  # the row of empty slots is ours alone
    assert again.keys() == state.keys()
    assert all(torch.equal(x, state[key]) for key, x in again.items())


def test_tokens_are_not_ranked_by_a_softmax():
    with pytest.raises(ValueError, match="use StaticQueries"):
        semantic(QUERY_SELECTION="UnifiedQuerySelection")


def test_what_needs_instances_says_so(make_mask_dino):
    model = make_mask_dino().eval()
    model.instance_on = False
    with pytest.raises(ExportError, match="exported files need instances"):
        export(model, (64, 64))
    predictor = Predictor(model, classes="abc", augmentations=[], image_format="RGB")
    with pytest.raises(ValueError, match=r"this model outputs maps and no instances: call results"):
        predictor(np.zeros((64, 64, 3), np.uint8))


def test_all_that_a_model_gives_is_as_of_detectron2s_predictor(make_mask_dino, randomise):
    model = make_mask_dino().eval()
    randomise(model.decoder.mask_head)
    randomise(model.decoder.class_heads)
    model.panoptic_on, model.semantic_on, model.object_mask_threshold = True, True, 0.0
    predictor = Predictor(model, classes="abc", augmentations=[], image_format="RGB")
    image = np.full((40, 64, 3), 99, np.uint8)
    assert len(predictor.results(image, 1.0)["instances"]) == 0 < predictor.highest
    result, again = predictor.results([image, image])
    with torch.no_grad():
        expected, _ = model([predictor.prepare(image)] * 2)
    assert torch.equal(result["instances"].scores, expected["instances"].scores)
    assert len(predictor(image)) == len(result["instances"]) == len(again["instances"])
    (ids, segments), (others, same) = result["panoptic_seg"], expected["panoptic_seg"]
    assert torch.equal(ids, others) and segments == same
    assert torch.equal(result["sem_seg"], expected["sem_seg"])
    model.instance_on = False
    assert predictor.results(image).keys() == {"panoptic_seg", "sem_seg"}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"instance_on": False}, "has no output enabled: set one of MODEL.DINO.TEST.INSTANCE_ON"),
        ({"stuff_classes": [0, 3]}, "class 3 is stuff .* but the model has 3 classes"),
        ({"object_mask_threshold": 1.5}, "object_mask_threshold is 1.5"),
        ({"temperature": 0.0}, "temperature is 0.0"),
    ],
)
def test_wrong_results_are_sentences(options, said):
    cfg = model_zoo.get_config("quickstart_masks.py")
    cfg.model.update(num_classes=3, **options)
    with torch.device("meta"), pytest.raises(ValueError, match=said):
        instantiate(cfg.model)


def test_has_masks_of_all_boxes_by_default(make_mask_dino, make_mask_batch):
    batch = make_mask_batch(3)
    (target,) = make_mask_dino().prepare_targets(batch)
    assert target.known.all() and isinstance(batch[0]["instances"].gt_masks, BitMasks)


def test_a_step_in_bfloat16_with_many_objects_is_finite(make_mask_dino, make_mask_batch):
    model = make_mask_dino(budget=10)
    with torch.autocast("cpu", torch.bfloat16):
        losses = model(make_mask_batch(300, 0))
    sum(losses.values()).backward()
    assert all(torch.isfinite(x) and x.dtype == torch.float32 for x in losses.values())
    assert all(torch.isfinite(x.grad).all() for x in model.parameters())


def test_an_exported_graph_detects_the_same(make_mask_dino, make_mask_batch, randomise):
    model = make_mask_dino().eval()
    randomise(model.decoder.mask_head)
    graph = Exportable(model)
    image = make_mask_batch(1)[0]["image"]
    sizes = torch.tensor([[64, 64], [48, 40]])
    images = torch.stack([image, F.pad(image[:, :48, :40], (0, 24, 0, 16))])
    with torch.no_grad():
        boxes, scores, labels, masks = graph(images, sizes)
        whole = model([{"image": image}])[0]["instances"]
        model.nms = 0.5
        fewer = Exportable(model)(images, sizes)[1]
    assert masks.shape == (2, 20, 16, 16) and (scores.diff(dim=1) <= 0).all()
    found = F.interpolate(masks[:1], scale_factor=4, mode="bilinear", align_corners=False)[0] > 0
    # Certainty is that of the smaller maps here, and of the image there.
    torch.testing.assert_close(scores[0], whole.scores, atol=0.02, rtol=0)
    equal = (found[:, None] == whole.pred_masks).float().mean((2, 3))
    assert (equal.amax(1) > 0.999).all()  # in nearly the same order
    assert (fewer == 0).sum() > (scores == 0).sum()
    model.panoptic_on, model.stuff_classes = True, frozenset([0, 2])
    with torch.no_grad():
        _, scores, labels, _ = Exportable(model)(images, sizes)
    assert (scores[labels != 1] == 0).all() and (scores > 0).any()
    same = compare(
        MaskDetections(boxes, scores, labels, masks),
        MaskDetections(boxes, scores, labels, -masks),
        0.0,
    )
    assert not same.tolerable and (same.masks > 0.5).all() and (same.boxes == 0).all()
