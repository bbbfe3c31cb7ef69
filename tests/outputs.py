"""What a detector gives, made by hand or asked for by a batch of images."""

from dino_d2.modeling.dino import padding_mask
from dino_d2.structures import Branch, DetectorOutput


def detector_output(layers, proposals=None, denoised=(), denoising=None):
    """Of the layers and the proposals of the result and, with `denoising`, of its layers."""
    result = Branch("", None, layers=layers, proposals=proposals)
    return DetectorOutput([result, *([denoising._replace(layers=denoised)] if denoising else [])])


def with_result(output, **fields):
    """The same, but for some fields of the result."""
    return DetectorOutput([output.result._replace(**fields), *output.branches[1:]])


def run_detector(model, images, targets=None):
    """All predictions for Detectron2's ImageList."""
    return model.detect(images.tensor, padding_mask(images), targets)
