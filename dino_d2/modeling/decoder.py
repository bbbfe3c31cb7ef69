"""Refines queries and their reference boxes, layer by layer."""

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from ..boxes import refine
from ..layers import SoftmaxHead, absolute_box_head, box_head, class_head
from ..layers.blocks import recompute
from ..ranges import require_share, require_whole
from ..structures import FeaturePyramid, LayerOutput, Queries
from .decoder_layers import ConditionalDecoderLayer, DecoderLayer
from .positions import AnchorPosition, ConditionalPosition

Layer = Callable[..., Tensor]


class Decoder(nn.Module):
    """DINO's decoder: every layer predicts classes and boxes, and passes refined boxes on.

    Args:
        num_classes: K
        num_layers: at least 1
        embed_dim: C
        num_heads: H
        ffn_dim: hidden width of the feed-forward part
        dropout: probability
        num_levels: L
        num_points: P, per head and level
        shared_heads: whether all layers share one class head and one box head (official DINO)
            or have one each (detrex)
        look_forward: how many box heads the box loss of a layer trains. 1: only that of the layer;
            2, "look forward twice" (DINO, section 3.5): that of the layer before as well. 0: boxes
            are predicted but not refined, all layers use the first reference
        layer: constructs each layer from the dimensions above; it accepts those that it needs
        first_layer: constructs the first layer, if it is different
        position_head: computes the positional part of the queries; None: :class:`AnchorPosition`
        final_norm: whether predictions see the queries through a norm (Deformable DETR: no)
        relation: constructs, from `num_heads`, what is called after every layer and returns its
            final predictions and the attention mask of the next, such as :class:`DistinctQueries`
            and :class:`PositionRelation`; None: predictions and `attn_mask` are not changed
        size_bias: where the first box head starts with width and height, before the sigmoid; None:
            all start at random, as those of DETR
        eps: where references are cut off before the inverse sigmoid, see `refine`
        softmax: whether a last logit is that of no object, see :class:`SoftmaxHead`
    """

    recompute = False  # DINO(activation_checkpointing=["decoder"]) sets it

    def __init__(
        self,
        *,
        num_classes: int,
        num_layers: int = 6,
        embed_dim: int = 256,
        num_heads: int = 8,
        ffn_dim: int = 2048,
        dropout: float = 0.0,
        num_levels: int = 4,
        num_points: int = 4,
        shared_heads: bool = True,
        look_forward: int = 2,
        layer: Callable[..., nn.Module] = DecoderLayer,
        first_layer: Callable[..., nn.Module] | None = None,
        position_head: nn.Module | None = None,
        final_norm: bool = True,
        size_bias: float | None = 0.0,
        relation: Callable[..., nn.Module] | None = None,
        eps: float = 1e-3,
        softmax: bool = False,
    ):
        super().__init__()
        require_whole(**{"num_layers of the decoder": num_layers})
        require_whole(num_classes=num_classes, embed_dim=embed_dim, ffn_dim=ffn_dim)
        require_share(dropout=dropout)
        if look_forward not in (0, 1, 2):
            raise ValueError(
                f"look_forward is {look_forward!r}; it can be 2 (twice), 1 (once) or 0 (no "
                "refinement of boxes)"
            )
        self.look_forward, self.eps = look_forward, eps
        self.layers = nn.ModuleList(
            make(
                embed_dim=embed_dim,
                num_heads=num_heads,
                ffn_dim=ffn_dim,
                dropout=dropout,
                num_levels=num_levels,
                num_points=num_points,
            )
            for make in [first_layer or layer, *[layer] * (num_layers - 1)]
        )
        self.norm = nn.LayerNorm(embed_dim) if final_norm else nn.Identity()
        self.position_head = position_head or AnchorPosition(embed_dim=embed_dim)
        told_apart = [isinstance(x, ConditionalDecoderLayer) for x in self.layers]
        if set(told_apart) != {isinstance(self.position_head, ConditionalPosition)}:
            raise ValueError(
                "ConditionalPosition (MODEL.DINO.POSITION_HEAD, model.decoder.position_head) needs "
                "ConditionalDecoderLayers (MODEL.DINO.DECODER_LAYER and FIRST_DECODER_LAYER, "
                "model.decoder.layer and first_layer) in the whole decoder, and these need it: use "
                "both or neither"
            )
        self.relation = relation and relation(num_heads=num_heads)
        if self.relation and num_layers == 1 and list(self.relation.parameters()):
            raise ValueError(
                f"{type(self.relation).__name__} passes relations of queries to later layers, but "
                "the decoder has 1 layer: add layers, or leave the relation out"
            )
        copies = 1 if shared_heads else num_layers
        to_class = SoftmaxHead if softmax else class_head
        self.class_heads = nn.ModuleList(to_class(embed_dim, num_classes) for _ in range(copies))
        to_box = box_head if size_bias is not None else absolute_box_head
        self.box_heads = nn.ModuleList(to_box(embed_dim) for _ in range(copies))
        *_, bias = self.box_heads[0].parameters()
        if size_bias is not None:
            nn.init.constant_(bias[2:], size_bias)

    def forward(
        self,
        queries: Queries,
        memory: FeaturePyramid,
        attn_mask: Tensor | None = None,
        layers: Sequence[Layer] | None = None,
    ) -> list[LayerOutput]:
        """Predict classes and boxes in every layer.

        Args:
            queries: with references relative to the image without padding
            memory: of the encoder
            attn_mask: (Q, Q), True where self-attention is forbidden
            layers: in place of the decoder's own, called as :class:`DecoderLayer` is

        Returns:
            what every layer gives; the predictions of the last are the result
        """
        layers = layers or list(self.layers)
        x, reference, position = queries
        anchor = reference  # reference of the next prediction
        outputs, mask = [], attn_mask
        call = recompute if self.recompute else lambda module, *args: module(*args)
        for i, layer in enumerate(layers):
            to_box = self.box_heads[min(i, len(self.box_heads) - 1)]
            where = self.position_head(Queries(x, reference, position), memory, i)
            x = call(layer, x, where, reference, memory, mask)
            y = self.norm(x)
            delta = to_box(y)
            output = self.output_of(i, y, refine(anchor, delta, self.eps), anchor)
            last = i + 1 == len(layers)
            if self.relation is not None:
                output, mask = call(self.relation, output, attn_mask, last)
            outputs.append(output)
            if self.look_forward and not last:
                # Without the norm, as the published weights were trained.
                refined = refine(reference, delta if y is x else to_box(x), self.eps)
                reference = refined.detach()
                anchor = refined if self.look_forward == 2 else reference
        return outputs

    def output_of(self, layer: int, x: Tensor, boxes: Tensor, anchor: Tensor) -> LayerOutput:
        """What a layer, counted from 0, gives for queries `x` (B, Q, C) behind the final norm."""
        class_head = self.class_heads[min(layer, len(self.class_heads) - 1)]
        return LayerOutput(class_head(x), boxes, x, anchor)
