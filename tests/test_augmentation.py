import pickle

import numpy as np
import pytest
from detectron2.config import LazyCall, LazyConfig, instantiate
from detectron2.data import DatasetMapper
from detectron2.data import transforms as T
from omegaconf import OmegaConf

from dino_d2.data import ResizeShortestEdge, detr_augmentation


@pytest.fixture(autouse=True)
def seed():
    np.random.seed(0)


def sizes_after(augmentations, height, width, times=100):
    """The (H, W) that ``times`` runs give to an image."""
    sizes = []
    for _ in range(times):
        data = T.AugInput(np.zeros((height, width, 3), dtype=np.uint8))
        T.AugmentationList(augmentations)(data)
        sizes.append(data.image.shape[:2])
    return sizes


def test_short_sides_are_those_of_the_paper():
    sizes = sizes_after(detr_augmentation(crop_size=None), 60, 60)
    assert {height for height, _ in sizes} == set(range(480, 801, 32))


def test_the_long_side_is_limited():
    assert set(sizes_after(detr_augmentation(crop_prob=0.0), 100, 400, times=20)) == {(333, 1333)}


def test_the_crop_comes_after_a_resize_and_has_sides_in_its_range():
    *_, branch, _ = detr_augmentation(crop_prob=1.0)
    # the short side is 400, 500 or 600, the long one twice that: the crop is never cut short
    sizes = np.array(sizes_after([branch], 50, 100))
    assert sizes.min() >= 384 and sizes.max() <= 600
    assert sizes[:, 0].max() > 500 and sizes[:, 1].max() > 500


def test_the_crop_happens_half_of_the_time():
    *_, branch, _ = detr_augmentation(crop_size=(5, 6), crop_min_sizes=(8,))
    cropped = [size != (20, 20) for size in sizes_after([branch], 20, 20, times=400)]
    assert 160 < sum(cropped) < 240  # 200 expected, standard deviation 10


def test_an_image_smaller_than_the_crop_is_cropped_to_what_it_has():
    *_, branch, _ = detr_augmentation(crop_min_sizes=(40,), crop_prob=1.0)
    assert set(sizes_after([branch], 20, 20, times=10)) == {(40, 40)}
    assert {height for height, _ in sizes_after([branch], 20, 300, times=10)} == {40}


def test_a_strip_does_not_fill_the_memory_before_it_is_cropped():
    strip = np.zeros((1, 20_000, 3), dtype=np.uint8)  # 400 pixels high it would be 8,000,000 wide
    *_, branch, _ = detr_augmentation(crop_prob=1.0)
    data = T.AugInput(strip)
    resize, _ = T.AugmentationList([branch])(data).transforms
    assert (resize.new_h, resize.new_w) == (1, 10_000)
    assert 384 <= data.image.shape[1] <= 600


@pytest.mark.parametrize(("height", "width"), [(1, 10_000), (10_000, 1), (2, 9000)])
def test_no_side_vanishes(height, width):
    (size,) = sizes_after([ResizeShortestEdge(800, 1333)], height, width, times=1)
    assert sorted(size) == [1, 1333]
    (size,) = set(sizes_after(detr_augmentation(crop_prob=0.0), height, width, times=3))
    assert sorted(size) == [1, 1333]


@pytest.mark.parametrize("size", [(480, 640), (100, 1000), (1, 1), (999, 3), (640, 59)])
def test_what_does_not_vanish_is_resized_as_by_detectron2(size):
    ours, theirs = (
        sizes_after([kind(480, 1333)], *size, times=1)
        for kind in (ResizeShortestEdge, T.ResizeShortestEdge)
    )
    assert ours == theirs


def test_a_short_side_of_nothing_stands_for_no_resize():
    assert sizes_after([ResizeShortestEdge(0, 1333)], 20, 30, times=1) == [(20, 30)]


def test_without_a_crop_size_nothing_is_cropped():
    augmentations = detr_augmentation(min_sizes=(32,), crop_size=None)
    assert len(augmentations) == 2
    assert set(sizes_after(augmentations, 16, 24, times=20)) == {(32, 48)}


def test_boxes_follow_the_image():
    image = np.zeros((40, 60, 3), dtype=np.uint8)
    image[10:20, 30:50] = 255
    augmentations = T.AugmentationList(
        detr_augmentation((60,), crop_min_sizes=(80,), crop_size=(50, 80), crop_prob=1.0)
    )
    seen = 0
    for _ in range(10):
        data = T.AugInput(image, boxes=np.array([[30.0, 10.0, 50.0, 20.0]]))
        augmentations(data)
        height, width = data.image.shape[:2]
        left, top, right, bottom = data.boxes[0].clip(0, [width, height, width, height])
        rows, columns = np.nonzero(data.image[..., 0] > 127)
        if len(rows):
            seen += 1
            drawn = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            np.testing.assert_allclose([left, top, right, bottom], drawn, atol=1.5)
    assert seen >= 5


def test_a_lazy_config_builds_the_mapper_and_takes_overrides():
    node = LazyCall(DatasetMapper)(
        is_train=True,
        augmentations=LazyCall(detr_augmentation)(
            min_sizes=[480], crop_min_sizes=[400], crop_size=[384, 600]
        ),
        image_format="RGB",
    )
    cfg = OmegaConf.create({"mapper": node}, flags={"allow_objects": True})
    cfg = LazyConfig.apply_overrides(
        cfg, ["mapper.augmentations.min_sizes=[64]", "mapper.augmentations.crop_size=null"]
    )
    mapper = pickle.loads(pickle.dumps(instantiate(cfg.mapper)))  # as a worker gets it
    assert set(sizes_after(mapper.augmentations.augs, 16, 24, times=5)) == {(64, 96)}


def test_every_augmentation_can_be_printed():
    # Detectron2 logs the list when it builds a mapper
    text = str(detr_augmentation())
    assert "RandomFlip" in text and "RandomApply" in text and "max_size=1333" in text


@pytest.mark.parametrize("flip", ["horizontal", "vertical", "none", "both"])
def test_flips_are_those_of_the_config(flip):
    image = np.arange(12, dtype=np.uint8).reshape(3, 4)
    expected = {
        "horizontal": [image[:, ::-1]],
        "vertical": [image[::-1]],
        "none": [],
        "both": [image[:, ::-1], image[::-1], image[::-1, ::-1]],
    }[flip]
    flips = detr_augmentation(crop_size=None, flip=flip)[:-1]
    outcomes = [T.AugmentationList(flips)(T.AugInput(image.copy())) for _ in range(40)]
    pictures = {outcome.apply_image(image).tobytes() for outcome in outcomes}
    assert pictures == {x.tobytes() for x in (image, *expected)}


def test_an_unknown_flip_is_refused():
    with pytest.raises(ValueError, match="sideways.*horizontal, vertical, none"):
        detr_augmentation(flip="sideways")


def changed(image, augmentations):
    data = T.AugInput(image)
    T.AugmentationList(augmentations)(data)
    return data.image


@pytest.mark.parametrize("channels", [1, 3])
def test_colours_change_by_factors_around_one(channels):
    *_, brightness, contrast, saturation = detr_augmentation(photometric=0.25)
    image = np.full((4, 4, channels), 100, dtype=np.uint8)
    image[:2] = 60
    brightest = [changed(image, [brightness]).max() for _ in range(200)]
    assert 75 <= min(brightest) < 80 and 120 < max(brightest) <= 125
    ranges = [np.ptp(changed(image, [contrast]).astype(int)) for _ in range(200)]
    assert 29 <= min(ranges) < 32 and 48 < max(ranges) <= 51  # 40 between the halves
    grays = [changed(image, [saturation]) for _ in range(20)]  # no colours: rounding alone
    assert max(abs(gray.astype(int) - image).max() for gray in grays) <= 1


def test_the_saturation_does_not_depend_on_the_order_of_the_colours():
    *_, saturation = detr_augmentation(photometric=0.5)
    image = np.array([[[30, 60, 120]]], dtype=np.uint8)
    for seed in range(10):
        np.random.seed(seed)
        forwards = changed(image, [saturation])
        np.random.seed(seed)
        backwards = changed(image[..., ::-1], [saturation])
        np.testing.assert_array_equal(forwards, backwards[..., ::-1])
        factor = (forwards[0, 0, 2] - 70) / 50  # the mean is 70
        assert 0.48 <= factor <= 1.52
        np.testing.assert_allclose(forwards[0, 0], 70 + factor * np.array([-40, -10, 50]), atol=2)


def test_scale_jitter_is_in_place_of_the_last_resize():
    augmentations = detr_augmentation(max_size=100, crop_size=None, scale_jitter=(0.5, 2.0))
    sizes = np.array(sizes_after(augmentations, 20, 40, times=300))
    assert sizes.max() == 100  # what is larger is cropped
    scaled = sizes[sizes[:, 1] < 100]
    assert scaled[:, 1].min() in (50, 51, 52)
    np.testing.assert_allclose(scaled[:, 0], scaled[:, 1] / 2, atol=0.5)
    assert 65 < len(scaled) < 135  # a third: factors below 1 of those from 0.5 to 2
    assert set(sizes_after(augmentations, 1, 10_000, times=5)) <= {(1, x) for x in range(101)}


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"scale_jitter": (2.0, 0.1)}, r"the scale jitter is \[2.0, 0.1\]; give two factors"),
        ({"scale_jitter": (0, 1)}, "a factor of the scale jitter is 0"),
        ({"photometric": 20}, "photometric augmentation is 20; it has to be a number from 0 to 1"),
        ({"sampling": "any"}, "sampling is 'any'; it can be choice, range"),
        ({"crop_type": "round"}, "crop_type is 'round'; it can be absolute_range, absolute, rel"),
        ({"sampling": "range", "min_sizes": (1, 2, 3)}, r"side is \[1, 2, 3\]; give two sizes"),
        ({"crop_type": "relative_range"}, r"relative_range, of size \[384, 600\]; give fractions"),
    ],
)
def test_options_that_cannot_be_are_one_sentence(options, part):
    with pytest.raises(ValueError, match=part):
        detr_augmentation(**options)
