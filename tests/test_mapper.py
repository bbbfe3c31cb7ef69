"""What the mapper makes of a record, and its one sentence about what it cannot use."""

import copy
import struct
import zlib

import cloudpickle
import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import DatasetMapper
from detectron2.data import transforms as T
from detectron2.data.detection_utils import SizeMismatchError
from detectron2.structures import BoxMode
from PIL import Image
from torch._utils import ExceptionWrapper

from dino_d2.data import DatasetError, Mapper, ResizeShortestEdge, detr_augmentation, read_image

WIDTH, HEIGHT = 40, 30
EXIF_ORIENTATION = 274


@pytest.fixture
def picture():
    """Left of its middle red, right of it blue."""
    array = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    array[:, :20, 0] = array[:, 20:, 2] = 200
    return Image.fromarray(array)


def record(path, width=WIDTH, height=HEIGHT, box=(4, 3, 8, 9)):
    annotation = {"bbox": list(box), "bbox_mode": BoxMode.XYWH_ABS, "category_id": 2, "iscrowd": 0}
    size = {"width": width, "height": height}
    return {"file_name": str(path), **size, "image_id": 1, "annotations": [annotation]}


def make_mapper(kind=Mapper, augmentations=(), is_train=True, image_format="RGB"):
    return kind(is_train=is_train, augmentations=augmentations, image_format=image_format)


def refusal(path, mapper=None, **options):
    with pytest.raises(DatasetError) as error:
        (mapper or make_mapper())(record(path, **options))
    message = str(error.value)
    assert str(path) in message and "\n" not in message and ": " in message
    return message


def png(samples):
    """A PNG of (H, W, 3) uint16 samples, which PIL reads but does not write."""

    def chunk(kind, content):
        check = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + check

    height, width, _ = samples.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in samples)
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    parts = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


# What is read


@pytest.mark.parametrize("image_format", ["RGB", "BGR"])
@pytest.mark.parametrize("mode", ["RGB", "L", "LA", "RGBA", "P", "1", "CMYK", "YCbCr"])
def test_what_is_read_is_read_as_detectron2_does(picture, tmp_path, mode, image_format):
    path = tmp_path / ("a.png" if mode not in ("CMYK", "YCbCr") else "a.jpg")
    picture.convert(mode).save(path)
    augmentations = [T.Resize((60, 80)), T.RandomFlip(1.0)]
    ours, theirs = (
        make_mapper(kind, augmentations, image_format=image_format)(record(path))
        for kind in (Mapper, DatasetMapper)
    )
    assert ours.keys() == theirs.keys() and torch.equal(ours["image"], theirs["image"])
    boxes = [x["instances"].gt_boxes.tensor.tolist() for x in (ours, theirs)]
    assert boxes[0] == boxes[1] == [[56, 6, 72, 24]]
    assert ours["instances"].gt_classes.tolist() == [2]


def test_colours_of_16_bits_keep_their_upper_half(tmp_path):
    samples = np.random.default_rng(0).integers(2**16, size=(HEIGHT, WIDTH, 3), dtype=np.uint16)
    (tmp_path / "a.png").write_bytes(png(samples))
    image = make_mapper()(record(tmp_path / "a.png"))["image"]
    np.testing.assert_array_equal(image.permute(1, 2, 0).numpy(), samples // 256)


def test_an_image_is_turned_as_its_exif_orientation_says(picture, tmp_path):
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = 6  # shown turned by 90 degrees clockwise: red comes to the top
    picture.save(tmp_path / "a.jpg", exif=exif, quality=95)
    image = make_mapper()(record(tmp_path / "a.jpg", width=HEIGHT, height=WIDTH))["image"]
    assert image.shape == (3, WIDTH, HEIGHT)
    red, _, blue = image.float().mean(2)
    assert red[:18].min() > 150 > 50 > red[22:].max() and blue[22:].min() > 150


def test_the_record_is_left_as_it_was(picture, tmp_path):
    picture.save(tmp_path / "a.png")
    given = record(tmp_path / "a.png")
    before = copy.deepcopy(given)
    make_mapper(augmentations=[T.RandomFlip(1.0)])(given)
    assert given == before


def test_without_sizes_in_the_record_those_of_the_image_are_noted(picture, tmp_path):
    picture.save(tmp_path / "a.png")
    bare = {"file_name": str(tmp_path / "a.png")}
    found = make_mapper(is_train=False)(bare)
    assert (found["width"], found["height"]) == (WIDTH, HEIGHT)


def test_a_mapper_reaches_workers_as_a_copy(picture, tmp_path):
    picture.save(tmp_path / "a.png")
    mapper = cloudpickle.loads(cloudpickle.dumps(make_mapper(augmentations=detr_augmentation())))
    assert len(mapper(record(tmp_path / "a.png"))["instances"]) <= 1


@pytest.mark.parametrize("box", [[3, 2, 5, 7], [3.0, 2.0, 5.0, 7.0]])
def test_boxes_of_whole_numbers_are_not_rounded(picture, tmp_path, box):
    picture.save(tmp_path / "a.png")
    found = make_mapper(augmentations=[T.Resize((25, 50))])(record(tmp_path / "a.png", box=box))
    # times 5/4 to the right, 5/6 downwards: x from 3 to 8, y from 2 to 9
    corners = torch.tensor([[3.75, 10 / 6, 10, 7.5]])
    torch.testing.assert_close(found["instances"].gt_boxes.tensor, corners)


@pytest.mark.parametrize(
    ("share", "kept"), [(0.0, [0, 1, 2]), (0.4, [1, 2]), (0.5, [1, 2]), (0.6, [2])]
)
def test_boxes_of_which_a_crop_leaves_too_little_are_dropped_if_asked(
    picture, tmp_path, share, kept
):
    picture.save(tmp_path / "a.png")
    given = record(tmp_path / "a.png")
    # the crop begins at x = 10: of boxes 10 wide 1, 5 and 10 columns are left, then doubled
    boxes = [(1, 3, 10, 9), (5, 3, 10, 9), (12, 3, 10, 9)]
    given["annotations"] = [
        given["annotations"][0] | {"bbox": list(box), "category_id": i}
        for i, box in enumerate(boxes)
    ]
    augmentations = [T.CropTransform(10, 0, 30, 30), T.Resize((60, 60))]
    mapper = Mapper(
        is_train=True, augmentations=augmentations, image_format="RGB", min_visible=share
    )
    found = mapper(given)["instances"]
    assert found.gt_classes.tolist() == kept
    corners = {0: [0, 6, 2, 24], 1: [0, 6, 10, 24], 2: [4, 6, 24, 24]}
    assert found.gt_boxes.tensor.tolist() == [corners[i] for i in kept]


# From a config


def test_a_config_builds_the_mapper_of_evaluation():
    cfg = get_cfg()
    cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST, cfg.INPUT.FORMAT = 50, 70, "RGB"
    mapper = Mapper(cfg, is_train=False)
    (resize,) = mapper.augmentations.augs
    assert isinstance(resize, ResizeShortestEdge)
    transform = resize.get_transform(np.zeros((100, 110, 3), np.uint8))
    assert (transform.new_h, transform.new_w) == (50, 55)
    transform = resize.get_transform(np.zeros((100, 200, 3), np.uint8))
    assert (transform.new_h, transform.new_w) == (35, 70)
    assert mapper.image_format == "RGB" and not mapper.is_train


def test_a_config_builds_the_mapper_of_training_with_augmentations_of_ones_own():
    flip = T.RandomFlip()
    mapper = Mapper(get_cfg(), is_train=True, augmentations=[flip])
    assert mapper.is_train and mapper.augmentations.augs == [flip]
    stock = Mapper(get_cfg())
    assert stock.is_train and type(stock.augmentations.augs[0]) is T.ResizeShortestEdge


# Strips


@pytest.mark.parametrize(("width", "height"), [(10_000, 1), (1, 10_000)])
def test_a_strip_keeps_a_pixel(tmp_path, width, height):
    Image.new("RGB", (width, height)).save(tmp_path / "a.png")
    mapper = make_mapper(augmentations=[ResizeShortestEdge(800, 1333)])
    box = (width // 2, height // 2, (width + 1) // 2, (height + 1) // 2)
    found = mapper(record(tmp_path / "a.png", width, height, box))
    assert sorted(found["image"].shape[1:]) == [1, 1333]
    (x0, y0, x1, y1) = found["instances"].gt_boxes.tensor[0]
    assert x1 - x0 > 0.99 and y1 - y0 > 0.99


# What is refused


def truncated(data):
    return data[: len(data) // 2]


BROKEN = {
    "empty.jpg": (lambda data: b"", "empty or of no known format"),
    "text.jpg": (lambda data: b"not an image", "no known format"),
    "truncated.jpg": (truncated, "truncated"),
    "truncated.png": (truncated, "truncated"),
    "header.png": (lambda data: data[:20], ""),  # in words that change with the version of PIL
    "header.jpg": (lambda data: data[:200], ""),
}


@pytest.mark.parametrize("is_train", [True, False])
@pytest.mark.parametrize("name", BROKEN)
def test_a_damaged_file_is_one_sentence(tmp_path, name, is_train):
    path, (damage, reason) = tmp_path / name, BROKEN[name]
    noise = np.random.default_rng(0).integers(256, size=(HEIGHT, WIDTH, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(damage(path.read_bytes()))
    message = refusal(path, make_mapper(is_train=is_train))
    assert "cannot be read" in message and reason in message and message.endswith("the dataset")


def test_a_file_that_is_not_there_is_one_sentence(tmp_path):
    assert "(No such file or directory)" in refusal(tmp_path / "a.jpg")
    (tmp_path / "folder.jpg").mkdir()
    assert "(Is a directory)" in refusal(tmp_path / "folder.jpg")


def test_an_image_too_large_to_be_one_is_one_sentence(picture, tmp_path, monkeypatch):
    picture.save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert "1200 pixels" in refusal(tmp_path / "a.png")


@pytest.mark.parametrize(
    "error", [SyntaxError("broken\nchunk"), struct.error("broken"), EOFError()]
)
@pytest.mark.parametrize("when", ["open", "decode"])
def test_whatever_reading_raises_is_one_sentence(picture, tmp_path, monkeypatch, error, when):
    def fail(*_, **__):
        raise error

    picture.save(tmp_path / "a.png")
    owner, name = (Image, "open") if when == "open" else (Image.Image, "convert")
    monkeypatch.setattr(owner, name, fail)
    assert f"({'broken' if error.args else 'EOFError'})" in refusal(tmp_path / "a.png")


def test_a_lack_of_memory_is_not_the_fault_of_the_image(picture, tmp_path, monkeypatch):
    def fail(*_):
        raise MemoryError

    picture.save(tmp_path / "a.png")
    monkeypatch.setattr(Image.Image, "convert", fail)
    with pytest.raises(MemoryError):
        make_mapper()(record(tmp_path / "a.png"))


@pytest.mark.parametrize(
    ("name", "kind"),
    [("a.png", np.uint16), ("a.tiff", np.uint16), ("a.tiff", np.int32), ("a.tiff", np.float32)],
)
def test_more_than_8_bits_are_refused_and_not_cut_off(tmp_path, name, kind):
    Image.fromarray(np.full((HEIGHT, WIDTH), 500, kind)).save(tmp_path / name)
    assert "more than 8 bits" in refusal(tmp_path / name)
    with pytest.raises(DatasetError, match="more than 8 bits"):
        read_image(str(tmp_path / name), "RGB")


def test_another_size_than_that_of_the_annotations_is_refused(picture, tmp_path):
    picture.save(tmp_path / "a.png")
    message = refusal(tmp_path / "a.png", width=HEIGHT, height=WIDTH)
    assert "is 40 x 30 pixels" in message and "say 30 x 40" in message


def test_annotations_of_an_image_as_it_is_stored_but_not_shown_are_refused(picture, tmp_path):
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = 6
    picture.save(tmp_path / "a.jpg", exif=exif)
    message = refusal(tmp_path / "a.jpg")
    assert "is 30 x 40 pixels" in message and "EXIF" in message and "say 40 x 30" in message


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_box_that_is_not_finite_is_refused(picture, tmp_path, value):
    picture.save(tmp_path / "a.png")
    message = refusal(tmp_path / "a.png", box=(1, 2, value, 4))
    assert f"box [1.0, 2.0, {value}, 4.0]" in message


def test_a_worker_hands_over_the_sentence_alone(tmp_path):
    try:
        make_mapper()(record(tmp_path / "a.jpg"))
    except DatasetError:
        sent = ExceptionWrapper(where="in DataLoader worker process 0")  # as the loader's worker
    with pytest.raises(DatasetError) as error:
        sent.reraise()
    message = str(error.value)
    assert "Traceback" in sent.exc_msg
    assert message.startswith(f"image '{tmp_path}/a.jpg' cannot be read") and "\n" not in message


# What is not the fault of an image


class Faulty(T.Augmentation):
    def __init__(self, error):
        super().__init__()
        self.error = error

    def get_transform(self, image):
        raise self.error


@pytest.mark.parametrize("kind", [OSError, ValueError, SyntaxError, SizeMismatchError])
def test_an_error_of_an_augmentation_stays_what_it_is(picture, tmp_path, kind):
    picture.save(tmp_path / "a.png")
    error = kind("mine")
    with pytest.raises(kind) as caught:
        make_mapper(augmentations=[Faulty(error)])(record(tmp_path / "a.png"))
    assert caught.value is error


def test_an_error_of_a_subclass_stays_what_it_is(picture, tmp_path):
    class Careless(Mapper):
        def _transform_annotations(self, *_):
            return {}["forgotten"]

    picture.save(tmp_path / "a.png")
    with pytest.raises(KeyError, match="forgotten"):
        make_mapper(Careless)(record(tmp_path / "a.png"))


def test_a_record_without_a_file_name_is_an_error_of_its_maker():
    with pytest.raises(KeyError, match="file_name"):
        make_mapper()({"image_id": 1})
