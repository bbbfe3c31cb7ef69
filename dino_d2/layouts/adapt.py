"""Adapts weights to another number of heads, other classes and other window sizes."""

import re
from collections.abc import Sequence
from math import isqrt

import torch.nn.functional as F

from .renaming import State

ClassNames = Sequence[str | None]

HEAD = re.compile(r"decoder\.(class|box)_heads\.(\d+)\.(.*)")
LABELS = "denoising.label_embed.weight"
CLASS_BIAS = "decoder.class_heads.0.bias"
# Training-only modules besides denoising, which no other implementation has.
TRAINING_ONLY = ("branches.", "passes.")
_CLASS_DEPENDENT = re.compile(
    r"(query_selection|decoder|(branches|passes)\.\d+(\.query_selection)?)\.class_heads?\."
    r"(?!.*no_object)"  # DETR's
    r"|denoising\.label_embed\."
)


def count_classes(state: State) -> int | None:
    """How many classes the decoder's heads know; None: there are no such heads."""
    return len(state[CLASS_BIAS]) if CLASS_BIAS in state else None


def count_heads(state: State) -> int:
    """The number of class heads of the decoder."""
    return len({match[2] for key in state if (match := HEAD.match(key)) and match[1] == "class"})


def repeat_heads(state: State, number: int) -> State:
    """Copy the shared heads of a state dict to each of `number` layers."""
    heads = [match for key in state if (match := HEAD.match(key))]
    return state | {
        f"decoder.{m[1]}_heads.{i}.{m[3]}": state[m[0]] for m in heads for i in range(number)
    }


def select_classes(
    state: State, source: ClassNames | None, target: ClassNames, initial: State
) -> tuple[State, list[str]]:
    """Adapt weights to other classes: classes of the same name keep their rows.

    The label embedding, which only training needs, may have rows for more or fewer classes than
    the heads.

    Args:
        state: our state dict, of K classes
        source: names of its K classes, None for unused rows; if None, an equal number of classes
            is assumed to be the same classes
        target: the classes of the model
        initial: state dict of the model, for rows of new classes

    Returns:
        a new state dict, and the classes of the model that are new to it; if all are new, the
        state dict lacks the tensors that depend on classes
    """
    keys = [key for key in state if _CLASS_DEPENDENT.match(key) and key in initial]
    keys = [key for key in keys if state[key].shape[1:] == initial[key].shape[1:]]
    fits = {key for key in keys if state[key].shape == initial[key].shape}
    if source is not None and tuple(source) != tuple(target):
        known = _same_names(source, target)
    elif fits.issuperset(keys):
        return state, []
    else:
        known = {i: i for i in range(len(target))} if fits.issuperset({*keys} - {LABELS}) else {}
    new = [name for i, name in enumerate(target) if name and i not in known]
    if not known:
        return {key: x for key, x in state.items() if key not in keys}, new
    selected = {key: initial[key].detach().clone() for key in keys}
    for key, x in selected.items():
        for to, row in known.items():
            if key != LABELS or row < len(state[key]) - 1:  # the last row is for empty slots
                x[to] = state[key][row]
    return state | selected, new


def _same_names(source: ClassNames, target: ClassNames) -> dict[int, int]:
    """The source row of each target class; case only matters if names are ambiguous without it."""
    exact = {name: row for row, name in enumerate(source) if name}
    folded = [name.casefold() for name in exact]
    alike = {n.casefold(): row for n, row in exact.items() if folded.count(n.casefold()) == 1}
    wanted = [name.casefold() for name in target if name]
    rows = {}
    for i, name in enumerate(target):
        if name in exact:
            rows[i] = exact[name]
        elif name and name.casefold() in alike and wanted.count(name.casefold()) == 1:
            rows[i] = alike[name.casefold()]
    return rows


def resize_windows(state: State, initial: State) -> tuple[State, dict[str, tuple[int, int]]]:
    """Interpolate the position biases of a Swin transformer to other window sizes (bicubic).

    As its authors do for fine-tuning. Tables of windows that are not square are not changed.

    Returns:
        the state, and the old and new window size of each interpolated table
    """
    resized, windows = {}, {}
    for key, x in state.items():
        wanted = initial.get(key, x)
        if wanted.shape == x.shape:
            continue
        if key.endswith("relative_position_index"):  # follows from the size
            resized[key] = wanted
        if key.endswith("relative_position_bias_table") and wanted.shape[1] == x.shape[1]:
            sides, heads = (isqrt(len(x)), isqrt(len(wanted))), x.shape[1]
            if [side**2 for side in sides] != [len(x), len(wanted)]:
                continue
            offsets = x.float().T.reshape(1, heads, sides[0], sides[0])
            grown = F.interpolate(offsets, (sides[1],) * 2, mode="bicubic", align_corners=False)
            resized[key] = grown.reshape(heads, -1).T.to(x.dtype)
            windows[key] = (sides[0] + 1) // 2, (sides[1] + 1) // 2
    return state | resized, windows
