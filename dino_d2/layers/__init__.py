"""Layers that the stages are made of."""

from .blocks import MLP, SoftmaxHead, absolute_box_head, box_head, class_head
from .deformable_attention import DeformableAttention
from .dense_attention import (
    ConditionalCrossAttention,
    ConditionalSelfAttention,
    DenseAttention,
    SelfAttention,
)
from .position import encode_boxes, encode_pixels

__all__ = [
    "MLP",
    "ConditionalCrossAttention",
    "ConditionalSelfAttention",
    "DeformableAttention",
    "DenseAttention",
    "SelfAttention",
    "SoftmaxHead",
    "absolute_box_head",
    "box_head",
    "class_head",
    "encode_boxes",
    "encode_pixels",
]
