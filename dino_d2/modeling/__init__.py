"""The stages of the detector; `dino.py` joins them to a Detectron2 meta-architecture."""

from .criterion import SetCriterion
from .decoder import Decoder
from .denoising import DENOISING_REGISTRY, ContrastiveDenoising, Denoising
from .encoder import Encoder
from .matcher import HungarianMatcher
from .neck import ChannelMapper
from .query_selection import (
    QUERY_SELECTION_REGISTRY,
    MixedQuerySelection,
    PureQuerySelection,
    StaticQueries,
)

__all__ = [
    "DENOISING_REGISTRY",
    "QUERY_SELECTION_REGISTRY",
    "ChannelMapper",
    "ContrastiveDenoising",
    "Decoder",
    "Denoising",
    "Encoder",
    "HungarianMatcher",
    "MixedQuerySelection",
    "PureQuerySelection",
    "SetCriterion",
    "StaticQueries",
]
