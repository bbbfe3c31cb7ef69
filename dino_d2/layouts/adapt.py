"""Weights for another number of heads, for other classes and for other windows."""

import re
from collections.abc import Sequence
from math import isqrt

import torch.nn.functional as F

from .renaming import State

ClassNames = Sequence[str | None]

HEAD = re.compile(r"decoder\.(class|box)_heads\.(\d+)\.(.*)")
LABELS = "denoising.label_embed.weight"
CLASS_BIAS = "decoder.class_heads.0.bias"
_CLASS_DEPENDENT = re.compile(r"(query_selection|decoder)\.class_heads?\.|denoising\.label_embed\.")


def count_classes(state: State) -> int | None:
    """How many classes the decoder's heads know; None: there are no such heads."""
    return len(state[CLASS_BIAS]) if CLASS_BIAS in state else None


def count_heads(state: State) -> int:
    """How many class heads the decoder has."""
    return len({match[2] for key in state if (match := HEAD.match(key)) and match[1] == "class"})


def repeat_heads(state: State, number: int) -> State:
    """A state dict of one shared head with that head for each of `number` layers."""
    heads = [match for key in state if (match := HEAD.match(key))]
    return state | {
        f"decoder.{m[1]}_heads.{i}.{m[3]}": state[m[0]] for m in heads for i in range(number)
    }


def select_classes(
    state: State, source: ClassNames | None, target: ClassNames, initial: State
) -> tuple[State, list[str]]:
    """Weights for other classes: a class of the same name keeps its row, others start anew.

    The label embedding may have rows for more classes than the heads, or for fewer, whose class
    keeps its place in the heads; it is of training alone.

    Args:
        state: our state dict, of K classes
        source: what its K classes are, None where a row stands for nothing; None: not known, and
            equally many classes are taken to be the same ones
        target: the classes of the model
        initial: state dict of the model, from which new rows come

    Returns:
        a new state dict, and the classes of the model that are new to it; if all are, it lacks
        the tensors that depend on classes
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
            if key != LABELS or row < len(state[key]) - 1:  # the last is that of empty slots
                x[to] = state[key][row]
    return state | selected, new


def _same_names(source: ClassNames, target: ClassNames) -> dict[int, int]:
    """Which row of the source is that of a target; upper and lower case count only where names
    would be the same without."""
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
    """The position biases of a Swin transformer for the windows of a model with the same names:
    interpolated (bicubic) between the offsets of the windows that they were trained with, as its
    authors do for fine-tuning.

    Returns:
        the state, and by the names of the tables (offsets, heads) that were interpolated the sides
        of the windows before and now; a table of windows that are not square stays as it is
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
