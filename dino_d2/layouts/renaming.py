"""State dicts under other names."""

import re

from torch import Tensor

State = dict[str, Tensor]


def rename(state: State, table: str, *, back: bool = False) -> State:
    """From their names to ours, or `back`.

    Args:
        table: ours, theirs. `#` is a number, the first line whose name a key begins with counts,
            and what no line knows keeps its name
    """
    rules = []
    for line in table.strip().splitlines():
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
    """Another prefix for the keys that have the given one; the others stay as they are."""
    return {
        new + key.removeprefix(prefix) if key.startswith(prefix) else key: x
        for key, x in state.items()
    }


class CheckpointError(ValueError):
    """A checkpoint cannot be had, cannot be read or does not fit; said in one sentence."""
