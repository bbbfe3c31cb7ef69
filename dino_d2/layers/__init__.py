"""Layers that the stages are made of."""

from .blocks import MLP, box_head, class_head
from .deformable_attention import DeformableAttention
from .position import encode_boxes, encode_pixels

__all__ = ["MLP", "DeformableAttention", "box_head", "class_head", "encode_boxes", "encode_pixels"]
