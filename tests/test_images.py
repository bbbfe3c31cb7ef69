"""Images are read, without Detectron2, as Detectron2 reads them."""

import numpy as np
import pytest
from detectron2.data import detection_utils
from PIL import ExifTags, Image

from dino_d2.images import image_size, read_image, to_array


@pytest.fixture
def picture():
    pixels = np.random.default_rng(0).integers(256, size=(5, 7, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize("orientation", [None, 0, *range(1, 9), 9])
def test_every_orientation_is_made_upright(picture, tmp_path, orientation):
    exif, path = Image.Exif(), str(tmp_path / "a.png")
    if orientation is not None:
        exif[ExifTags.Base.Orientation] = orientation
    picture.save(path, exif=exif)
    found = read_image(path, "BGR")
    np.testing.assert_array_equal(found, detection_utils.read_image(path, "BGR"))
    assert found.shape[:2] == image_size(path)[::-1]


@pytest.mark.parametrize("image_format", ["RGB", "BGR", "L", "YCbCr", "CMYK", "YUV-BT.601"])
@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA"])
def test_every_format_is_detectron2s(picture, mode, image_format):
    image = picture.convert(mode)
    found = to_array(image, image_format)
    expected = detection_utils.convert_PIL_to_numpy(image, image_format)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)  # YUV is computed in floats
    assert found.dtype == expected.dtype
