"""Classification losses, by class probability alone or also by how well boxes fit.

    FocalLoss               RetinaNet, arXiv 1708.02002, equation 5: as in Deformable DETR and DINO
    VarifocalLoss           VarifocalNet, arXiv 2008.13367, equation 2
    PositionSupervisedLoss  Stable-DINO, arXiv 2304.04742
    AlignLoss               Align-DETR, arXiv 2304.07527
    MatchabilityAwareLoss   DEIM, arXiv 2412.04234
    SoftmaxLoss             DETR, arXiv 2005.12872, section 3.1

For background, they only differ by a weight. For objects, the target of FocalLoss is a probability
of 1; the others' reflects how well the predicted box fits, so that the best boxes get the highest
scores.
"""

import math
from typing import Any

import torch
from detectron2.utils.registry import Registry
from fvcore.nn import sigmoid_focal_loss
from torch import Tensor, nn
from torch.nn import functional as F

from ..ranges import require_share

CLASS_LOSS_REGISTRY = Registry("CLASS_LOSS")


class ClassLoss(nn.Module):
    """p^gamma * softplus(x) times a weight, for logit x and probability p of every absent class.

    Subclasses define the loss of the class of a matched box.

    Args:
        alpha: a weight that depends on the loss; in [0, max_alpha]
        gamma: reduces the loss of background that is recognised as such; at least 0
        background: weight of the loss of background

    Raises:
        ValueError: alpha or gamma is out of range
    """

    max_alpha = 1.0
    per_box = True  # a sum over queries, to be divided by the number of boxes

    def __init__(self, *, alpha: float, gamma: float, background: float):
        super().__init__()
        name = type(self).__name__
        if not 0 <= alpha <= self.max_alpha:
            raise ValueError(
                f"alpha of {name} is {alpha}; it has to be between 0 and {self.max_alpha:g}"
            )
        if gamma < 0:
            raise ValueError(f"gamma of {name} is {gamma}; it has to be at least 0")
        self.alpha, self.gamma, self.background = alpha, gamma, background

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}, gamma={self.gamma}"

    def forward(
        self,
        logits: Tensor,
        matched: tuple[Tensor, ...],
        iou: Tensor,
        weights: Tensor | float = 1.0,
    ) -> Tensor:
        """Sum over all logits of each of N stages: (N,).

        Args:
            logits: (N, B, Q, K), in float32 or wider
            matched: indices into the logits (stage, image, query, class) of n pairs per stage; (N,
                n) when broadcast
            iou: (N, n), of the predicted and the true box of each pair, in [0, 1]; without gradient
            weights: (n,) or (N, n), of the pairs; 0 makes one background
        """
        own = logits[matched]
        absent = self.background * BackgroundLoss.apply(logits, self.gamma)
        return absent + self.change(own, iou, weights).sum(1)

    def change(self, logits: Tensor, iou: Tensor, weights: Tensor | float) -> Tensor:
        """What the loss of pairs (N, n) as objects is above that as background."""
        return weights * (self.object_loss(logits, iou) - self.background_loss(logits))

    def background_loss(self, logits: Tensor) -> Tensor:
        """The loss of the logits (N, n) of pairs as background."""
        absent = torch.zeros_like(logits)
        return self.background * sigmoid_focal_loss(logits, absent, alpha=-1, gamma=self.gamma)

    def object_loss(self, logits: Tensor, iou: Tensor) -> Tensor:
        """The loss of the logits (N, n) of pairs as objects with these IoUs (N, n)."""
        raise NotImplementedError


@CLASS_LOSS_REGISTRY.register()
class FocalLoss(ClassLoss):
    """Focal loss: alpha weighs objects against background; boxes do not matter."""

    def __init__(self, *, alpha: float = 0.25, gamma: float = 2.0):
        super().__init__(alpha=alpha, gamma=gamma, background=1 - alpha)

    def object_loss(self, logits: Tensor, iou: Tensor) -> Tensor:
        return sigmoid_focal_loss(logits, torch.ones_like(logits), self.alpha, self.gamma)


@CLASS_LOSS_REGISTRY.register()
class VarifocalLoss(ClassLoss):
    """Varifocal loss: the IoU q is the target and the weight of a pair; alpha weighs background.

    As in the equation, a box that misses its object (q = 0) is background.
    """

    max_alpha = math.inf

    def __init__(self, *, alpha: float = 0.75, gamma: float = 2.0):
        super().__init__(alpha=alpha, gamma=gamma, background=alpha)

    def object_loss(self, logits: Tensor, iou: Tensor) -> Tensor:
        return torch.where(iou > 0, iou * cross_entropy(logits, iou), self.background_loss(logits))


@CLASS_LOSS_REGISTRY.register()
class PositionSupervisedLoss(ClassLoss):
    """Focal loss whose targets are squared IoUs, relative to the best of the image and stage.

    Stable-DINO uses a weight of 6. For denoising, our config uses :class:`FocalLoss`; the published
    code has a branch for that which is never taken, and uses this loss with a weight of 1.
    """

    def __init__(self, *, alpha: float = 0.25, gamma: float = 2.0):
        super().__init__(alpha=alpha, gamma=gamma, background=1 - alpha)

    def forward(
        self,
        logits: Tensor,
        matched: tuple[Tensor, ...],
        iou: Tensor,
        weights: Tensor | float = 1.0,
    ) -> Tensor:
        images, iou = matched[1].expand_as(iou), iou * (weights > 0)
        best = iou.new_zeros(logits.shape[:2]).scatter_reduce(1, images, iou, "amax")
        best = best.gather(1, images).clamp(min=torch.finfo(iou.dtype).tiny)
        return super().forward(logits, matched, iou / best, weights)

    def object_loss(self, logits: Tensor, iou: Tensor) -> Tensor:
        target = iou**2
        distance = (target - logits.sigmoid()).abs()
        return self.alpha * distance**self.gamma * cross_entropy(logits, target)


@CLASS_LOSS_REGISTRY.register()
class AlignLoss(ClassLoss):
    """The target is p^alpha * IoU^(1 - alpha), at least 0.01, with a detached probability p.

    Weights of pairs multiply the target, not the loss, as the paper wants for the several queries
    that it gives to a box (:class:`MixedMatching`).
    """

    def __init__(self, *, alpha: float = 0.25, gamma: float = 2.0):
        super().__init__(alpha=alpha, gamma=gamma, background=1.0)

    def change(self, logits: Tensor, iou: Tensor, weights: Tensor | float) -> Tensor:
        object_loss = cross_entropy(logits, weights * self.quality(logits, iou))
        return (weights > 0) * (object_loss - self.background_loss(logits))

    def quality(self, logits: Tensor, iou: Tensor) -> Tensor:
        """How well pairs fit, in [0.01, 1], without gradient: the target of a weight of 1."""
        probability = logits.detach().sigmoid()
        return (probability**self.alpha * iou ** (1 - self.alpha)).clamp(min=0.01)


@CLASS_LOSS_REGISTRY.register()
class MatchabilityAwareLoss(ClassLoss):
    """The target is IoU^gamma, also of boxes that hardly fit; alpha weighs background.

    A box that misses its object (IoU 0) is background.
    """

    max_alpha = math.inf

    def __init__(self, *, alpha: float = 1.0, gamma: float = 1.5):
        super().__init__(alpha=alpha, gamma=gamma, background=alpha)

    def object_loss(self, logits: Tensor, iou: Tensor) -> Tensor:
        found = cross_entropy(logits, iou**self.gamma)
        return torch.where(iou > 0, found, self.background_loss(logits))


@CLASS_LOSS_REGISTRY.register()
class SoftmaxLoss(nn.Module):
    """Cross-entropy over the classes and, last, no object: a weighted mean over all queries.

    Args:
        no_object_weight: of queries without an object; in [0, 1]
    """

    per_box = False

    def __init__(self, *, no_object_weight: float = 0.1):
        super().__init__()
        require_share(no_object_weight=no_object_weight)
        self.no_object_weight = no_object_weight

    def extra_repr(self) -> str:
        return f"no_object_weight={self.no_object_weight}"

    def forward(
        self,
        logits: Tensor,
        matched: tuple[Tensor, ...],
        iou: Tensor,
        weights: Tensor | float = 1.0,
    ) -> Tensor:
        """Mean of each of N stages: (N,); arguments are as of `ClassLoss.forward`."""
        absent = self.no_object_weight
        loss = -logits.log_softmax(-1)
        nothing = absent * loss[..., -1]
        change = weights * (loss[matched] - nothing[matched[:-1]])
        pairs = (weights * torch.ones_like(iou)).sum(1)
        total = absent * logits[0, ..., 0].numel() + (1 - absent) * pairs
        return (nothing.flatten(1).sum(1) + change.sum(1)) / total


class BackgroundLoss(torch.autograd.Function):
    """Focal loss without alpha (RetinaNet, equation 4) of background logits (N, ...): (N,).

    For the probability p of a logit x it is p^gamma * softplus(x), with the derivative
    p^gamma * (gamma * (1 - p) * softplus(x) + p). Saves only the logits, the largest tensor with
    many classes, where autograd would save several tensors of their size.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, gamma: float) -> Tensor:
        ctx.save_for_backward(logits)
        ctx.gamma = gamma
        return (logits.sigmoid() ** gamma * F.softplus(logits)).flatten(1).sum(1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (logits,) = ctx.saved_tensors
        p = logits.sigmoid()
        slope = p**ctx.gamma * (ctx.gamma * (1 - p) * F.softplus(logits) + p)
        return slope * grad.view(-1, *[1] * (logits.dim() - 1)), None


def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Binary, elementwise, with targets in [0, 1]; finite for every finite logit."""
    return F.binary_cross_entropy_with_logits(logits, target, reduction="none")
