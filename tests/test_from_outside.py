"""What others add without touching the package: supervision for training, a decoder layer of
another kind, another detector."""

from functools import partial

import pytest
import torch
from detectron2.config import LazyConfig, instantiate
from detectron2.modeling import META_ARCH_REGISTRY, build_backbone
from detectron2.structures import ImageList
from outputs import run_detector
from torch import nn
from torch.nn import functional as F

from dino_d2.config.styles import read_config
from dino_d2.data import class_names, generate, register
from dino_d2.engine import make_plan, run
from dino_d2.layers import MLP, class_head
from dino_d2.modeling import HungarianMatcher
from dino_d2.modeling.branches import decode
from dino_d2.modeling.detector import Detector
from dino_d2.modeling.one_to_many import RepeatedMatcher
from dino_d2.modeling.postprocess import postprocess
from dino_d2.structures import Branch, Match, Predictions, Queries
from dino_d2.weights import model_zoo
from dino_d2.weights.checkpointer import Checkpointer

# ---- supervision for training


class OneToMany(nn.Module):
    """Queries of their own, of which `repeats` stand for each box (H-DETR, arXiv 2207.13080)."""

    def __init__(self, *, num_queries, embed_dim, repeats):
        super().__init__()
        self.content = nn.Embedding(num_queries, embed_dim)
        self.anchors = nn.Embedding(num_queries, 4)
        self.matcher = RepeatedMatcher(HungarianMatcher(), repeats=repeats)

    def forward(self, targets, queries, memory):
        parts = self.content.weight, self.anchors.weight.sigmoid()
        own = Queries(*(x.expand(len(targets), -1, -1) for x in parts))
        matcher = self.matcher
        return Branch("many", own, match=matcher, repeats=matcher.repeats, weight=0.5)


class Foreground(nn.Module):
    """The tokens are classified, without the decoder; box number i is matched with token i."""

    def __init__(self, *, embed_dim, num_classes):
        super().__init__()
        self.head = class_head(embed_dim, num_classes)

    def forward(self, targets, queries, memory):
        logits = self.head(memory.tokens)
        boxes = logits.new_full((*logits.shape[:2], 4), 0.5)
        return Branch("dense", None, match=self.match, proposals=Predictions(logits, boxes))

    def match(self, predictions, targets):
        images = torch.cat([torch.full_like(x.labels, i) for i, x in enumerate(targets)])
        boxes = torch.arange(len(images))[None]
        return Match(images, boxes % predictions.logits.shape[2], boxes)


class SecondHead(nn.Module):
    """A second class head for the queries of the result, and a loss of its own rule."""

    def __init__(self, *, embed_dim, num_classes):
        super().__init__()
        self.head = class_head(embed_dim, num_classes)

    def forward(self, targets, queries, memory):
        losses = {"loss_mean": self.head(memory.tokens).square().mean()}
        return Branch("again", None, heads=self.predict, losses=losses)

    def predict(self, outputs):
        return [Predictions(self.head(x.features), x.boxes) for x in outputs]


class SecondPass(nn.Module):
    """The decoder once more, with other feed-forward parts (as Mr. DETR, arXiv 2412.10028)."""

    def __init__(self, *, embed_dim, num_layers):
        super().__init__()
        self.ffns = nn.ModuleList(MLP(embed_dim, 32, embed_dim) for _ in range(num_layers))

    def forward(self, model, memory, result, others):
        layers = [
            lambda *args, layer=layer, ffn=ffn: layer(*args) + ffn(args[0])
            for layer, ffn in zip(model.decoder.layers, self.ffns, strict=True)
        ]
        decoder = partial(model.decoder, layers=layers)
        others = [x for x in others if x.denoising]
        return [
            x._replace(name=f"second{x.name}", proposals=None)
            for x in decode(decoder, memory, result, others)
        ]


@pytest.fixture
def branched(make_dino):
    model = make_dino()
    many = OneToMany(num_queries=12, embed_dim=64, repeats=3)
    model.branches.extend([many, Foreground(embed_dim=64, num_classes=3)])
    return model


def test_branches_of_others_add_losses_and_every_parameter_learns(branched, make_batch):
    losses = branched.train()(make_batch(2, 3))
    names = {name for name in losses if name.startswith("loss_class")}
    kinds = ["", "_0", "_enc", "_dn", "_dn_0", "_many", "_many_0", "_dense_enc"]
    assert names == {f"loss_class{kind}" for kind in kinds}
    sum(losses.values()).backward()
    assert all(x.grad is not None for x in branched.parameters() if x.requires_grad)
    assert branched.branches[0].content.weight.grad.any()


def test_the_result_does_not_know_of_other_branches(branched, make_batch):
    batch = make_batch(2, 3)
    targets = branched.prepare_targets(batch)
    images = branched.preprocess_images(batch)
    together = run_detector(branched, images, targets)
    assert [x.name for x in together.branches] == ["", "dn", "many", "dense"]
    alone = run_detector(branched, images)
    assert [x.name for x in alone.branches] == [""]
    for a, b in zip(together.result.layers, alone.result.layers, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("recompute", [False, True])
def test_further_heads_and_passes_add_losses_and_learn(make_dino, make_batch, recompute):
    model = make_dino()
    model.decoder.recompute = recompute
    model.branches.append(SecondHead(embed_dim=64, num_classes=3))
    model.passes.append(SecondPass(embed_dim=64, num_layers=2))
    losses = model.train()(make_batch(2, 0))
    names = {name for name in losses if "class" not in name and "bbox" not in name}
    kinds = ["", "_0", "_enc", "_dn", "_dn_0", "_again", "_again_0"]
    kinds += ["_second", "_second_0", "_seconddn", "_seconddn_0"]
    assert names == {f"loss_giou{kind}" for kind in kinds} | {"loss_mean_again"}
    sum(losses.values()).backward()
    assert all(x.grad is not None for x in model.parameters() if x.requires_grad)


def test_two_branches_of_one_name_are_refused(branched, make_batch):
    branched.branches.append(branched.branches[1])
    with pytest.raises(ValueError, match="two branches have the loss loss_bbox_dense_enc"):
        branched.train()(make_batch(1))


# ---- a decoder layer


class DenseDecoderLayer(nn.Module):
    """Ordinary attention to all tokens, as DETR's; it has no levels and no points."""

    def __init__(self, *, embed_dim, num_heads, ffn_dim, dropout, **_):
        super().__init__()
        make = {"embed_dim": embed_dim, "num_heads": num_heads, "batch_first": True}
        self.self_attn, self.cross_attn = (nn.MultiheadAttention(**make) for _ in range(2))
        self.ffn = MLP(embed_dim, ffn_dim, embed_dim, dropout=dropout)
        self.norms = nn.ModuleList(nn.LayerNorm(embed_dim) for _ in range(3))

    def forward(self, x, position, reference, memory, attn_mask=None):
        q = x + position
        x = self.norms[0](x + self.self_attn(q, q, x, attn_mask=attn_mask)[0])
        keys = memory.tokens + memory.position
        y = self.cross_attn(x + position, keys, memory.tokens, key_padding_mask=memory.padding)[0]
        x = self.norms[1](x + y)
        return self.norms[2](x + self.ffn(x))


def small(cfg):
    for key in ("encoder.num_layers", "decoder.num_layers"):
        LazyConfig.apply_overrides(cfg, [f"model.{key}=1"])
    cfg.model.num_classes = 3
    return cfg


def test_a_dense_layer_in_the_decoder_is_trained(make_batch, tmp_path):
    cfg = small(model_zoo.get_config("quickstart.py"))
    cfg.model.decoder.layer = DenseDecoderLayer
    LazyConfig.save(cfg, str(tmp_path / "config.yaml"))  # as a training does
    model = instantiate(read_config(str(tmp_path / "config.yaml")).model).train()
    assert type(model.decoder.layers[0]) is DenseDecoderLayer
    sum(model(make_batch(2, 1)).values()).backward()
    assert all(x.grad is not None for x in model.parameters() if x.requires_grad)


# ---- another detector


@META_ARCH_REGISTRY.register()
class OneBox(Detector):
    """One box and its class from the mean of the last feature map."""

    def __init__(self, cfg):
        super().__init__(
            backbone=build_backbone(cfg),
            num_classes=cfg.MODEL.DINO.NUM_CLASSES,
            pixel_mean=cfg.MODEL.PIXEL_MEAN,
            pixel_std=cfg.MODEL.PIXEL_STD,
        )
        *_, last = self.backbone.output_shape().values()
        self.head = nn.Linear(last.channels, self.num_classes + 4)

    def forward(self, batch):
        pixels = [(x["image"].to(self.device) - self.pixel_mean) / self.pixel_std for x in batch]
        images = ImageList.from_tensors(pixels)
        *_, features = self.backbone(images.tensor).values()
        out = self.head(features.mean((2, 3)))[:, None]
        predictions = Predictions(out[..., :-4], out[..., -4:].sigmoid())
        if not self.training:
            found = postprocess(predictions, images.image_sizes, 1)
            return [{"instances": x} for x in found]
        classes = torch.zeros_like(predictions.logits[:, 0])
        for row, x in zip(classes, batch, strict=True):
            row[x["instances"].gt_classes] = 1
        loss = F.binary_cross_entropy_with_logits(
            predictions.logits[:, 0], classes, reduction="sum"
        )
        return {"loss_class": (loss + predictions.boxes.sum()) / self.loss_divisor(batch)}

    @staticmethod
    def count_classes(state):
        return len(state["head.bias"]) - 4 if "head.bias" in state else None


@pytest.mark.slow
@pytest.mark.usefixtures("clean_catalogs", "without_plots")
def test_another_detector_is_trained_evaluated_and_loaded_by_the_same_code(tmp_path):
    generate(tmp_path, num_train=4, num_val=2)
    train, val = (f"{tmp_path}/{x}.json@{tmp_path}/images" for x in ("train", "val"))
    register([train, val])
    cfg = model_zoo.get_config("quickstart.yaml")
    cfg.merge_from_list(
        [
            *("MODEL.META_ARCHITECTURE", "OneBox", "MODEL.DEVICE", "cpu"),
            *("DATASETS.TRAIN", f"('{train}',)", "DATASETS.TEST", f"('{val}',)"),
            *("MODEL.DINO.NUM_CLASSES", 4, "OUTPUT_DIR", str(tmp_path / "out")),
            *("SOLVER.IMS_PER_BATCH", 4, "SOLVER.ACCUMULATE", 2, "SOLVER.MAX_ITER", 2),
            *("TEST.EVAL_PERIOD", 0, "DATALOADER.NUM_WORKERS", 0),
        ]
    )
    plan = make_plan(cfg)
    run.train(plan)
    assert (tmp_path / "out" / "model_best.pth").is_file()  # its AP was looked at
    model = plan.build_model()
    model.head.bias.data.zero_()
    file = str(tmp_path / "out" / "model_final.pth")
    Checkpointer(model, classes=class_names([train]), complete=True).load(file)
    assert model.head.bias.any()
    results = run.test(make_plan(cfg.merge_from_list(["MODEL.WEIGHTS", file]) or cfg))
    assert "AP" in results["bbox"]
