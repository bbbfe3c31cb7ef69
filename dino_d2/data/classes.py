"""Drops, merges and ignores classes of COCO annotations by name.

The changes are part of a data set's name, so that they are in saved configs and in every worker:
``my/cells@train?drop=platelet&merge=vehicle=car,truck&ignore=DontCare``. In class names there,
``% , = & $`` are written as in URLs, a comma as ``%2C``.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from typing import NamedTuple
from urllib.parse import unquote

from ..errors import DatasetError
from ..names import hint, plural

KINDS = ("drop", "merge", "ignore")
START = re.compile(rf"\?(?=(?:{'|'.join(KINDS)})=)")  # of the changes in a name


class ClassChanges(NamedTuple):
    """What becomes of classes, by their names; made by `class_changes`."""

    drop: tuple[str, ...] = ()
    merge: tuple[tuple[str, tuple[str, ...]], ...] = ()  # new name, and the classes it replaces
    ignore: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return any(self)

    def add_to(self, name: str) -> str:
        """The name of a data set with these changes.

        >>> ClassChanges(drop=("a, b",), merge=(("c", ("d", "e")),)).add_to("my/cells@train")
        'my/cells@train?drop=a%2C b&merge=c=d,e'
        """
        parts = [f"drop={_join(self.drop)}"] if self.drop else []
        parts += [f"merge={_join([new])}={_join(old)}" for new, old in self.merge]
        parts += [f"ignore={_join(self.ignore)}"] if self.ignore else []
        return "?".join([name, "&".join(parts)]) if parts else name


def class_changes(
    drop: str | Iterable[str] = (),
    merge: Mapping[str, str | Iterable[str]] | Iterable[tuple[str, str | Iterable[str]]] = (),
    ignore: str | Iterable[str] = (),
) -> ClassChanges:
    """Check changes of classes against each other.

    Args:
        drop: classes to remove with their boxes
        merge: classes by the name of the class that they become, which may exist already
        ignore: classes whose boxes become regions to ignore

    Raises:
        DatasetError: a name is empty, nothing is merged, or a class has several roles
    """
    merged: dict[str, dict[str, None]] = {}
    for new, old in merge.items() if isinstance(merge, Mapping) else merge:
        merged.setdefault(new, {}).update(dict.fromkeys(_listed(old)))
    roles: dict[str, str] = {}
    becomes = [(name, "dropped") for name in _listed(drop)]
    becomes += [(name, "ignored") for name in _listed(ignore)]
    becomes += [(name, f"merged into '{new}'") for new, old in merged.items() for name in old]
    for name, role in becomes:
        if not name.strip():
            raise DatasetError(f"a class to be {role} has an empty name: name a class")
        if (other := roles.setdefault(name, role)) != role:
            raise DatasetError(f"class '{name}' is to be {other} and {role}: name it once")
    for new, old in merged.items():
        if not new.strip() or not old:
            raise DatasetError(f"'{new}' is to be made of the classes {[*old]}: name both")
        own = f"merged into '{new}'"
        if (other := roles.get(new, own)) != own:
            raise DatasetError(
                f"class '{new}' is to be {other}, but others are merged into '{new}': choose "
                "another name"
            )
    return ClassChanges(
        tuple(dict.fromkeys(_listed(drop))),
        tuple((new, tuple(old)) for new, old in merged.items()),
        tuple(dict.fromkeys(_listed(ignore))),
    )


def split_changes(name: str) -> tuple[str, ClassChanges]:
    """The name of a data set without changes of its classes, and these.

    Raises:
        DatasetError: the changes cannot be understood
    """
    if not (start := START.search(name)):
        return name, ClassChanges()
    lists: dict[str, list[str]] = {"drop": [], "ignore": []}
    merge = []
    for part in name[start.end() :].split("&"):
        kind, _, classes = part.partition("=")
        new, equals, old = classes.partition("=")
        if kind not in KINDS or bool(equals) != (kind == "merge"):
            raise DatasetError(
                f"'{name}' has '{part}': write drop=CLASS,CLASS, merge=NEW=CLASS,CLASS or "
                "ignore=CLASS,CLASS, with % , = & $ in names as in URLs"
            )
        if kind == "merge":
            merge.append((unquote(new), _split(old)))
        else:
            lists[kind] += _split(classes)
    return name[: start.start()], class_changes(merge=merge, **lists)


def require_classes(changes: ClassChanges, known: Sequence[str], where: str) -> None:
    """Raise a DatasetError if changes name a class that is unknown in the data set `where`."""
    verbs = [(name, "drop") for name in changes.drop] + [(x, "ignore") for x in changes.ignore]
    for name, verb in [*verbs, *((name, "merge") for _, old in changes.merge for name in old)]:
        if name not in known:
            raise DatasetError(f"{where} has no class '{name}' to {verb}; {hint(name, known)}")


def change_classes(dataset: dict[str, list], changes: ClassChanges) -> tuple[dict[str, list], str]:
    """Drop, merge and ignore classes of COCO annotations; unknown names are ignored.

    All images stay. A merged class takes the place and id of the existing class with its name or,
    without one, of the first merged class. A box of an ignored class becomes a crowd region of
    *every* class that is left, as COCO's evaluation compares detections with regions of their own
    class only.

    Args:
        dataset: as `normalise` leaves it, with unique names of categories; it is not changed

    Returns:
        the changed annotations, and a sentence with the number of boxes that each change affects

    Raises:
        DatasetError: no class is left
    """
    names = {x["id"]: x["name"] for x in dataset["categories"]}
    becomes = {name: new for new, old in changes.merge for name in old}
    gone = {*changes.drop, *changes.ignore}

    def order(category: dict) -> tuple[bool, int]:
        return becomes.get(category["name"], category["name"]) != category["name"], category["id"]

    left: dict[str, dict] = {}
    ids = {}  # of the class that each becomes
    for category in sorted((x for x in dataset["categories"] if x["name"] not in gone), key=order):
        new = becomes.get(category["name"], category["name"])
        ids[category["id"]] = left.setdefault(new, {**category, "name": new})["id"]
    if not left:
        raise DatasetError(f"no class is left of {', '.join(names.values())}: keep at least one")
    annotations = [
        {**x, "category_id": ids[x["category_id"]]}
        for x in dataset["annotations"]
        if x["category_id"] in ids
    ]
    regions = [x for x in dataset["annotations"] if names[x["category_id"]] in changes.ignore]
    categories = sorted(left.values(), key=lambda x: x["id"])
    free = max((0, *(x["id"] for x in dataset["annotations"]))) + 1
    annotations += [
        {**region, "id": id, "category_id": category["id"], "iscrowd": 1}
        for id, (region, category) in enumerate(product(regions, categories), start=free)
    ]
    counts = Counter(names[x["category_id"]] for x in dataset["annotations"])
    told = _describe(changes, counts, list(names.values()), [x["name"] for x in categories])
    return dataset | {"categories": categories, "annotations": annotations}, told


def _describe(
    changes: ClassChanges, counts: Counter[str], before: list[str], left: list[str]
) -> str:
    def listed(classes: Iterable[str]) -> str:
        return ", ".join(f"{name} ({plural(counts[name], 'box')})" for name in classes)

    parts = [f"dropped {listed(changes.drop)}"] if changes.drop else []
    for new, old in changes.merge:
        own = [new] if new in before and new not in old else []
        parts.append(f"merged {listed([*old, *own])} into {new}")
    parts += [f"ignored {listed(changes.ignore)}, as regions"] if changes.ignore else []
    return f"{'; '.join(parts)}; {plural(len(left), 'class')} left: {', '.join(left)}"


def _listed(names: str | Iterable[str]) -> list[str]:
    return [names] if isinstance(names, str) else list(names)


def _join(names: Iterable[str]) -> str:
    # `$` begins a reference in LazyConfigs; what others may not read stays as it is.
    return ",".join(re.sub("[%,=&$]", lambda x: f"%{ord(x[0]):02X}", name) for name in names)


def _split(text: str) -> list[str]:
    return [unquote(name) for name in text.split(",")]
