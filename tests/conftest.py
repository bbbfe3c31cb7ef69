"""What the tests share: the devices there are, and a detector small enough to train in a blink.

Fixtures named `make_*` are functions that build what they are named after.
"""

import gc
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.layers import ShapeSpec
from detectron2.modeling import Backbone
from detectron2.structures import BitMasks, Boxes, Instances
from torch import nn
from torch.nn import functional as F

from dino_d2 import DINO, MaskDINO, modeling
from dino_d2.boxes import cxcywh_to_xyxy
from dino_d2.modeling.tokens import flatten
from dino_d2.structures import Predictions, Target

NUM_CLASSES = 3
# Their tests take long and share little.
ONE_BY_ONE = {"test_compile", "test_default_trainer", "test_run", "test_submit"}
DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def pytest_configure(config):
    """Tests that run side by side have a thread each, and so have the processes they start."""
    if hasattr(config, "workerinput"):  # of pytest-xdist
        torch.set_num_threads(1)
        os.environ["OMP_NUM_THREADS"] = "1"


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Each file runs in one process, so that its fixtures are made once. Files with many tests run
    first, and tests of `ONE_BY_ONE` last, so that all processes end at about the same time."""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            file = nodeid.partition("::")[0]
            return nodeid if Path(file).stem in ONE_BY_ONE else file

    return Scheduling(config, log)


def pytest_collection_modifyitems(items):
    """Nightly tests count as slow, and slow tests are not measured: they mostly run third-party
    Python code, which takes twice as long when measured. Lines that only they run are missing."""
    for item in items:
        if {"slow", "nightly"} & {marker.name for marker in item.iter_markers()}:
            item.add_marker("slow")
            item.add_marker("no_cover")


def pytest_collection_finish():
    """What is imported stays: looking through it for garbage takes a tenth of the time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def clean_catalogs():
    """Datasets that a test registers are gone after it."""
    datasets, metadata = set(DatasetCatalog), set(MetadataCatalog)
    yield
    for catalog, before in ((DatasetCatalog, datasets), (MetadataCatalog, metadata)):
        for name in set(catalog) - before:
            catalog.remove(name)


@pytest.fixture
def without_plots(monkeypatch):
    """An evaluation leaves out the plots of its errors, which take two seconds to draw."""
    monkeypatch.setattr("dino_d2.engine.evaluator.draw_error_plots", lambda analysis, folder: [])


@pytest.fixture(params=DEVICES)
def device(request):
    return torch.device(request.param)


class TinyBackbone(Backbone):
    """Features of the strides of a ResNet: mean colours, and one layer on top."""

    def __init__(self, channels: int = 16, colours: int = 3, features=("res3", "res4", "res5")):
        super().__init__()
        self.strides = {name: 2 ** int(name.removeprefix("res")) for name in features}
        self.convs = nn.ModuleDict({name: nn.Conv2d(colours, channels, 1) for name in self.strides})

    def forward(self, x):
        pooled = {name: F.avg_pool2d(x, s, ceil_mode=True) for name, s in self.strides.items()}
        return {name: self.convs[name](x).relu() for name, x in pooled.items()}

    def output_shape(self):
        return {
            name: ShapeSpec(channels=self.convs[name].out_channels, stride=stride)
            for name, stride in self.strides.items()
        }


@pytest.fixture
def make_dino():
    """A DINO of 64 channels, 2 + 2 layers and 20 queries; 64 x 64 images give 85 tokens."""

    def make(
        query_selection=modeling.MixedQuerySelection,
        denoising=modeling.ContrastiveDenoising,
        num_queries=20,
        budget=4,
        max_detections=300,
        colours=3,
        **decoder,
    ):
        sizes = {"embed_dim": 64, "num_heads": 4, "ffn_dim": 64, "num_points": 2, "num_layers": 2}
        backbone = TinyBackbone(colours=colours)
        return DINO(
            backbone=backbone,
            neck=modeling.ChannelMapper(
                input_shape=backbone.output_shape(),
                in_features=list(backbone.strides),
                out_channels=64,
            ),
            encoder=modeling.Encoder(**sizes),
            query_selection=query_selection(
                num_queries=num_queries, embed_dim=64, num_classes=NUM_CLASSES
            ),
            decoder=modeling.Decoder(num_classes=NUM_CLASSES, **(sizes | decoder)),
            criterion=modeling.SetCriterion(matcher=modeling.HungarianMatcher()),
            denoising=denoising and denoising(num_classes=NUM_CLASSES, embed_dim=64, budget=budget),
            num_classes=NUM_CLASSES,
            max_detections=max_detections,
            pixel_mean=[120.0, 115.0, 105.0][:colours],
            pixel_std=[60.0, 58.0, 57.0][:colours],
        )

    return make


@pytest.fixture
def make_targets():
    """One target per number of boxes, all boxes at least 0.05 inside the image."""

    def make(*counts, num_classes=NUM_CLASSES):
        return [
            Target(
                torch.randint(num_classes, (count,)),
                torch.cat([0.3 + 0.4 * torch.rand(count, 2), 0.1 + 0.4 * torch.rand(count, 2)], 1),
            )
            for count in counts
        ]

    return make


@pytest.fixture
def make_batch(make_targets):
    """Detectron2's input: one image per number of boxes; `sizes` are (height, width)."""

    def make(*counts, sizes=None):
        batch = []
        sizes = sizes or [(64, 64)] * len(counts)
        for (height, width), target in zip(sizes, make_targets(*counts), strict=True):
            corners = cxcywh_to_xyxy(target.boxes) * torch.tensor([width, height] * 2)
            instances = Instances((height, width), gt_boxes=Boxes(corners))
            instances.gt_classes = target.labels
            image = torch.randint(256, (3, height, width), dtype=torch.uint8)
            batch.append({"image": image, "instances": instances})
        return batch

    return make


@pytest.fixture
def make_predictions():
    """Random predictions (*leading, Q, .), boxes inside the image."""

    def make(*leading, num_queries=5, num_classes=NUM_CLASSES, spread=2.0):
        boxes = 0.3 + 0.4 * torch.rand(*leading, num_queries, 4)
        return Predictions(spread * torch.randn(*leading, num_queries, num_classes), boxes)

    return make


@pytest.fixture
def make_memory():
    """A random pyramid; `padding` (B, H, W) is that of the images."""

    def make(shapes=((6, 5), (3, 3)), channels=32, batch=2, padding=None):
        if padding is None:
            padding = torch.zeros(batch, 48, 40, dtype=torch.bool)
        levels = [torch.randn(len(padding), channels, *shape) for shape in shapes]
        return flatten(levels, padding, torch.randn(len(shapes), channels))

    return make


@pytest.fixture
def image():
    """Red at the left, blue at the right: (H, W) is (60, 90)."""
    array = np.zeros((60, 90, 3), np.uint8)
    array[:, :45, 0] = array[:, 45:, 2] = 200
    return array


@pytest.fixture
def randomise():
    """Draws every parameter of a module anew: zeros at initialisation hide who depends on whom."""

    def fill(module, std=0.2):
        for parameter in module.parameters():
            nn.init.normal_(parameter, std=std)
        return module

    return fill


@pytest.fixture
def make_mask_dino():
    """A Mask DINO of the size of `make_dino`, which takes the batches of `make_mask_batch`."""

    def make(initialize_box_type="bitmask", budget=4, max_detections=20, num_points=64):
        sizes = {"embed_dim": 64, "num_heads": 4, "ffn_dim": 64, "num_points": 2, "num_layers": 2}
        backbone = TinyBackbone(features=("res2", "res3", "res4", "res5"))
        shape, common = backbone.output_shape(), {"embed_dim": 64, "num_classes": NUM_CLASSES}
        return MaskDINO(
            backbone=backbone,
            pixel_embedding=modeling.PixelEmbedding(input_shape=shape, embed_dim=64),
            neck=modeling.ChannelMapper(
                input_shape=shape, in_features=["res3", "res4", "res5"], out_channels=64
            ),
            encoder=modeling.Encoder(**sizes),
            query_selection=modeling.UnifiedQuerySelection(
                num_queries=20, initialize_box_type=initialize_box_type, **common
            ),
            decoder=modeling.MaskDecoder(num_classes=NUM_CLASSES, eps=1e-5, **sizes),
            criterion=modeling.MaskCriterion(matcher=modeling.MaskMatcher(), num_points=num_points),
            denoising=modeling.CenterDenoising(budget=budget, eps=1e-5, **common),
            num_classes=NUM_CLASSES,
            max_detections=max_detections,
            pixel_mean=[120.0, 115.0, 105.0],
            pixel_std=[60.0, 58.0, 57.0],
        )

    return make


@pytest.fixture
def make_mask_batch(make_batch):
    """As `make_batch`; an object's mask is the ellipse in its box."""

    def make(*counts, sizes=None):
        batch = make_batch(*counts, sizes=sizes)
        for x in batch:
            instances = x["instances"]
            height, width = instances.image_size
            y, x_ = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
            low, high = instances.gt_boxes.tensor[:, :, None, None].split(2, 1)
            center, size = (low + high) / 2, high - low
            apart = (torch.stack([x_, y]) + 0.5 - center) / size
            instances.gt_masks = BitMasks((apart**2).sum(1) <= 0.25)
        return batch

    return make
