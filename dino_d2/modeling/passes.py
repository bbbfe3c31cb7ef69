"""Extra passes through the decoder in training, supervised one to many (Mr. DETR, arXiv
2412.10028).

    InstructedPass   learned tokens tell the queries, in self-attention, what is asked of them
    SeparatePass     feed-forward parts of its own

Everything else is shared with the decoder, which learns from both; inference only uses the decoder.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from detectron2.config import CfgNode, configurable
from torch import Tensor, nn
from torch.nn import functional as F

from ..layers import MLP, box_head, class_head
from ..layers.blocks import xavier_uniform_
from ..names import plural
from ..ranges import require_whole
from ..structures import Branch, FeaturePyramid, Predictions, Queries
from .branches import PASS_REGISTRY, decode
from .one_to_many import Matcher, OneToManyMatcher
from .query_selection import ProposalQueries, PureQuerySelection

if TYPE_CHECKING:
    from .dino import DINO


class FurtherPass(nn.Module):
    """A pass through the decoder in which each layer has some modules of its own.

    Denoising queries take part, and have their losses once more.

    Args:
        name: of its branch
        parts: of the layers, one each
        class_weight: of its class losses, relative to those of the result
        repeats: how many times the number of boxes its losses are divided by
        matcher: None: :class:`OneToManyMatcher` with an `iou_weight` of 0.8
    """

    def __init__(
        self,
        name: str,
        parts: list[nn.Module],
        *,
        class_weight: float,
        repeats: int,
        matcher: Matcher | None,
    ):
        super().__init__()
        require_whole(repeats=repeats)
        self.name = name
        self.parts = nn.ModuleList(parts)
        self.class_weight, self.repeats = class_weight, repeats
        self.matcher = matcher or OneToManyMatcher(iou_weight=0.8)

    def forward(
        self, model: "DINO", memory: FeaturePyramid, result: Branch, others: list[Branch]
    ) -> list[Branch]:
        """Its branches, with predictions; a ValueError if the decoder has other layers.

        Args:
            model: a :class:`DINO`
            memory: of the encoder
            result, others: before decoding
        """
        if len(self.parts) != len(model.decoder.layers):
            raise ValueError(
                f"{type(self).__name__} is for a decoder of {plural(len(self.parts), 'layer')}, "
                f"but the model's has {len(model.decoder.layers)}: set num_layers to this number"
            )
        queries, proposals = self.select(model, memory, result)
        own = Branch(
            self.name,
            queries,
            match=self.matcher,
            repeats=self.repeats,
            class_weight=self.class_weight,
            proposals=proposals,
        )
        pairs = zip(model.decoder.layers, self.parts, strict=True)
        layers = [self.layer(layer, part, queries) for layer, part in pairs]
        noised = [x._replace(name=f"{self.name}_{x.name}") for x in others if x.denoising]
        return decode(partial(model.decoder, layers=layers), memory, own, noised)

    def select(
        self, model: "DINO", memory: FeaturePyramid, result: Branch
    ) -> tuple[Queries, Predictions | None]:
        """Its queries, by default those of the result, and proposals, if it has its own."""
        assert result.queries is not None
        return result.queries, None

    def layer(self, layer: nn.Module, part: nn.Module, queries: Queries) -> Callable[..., Tensor]:
        """A layer of the decoder with a part of this pass."""
        raise NotImplementedError


@PASS_REGISTRY.register()
class SeparatePass(FurtherPass):
    """A pass with separate feed-forward networks, from the queries of the result.

    Args:
        num_layers, embed_dim, ffn_dim, dropout: of the decoder
        class_weight, repeats, matcher: see :class:`FurtherPass`
    """

    @configurable
    def __init__(
        self,
        *,
        num_layers: int = 6,
        embed_dim: int = 256,
        ffn_dim: int = 2048,
        dropout: float = 0.0,
        class_weight: float = 2.0,
        repeats: int = 3,
        matcher: Matcher | None = None,
    ):
        ffns: list[nn.Module] = [
            MLP(embed_dim, ffn_dim, embed_dim, dropout=dropout) for _ in range(num_layers)
        ]
        super().__init__(
            "separate", ffns, class_weight=class_weight, repeats=repeats, matcher=matcher
        )
        xavier_uniform_(self)

    @classmethod
    def from_config(cls, cfg: CfgNode, num_classes: int) -> dict[str, object]:
        c = cfg.MODEL.DINO
        return {
            "num_layers": c.DECODER_LAYERS,
            "embed_dim": c.EMBED_DIM,
            "ffn_dim": c.FFN_DIM,
            "dropout": c.DROPOUT,
        }

    def layer(self, layer: nn.Module, part: nn.Module, queries: Queries) -> Callable[..., Tensor]:
        return partial(layer, ffn=part)


@PASS_REGISTRY.register()
class InstructedPass(FurtherPass):
    """A pass whose queries attend to learned tokens, and come from proposals of separate heads.

    Args:
        num_classes: K
        num_layers, embed_dim: of the decoder
        num_tokens: per layer
        class_weight, repeats, matcher: see :class:`FurtherPass`
    """

    @configurable
    def __init__(
        self,
        *,
        num_classes: int,
        num_layers: int = 6,
        embed_dim: int = 256,
        num_tokens: int = 10,
        class_weight: float = 2.0,
        repeats: int = 3,
        matcher: Matcher | None = None,
    ):
        parts: list[nn.Module] = [Instruction(num_tokens, embed_dim) for _ in range(num_layers)]
        super().__init__(
            "instructed", parts, class_weight=class_weight, repeats=repeats, matcher=matcher
        )
        self.class_head = class_head(embed_dim, num_classes)
        self.box_head = box_head(embed_dim)

    @classmethod
    def from_config(cls, cfg: CfgNode, num_classes: int) -> dict[str, object]:
        c = cfg.MODEL.DINO
        return {
            "num_classes": num_classes,
            "num_layers": c.DECODER_LAYERS,
            "embed_dim": c.EMBED_DIM,
        }

    def select(
        self, model: "DINO", memory: FeaturePyramid, result: Branch
    ) -> tuple[Queries, Predictions | None]:
        selection = model.query_selection
        if not isinstance(selection, PureQuerySelection) or isinstance(selection, ProposalQueries):
            raise ValueError(
                "InstructedPass selects queries from the encoder's proposals, which "
                f"{type(selection).__name__} does not have: use MixedQuerySelection or "
                "PureQuerySelection"
            )
        return selection.select(memory, self.class_head, self.box_head)

    def layer(self, layer: nn.Module, part: nn.Module, queries: Queries) -> Callable[..., Tensor]:
        return partial(layer, attend=partial(part, queries.content.shape[1]))


class Instruction(nn.Module):
    """Learned tokens that take part in self-attention, and the norm after it.

    Args:
        num_tokens: at least 1
        embed_dim: C
    """

    def __init__(self, num_tokens: int, embed_dim: int):
        super().__init__()
        require_whole(num_tokens=num_tokens)
        self.content = nn.Embedding(num_tokens, embed_dim)
        self.position = nn.Embedding(num_tokens, embed_dim)
        self.norm = nn.LayerNorm(embed_dim)

    def forward(
        self, num_queries: int, layer: Any, x: Tensor, position: Tensor, mask: Tensor | None
    ) -> Tensor:
        """Self-attention of a layer, see `DecoderLayer.attend`, with the tokens before the queries.

        Args:
            num_queries: how many of the last queries see the tokens, and are seen by them
            layer: a :class:`DecoderLayer`
            x, position, mask: of all queries
        """
        count, noised = self.content.num_embeddings, x.shape[1] - num_queries
        if mask is not None:
            mask = F.pad(mask, (count, 0, count, 0))
            # A mask of a relation is of every image and head, and may be a bias.
            forbidden = True if mask.dtype == torch.bool else -math.inf
            mask[..., count : count + noised, :count] = forbidden
            mask[..., :count, count : count + noised] = forbidden
        x, position = (
            torch.cat([tokens.weight.expand(len(y), -1, -1), y], 1)
            for tokens, y in ((self.content, x), (self.position, position))
        )
        return layer.attend(x, position, mask, self.norm)[:, count:]
