"""Several sets of queries in one pass of the decoder: the result, and training-only branches.

A training-only branch is a module that :class:`DINO` calls with the targets, the queries of the
result and the encoder's memory, and that returns a :class:`Branch`, such as :class:`Denoising`. The
criterion reads how to supervise it from its Branch: by decoder predictions for additional queries,
by separate heads for these or for the queries of the result, by predictions without a decoder, or
by its own losses.

An extra pass through the decoder is a module that is called with the model, the memory, and the
branches before decoding, and that returns branches as `decode` does, under other names.
"""

from collections.abc import Callable, Sequence

import torch
from detectron2.utils.registry import Registry
from torch import Tensor

from ..structures import (
    Branch,
    FeaturePyramid,
    LayerOutput,
    Queries,
    join_queries,
    split_predictions,
)

BRANCH_REGISTRY = Registry("BRANCH")
PASS_REGISTRY = Registry("PASS")


def decode(
    decoder: Callable[..., list[LayerOutput]],
    memory: FeaturePyramid,
    result: Branch,
    others: Sequence[Branch] = (),
) -> list[Branch]:
    """The branches with their predictions of every decoder layer, the result first.

    Queries of `others` come before those of the result.
    """
    first = [x for x in others if x.queries is not None]
    rest = [x for x in others if x.queries is None]
    branches = [*first, result]
    queries = [x.queries for x in branches if x.queries is not None]
    sizes = [x.content.shape[1] for x in queries]
    groups = [groups_of(x, y) for x, y in zip(first, queries, strict=False)]  # not the result
    mask = group_attn_mask(join_groups(groups, sizes[-1])) if first else None
    layers = decoder(join_queries(queries), memory, mask)
    *split, own = zip(*(split_predictions(layer, sizes) for layer in layers), strict=True)
    return [
        predict(result, own),
        *(predict(x, outputs) for x, outputs in zip(first, split, strict=True)),
        *(x if x.heads is None else predict(x, own) for x in rest),
    ]


def predict(branch: Branch, outputs: Sequence[LayerOutput]) -> Branch:
    """A branch with its predictions, by its own heads if it has some."""
    layers = branch.heads(outputs) if branch.heads else [x.predictions for x in outputs]
    # Not by `_replace`: compiled by PyTorch 2.11, it cannot be returned.
    return Branch(**(branch._asdict() | {"layers": layers}))


def groups_of(branch: Branch, queries: Queries) -> Tensor:
    """Its groups (Q,), by default a single one that does not see the result."""
    alone = queries.content.new_full(queries.content.shape[1:2], -1, dtype=torch.int64)
    return alone if branch.groups is None else branch.groups


def join_groups(groups: Sequence[Tensor], num_queries: int) -> Tensor:
    """Concatenate groups (T_i,) of several branches, made distinct, and `num_queries` zeros."""
    shifted, start = [], 0
    for group in groups:
        shifted.append(group + group.sign() * start)
        start += len(group)
    return torch.cat([*shifted, groups[0].new_zeros(num_queries)])


def group_attn_mask(groups: Tensor) -> Tensor:
    """The attention mask between queries, by the group of every query.

               denoising  one-to-many  result
                1    2        -3         0
         1      .    x         x         .        x is forbidden: everyone sees the own group,
         2      x    .         x         .        groups above 0 see the result as well, and
        -3      x    x         .         x        nobody sees another group
         0      x    x         x         .

    Args:
        groups: (Q,) int64

    Returns:
        (Q, Q) bool, True where the query of a row must not attend to the query of a column
    """
    own = groups == groups[:, None]
    return ~(own | ((groups == 0) & (groups[:, None] > 0)))
