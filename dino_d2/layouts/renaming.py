"""Renames the tensors of state dicts."""

import re

from torch import Tensor

State = dict[str, Tensor]


def rename(state: State, table: str, *, back: bool = False) -> State:
    """Rename tensors from their names to ours, or `back`.

    The first line of `table` (our name, their name) that matches the beginning of a key applies;
    `#` is a number. Other keys keep their names.

    >>> table = "encoder.layers.#.norm1   transformer.layers.#.norms.0"
    >>> list(rename({"transformer.layers.5.norms.0.bias": None, "fc.bias": None}, table))
    ['encoder.layers.5.norm1.bias', 'fc.bias']
    """
    rules = []
    for line in filter(str.strip, table.splitlines()):
        new, old = reversed(line.split()) if back else line.split()
        pattern = re.escape(old).replace(r"\#", r"(\d+)") + r"(?=\.|$)"
        for number in range(1, 1 + new.count("#")):
            new = new.replace("#", rf"\{number}", 1)
        rules.append((re.compile(pattern), new))

    def name(key: str) -> str:
        hit = next(((p, new) for p, new in rules if p.match(key)), None)
        return hit[0].sub(hit[1], key, count=1) if hit else key

    return {name(key): x for key, x in state.items() if not key.endswith(".num_batches_tracked")}


def move(state: State, prefix: str, new: str) -> State:
    """Replace a prefix in the keys that have it."""
    return {
        new + key.removeprefix(prefix) if key.startswith(prefix) else key: x
        for key, x in state.items()
    }


class CheckpointError(ValueError):
    """A checkpoint cannot be found or read, or does not fit the model."""
