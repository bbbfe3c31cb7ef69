"""Swin transformer as a backbone."""

from detectron2.modeling import SwinTransformer as Detectron2Swin


class SwinTransformer(Detectron2Swin):
    """Detectron2's, whose `size_divisibility` raises AttributeError. It takes images of any size:
    windows are padded inside, as in the published models."""

    size_divisibility = 0
