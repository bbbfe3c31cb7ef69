"""Operators of the detector, as PyTorch custom operators."""

from .dispatch import Backend, backends
from .ms_deform_attn import ms_deform_attn, ms_deform_attn_from_offsets

__all__ = ["Backend", "backends", "ms_deform_attn", "ms_deform_attn_from_offsets"]
