"""What DINO's predecessors do otherwise, so that they are compositions of the same stages.

    Deformable DETR        PointQueries, LearnedPosition; two-stage: ProposalQueries, AllProposals
    DAB-Deformable-DETR    StaticQueries, ScaledAnchorPosition
    DN-Deformable-DETR     as DAB, IndicatorQueries, IndicatorDenoising, BoxesOnly

`configs/Predecessors` puts them together. Deviations from their code: the inverse sigmoid is cut
off at 1e-3, as in DAB- and DN-Deformable-DETR and in DINO, where Deformable DETR has 1e-5; the
boxes that are denoised have a limit, and their number is averaged over workers, where DN-DETR's is
not.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..layers import MLP
from ..layers.blocks import xavier_uniform_
from ..layers.position import encode
from ..names import plural
from ..ranges import require_whole
from ..structures import (
    DenoisingBatch,
    DetectorOutput,
    FeaturePyramid,
    Predictions,
    Queries,
    Target,
)
from .criterion import SetCriterion
from .decoder import AnchorPosition
from .denoising import Denoising
from .query_selection import PureQuerySelection, StaticQueries, take


class LearnedPosition(nn.Module):
    """Position head of Deformable DETR's decoder: the positions that the queries came with."""

    def forward(self, queries: Queries, layer: int) -> Tensor:
        """(B, Q, C), the same for every layer."""
        return queries.position


class ScaledAnchorPosition(AnchorPosition):
    """Position head of DAB-Deformable-DETR: the content says how much the place counts
    (conditional scale, DAB-DETR, equation 4); not so in the first layer."""

    def __init__(self, *, embed_dim: int):
        super().__init__(embed_dim=embed_dim)
        self.scale = MLP(embed_dim, embed_dim, embed_dim)
        xavier_uniform_(self.scale)

    def forward(self, queries: Queries, layer: int) -> Tensor:
        position = super().forward(queries, layer)
        return position * self.scale(queries.content) if layer else position


class PointQueries(nn.Module):
    """Queries of Deformable DETR: content and position are learned, and the point to look at first
    is a linear function of the position.

    Args:
        num_queries: Q
        embed_dim: C
    """

    def __init__(self, *, num_queries: int = 300, embed_dim: int = 256):
        super().__init__()
        require_whole(num_queries=num_queries)
        self.content = nn.Embedding(num_queries, embed_dim)
        self.position = nn.Embedding(num_queries, embed_dim)
        self.reference_points = nn.Linear(embed_dim, 2)
        nn.init.xavier_uniform_(self.reference_points.weight)
        nn.init.zeros_(self.reference_points.bias)

    def forward(self, memory: FeaturePyramid) -> tuple[Queries, None]:
        position = self.position.weight
        parts = self.content.weight, self.reference_points(position).sigmoid(), position
        batch = memory.tokens.shape[0]
        return Queries(*(x.expand(batch, -1, -1) for x in parts)), None


class ProposalQueries(PureQuerySelection):
    """Queries of two-stage Deformable DETR (appendix A.4): the proposals of the highest objectness,
    which is the logit of class 0; content and position are functions of the proposal's box, the
    feature of its token is not used."""

    def __init__(self, *, num_queries: int = 300, embed_dim: int = 256, num_classes: int):
        super().__init__(num_queries=num_queries, embed_dim=embed_dim, num_classes=num_classes)
        self.embed_dim = embed_dim
        self.box_proj = nn.Linear(2 * embed_dim, 2 * embed_dim)
        self.box_norm = nn.LayerNorm(2 * embed_dim)
        xavier_uniform_(self.box_proj)

    def forward(self, memory: FeaturePyramid) -> tuple[Queries, Predictions]:
        """The predictions are those of all S tokens."""
        tokens, anchors, logits = self.candidates(memory)
        boxes = (self.box_head(tokens) + anchors).sigmoid()
        reference = take(boxes, self.best(logits[..., 0])).detach()
        encoding = encode(reference, self.embed_dim // 2, temperature=10000.0).flatten(-2)
        position, content = self.box_norm(self.box_proj(encoding)).chunk(2, dim=-1)
        return Queries(content, reference, position), Predictions(logits, boxes)


class AllProposals(SetCriterion):
    """Criterion of two-stage Deformable DETR: the proposals of all tokens are supervised, with
    class 0 for any object."""

    def matching_losses(
        self, output: DetectorOutput, targets: list[Target], num_boxes: Tensor
    ) -> dict[str, Tensor]:
        objects = [target._replace(labels=torch.zeros_like(target.labels)) for target in targets]
        proposals = DetectorOutput([output.proposals], None, [], None)
        losses = super().matching_losses(proposals, objects, num_boxes)
        return super().matching_losses(output._replace(proposals=None), targets, num_boxes) | {
            f"{name}_enc": loss for name, loss in losses.items()
        }


class IndicatorQueries(StaticQueries):
    """Queries of DN-Deformable-DETR: the last channel is 0, for denoising queries it is 1."""

    def __init__(self, *, num_queries: int = 300, embed_dim: int = 256, num_classes: int):
        super().__init__(num_queries=num_queries, embed_dim=embed_dim - 1, num_classes=num_classes)

    def forward(self, memory: FeaturePyramid) -> tuple[Queries, None]:
        queries, _ = super().forward(memory)
        return queries._replace(content=F.pad(queries.content, (0, 1))), None


class IndicatorDenoising(Denoising):
    """Denoising of DN-DETR (section 4.3): a fixed number of groups, centre and size of a box
    noised, not its corners, and a last channel that says whether a query is to be denoised.

    Args:
        groups: of `budget` queries altogether
        box_noise: reach of the noise, relative to half the size for the centre and to the size
            for the size
    """

    def __init__(
        self,
        *,
        num_classes: int,
        embed_dim: int = 256,
        groups: int = 5,
        budget: int = 500,
        label_noise: float = 0.4,
        box_noise: float = 0.4,
    ):
        super().__init__(
            num_classes=num_classes,
            embed_dim=embed_dim - 1,
            budget=budget,
            label_noise=label_noise,
            box_noise=box_noise,
        )
        if not 1 <= groups <= budget:
            raise ValueError(
                f"{plural(groups, 'group')} cannot share a denoising budget of {budget}: each "
                "needs room for a box"
            )
        self.groups = groups

    @property
    def max_boxes(self) -> int:
        return self.budget // self.groups

    def num_groups(self, slots: int) -> int:
        return self.groups

    def content_of(self, labels: Tensor) -> Tensor:
        indicator = (labels != self.num_classes)[..., None]
        return torch.cat([self.label_embed(labels), indicator], -1)

    def noise_boxes(self, boxes: Tensor, copy: Tensor) -> Tensor:
        size = boxes[..., 2:]
        reach = torch.cat([size / 2, size], -1) * self.box_noise
        return (boxes + (2 * torch.rand_like(boxes) - 1) * reach).clamp(0, 1)


class BoxesOnly(SetCriterion):
    """Criterion of DN-DETR: the empty slots of denoising are not supervised."""

    def denoising_losses(
        self,
        predictions: Predictions,
        denoising: DenoisingBatch,
        truth: Target,
        num_boxes: Tensor,
    ) -> dict[str, Tensor]:
        images, queries, _ = denoising.match
        empty = predictions.logits.new_ones(predictions.logits.shape[1:3], dtype=torch.bool)
        empty = empty.index_put((images, queries), torch.zeros_like(images, dtype=torch.bool))
        # Where a logit is -inf nothing is lost and nothing is learned.
        logits = predictions.logits.masked_fill(empty[..., None], -torch.inf)
        predictions = predictions._replace(logits=logits)
        return super().denoising_losses(predictions, denoising, truth, num_boxes)
