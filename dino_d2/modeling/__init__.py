"""The stages of the detector; `dino.py` joins them to a Detectron2 meta-architecture."""

from .auxiliary import AuxiliaryFasterRCNN, AuxiliaryFCOS
from .backbones import BackboneError, TimmBackbone, ViTDet
from .branches import BRANCH_REGISTRY, PASS_REGISTRY
from .class_losses import (
    CLASS_LOSS_REGISTRY,
    AlignLoss,
    FocalLoss,
    MatchabilityAwareLoss,
    PositionSupervisedLoss,
    SoftmaxLoss,
    VarifocalLoss,
)
from .criterion import CRITERION_REGISTRY, SetCriterion
from .decoder import Decoder
from .decoder_layers import DECODER_LAYER_REGISTRY
from .denoising import DENOISING_REGISTRY, CenterDenoising, ContrastiveDenoising, Denoising
from .encoder import ENCODER_LAYER_REGISTRY, Encoder
from .mask_loss import MaskCriterion, MaskMatcher
from .masks import (
    MaskDecoder,
    PixelEmbedding,
    UnifiedQuerySelection,
)
from .matcher import (
    MATCHER_REGISTRY,
    HungarianMatcher,
    PositionModulatedMatcher,
    SoftmaxMatcher,
)
from .neck import ChannelMapper
from .one_to_many import (
    DenseQueries,
    MixedMatching,
    OneToManyHead,
    OneToManyMatcher,
    OneToManyQueries,
)
from .passes import InstructedPass, SeparatePass
from .positions import POSITION_HEAD_REGISTRY
from .query_selection import (
    QUERY_SELECTION_REGISTRY,
    DistinctQuerySelection,
    MixedQuerySelection,
    PureQuerySelection,
    StaticQueries,
)
from .relations import RELATION_REGISTRY, DistinctQueries, PositionRelation
from .swin import SwinTransformer

__all__ = [
    "UnifiedQuerySelection",
    "PixelEmbedding",
    "MaskDecoder",
    "MaskMatcher",
    "MaskCriterion",
    "CenterDenoising",
    "BRANCH_REGISTRY",
    "CLASS_LOSS_REGISTRY",
    "CRITERION_REGISTRY",
    "DECODER_LAYER_REGISTRY",
    "DENOISING_REGISTRY",
    "ENCODER_LAYER_REGISTRY",
    "MATCHER_REGISTRY",
    "PASS_REGISTRY",
    "POSITION_HEAD_REGISTRY",
    "QUERY_SELECTION_REGISTRY",
    "RELATION_REGISTRY",
    "AlignLoss",
    "AuxiliaryFCOS",
    "AuxiliaryFasterRCNN",
    "BackboneError",
    "ChannelMapper",
    "ContrastiveDenoising",
    "Decoder",
    "Denoising",
    "DenseQueries",
    "DistinctQueries",
    "DistinctQuerySelection",
    "Encoder",
    "FocalLoss",
    "HungarianMatcher",
    "InstructedPass",
    "MatchabilityAwareLoss",
    "MixedMatching",
    "MixedQuerySelection",
    "OneToManyHead",
    "OneToManyMatcher",
    "OneToManyQueries",
    "PositionModulatedMatcher",
    "PositionRelation",
    "PositionSupervisedLoss",
    "PureQuerySelection",
    "SeparatePass",
    "SetCriterion",
    "SoftmaxLoss",
    "SoftmaxMatcher",
    "StaticQueries",
    "SwinTransformer",
    "TimmBackbone",
    "VarifocalLoss",
    "ViTDet",
]
