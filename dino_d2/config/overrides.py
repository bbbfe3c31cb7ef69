"""Applies overrides of the command line to a config, and suggests names for unknown keys."""

import pydoc
from collections.abc import Iterator, Mapping, Sequence
from functools import reduce
from inspect import Parameter, signature
from typing import Any

from detectron2.config import CfgNode
from detectron2.utils.registry import locate
from omegaconf import DictConfig, OmegaConf

from ..names import hint, nearest
from .keys import RENAMED


def apply_overrides(cfg: CfgNode | DictConfig, overrides: Sequence[str]) -> list[str]:
    """Change a config of either style in place; returns the changed keys.

    >>> from detectron2.config import get_cfg
    >>> apply_overrides(get_cfg(), ["SOLVER.BASE_LR", "1e-4", "INPUT.FORMAT", "RGB"])
    ['SOLVER.BASE_LR', 'INPUT.FORMAT']

    Args:
        cfg: a CfgNode, or a LazyConfig
        overrides: for a CfgNode, keys and values in turn, `["SOLVER.BASE_LR", "0.1"]`; for a
            LazyConfig, Hydra's grammar, `["optimizer.lr=0.1"]`. A LazyConfig must have the key, or
            its `_target_` must have an argument of that name; `+key=value` adds any key

    Raises:
        ValueError: an override cannot be read, its key is unknown, or its value has another type
            than the CfgNode's
    """
    is_yaml = isinstance(cfg, CfgNode)
    for word in overrides[:: 2 if is_yaml else 1]:
        if word.startswith("--"):
            raise ValueError(
                f"{word!r} is an option, not a key of the config: write it before the config "
                "overrides, which end the command"
            )
    if is_yaml and "IMPORTS" in overrides[::2]:
        raise ValueError("IMPORTS has to be in the config file: it takes effect when that is read")
    return list((_change_yaml if is_yaml else _change_lazy)(cfg, overrides))


def keys_of(cfg: dict, prefix: str = "") -> Iterator[str]:
    """The keys of nested dicts, joined by dots."""
    for name, value in cfg.items():
        yield f"{prefix}{name}"
        if isinstance(value, dict):
            yield from keys_of(value, f"{prefix}{name}.")


def unknown_key(key: str, known: Sequence[str]) -> str:
    """The message about an unknown key, with similar ones."""
    if key in RENAMED:
        return f"'{key}' is now called '{RENAMED[key]}': use that name"
    name = key.split(".")[-1]
    near = nearest(key, known) or [x for x in known if x.split(".")[-1] == name][:3]
    end = (
        f"did you mean: {', '.join(near)}"
        if near
        else hint(key, (x for x in known if "." not in x))
    )
    return f"there is no key '{key}' in the config; {end}"


def _can_have(cfg: CfgNode, key: str) -> bool:
    """Whether a key is in a config, or in a section that accepts any key."""
    *sections, name = key.split(".")
    node: Any = cfg
    for section in sections:
        node = node.get(section) if isinstance(node, CfgNode) else None
    return isinstance(node, CfgNode) and (name in node or node.is_new_allowed())


def _change_yaml(cfg: CfgNode, words: Sequence[str]) -> Iterator[str]:
    for index in range(0, len(words), 2):
        key = words[index]
        if "=" in key:
            raise ValueError(
                f"overrides of a YAML config are KEY VALUE: write {key.replace('=', ' ', 1)!r}, "
                f"not {key!r}"
            )
        if not _can_have(cfg, key):
            raise ValueError(unknown_key(key, list(keys_of(cfg))))
        if index + 1 == len(words):
            raise ValueError(f"the key '{key}' has no value after it")
        _set_yaml(cfg, key, words[index + 1])
        yield key


def _set_yaml(cfg: CfgNode, key: str, value: str) -> None:
    parts = key.split(".")
    now = reduce(lambda node, part: node.get(part), parts, cfg)  # None: a new key
    if isinstance(now, CfgNode):
        raise ValueError(f"'{key}' is a section: name one of its keys, as {key}.{next(iter(now))}")
    if type(now) in (int, float) and type(number := as_int(value)) is int:
        value = str(type(now)(number))
    change: Any = value
    for part in reversed(parts):
        change = {part: change}
    try:
        cfg.merge_from_other_cfg(CfgNode(change))
    except ValueError as error:
        raise ValueError(
            f"'{key}' takes values such as {now!r} ({type(now).__name__}), not {value!r}"
        ) from error


def _change_lazy(cfg: DictConfig, words: Sequence[str]) -> Iterator[str]:
    for word in words:
        adds, whole, content = _parse(word)
        for key, value in _leaves(whole, content):
            plain = OmegaConf.to_container(cfg, resolve=False)
            _check_lazy(plain, key, adds)
            if key.split(".")[-1] == "_target_":
                _check_target(key, value)
            else:
                value = _fitting(plain, key, value)
            OmegaConf.update(cfg, key, value, merge=True)
            yield key


def _parse(word: str) -> tuple[bool, str, Any]:
    """Parse an override: whether it adds a key, the key, and the value."""
    from hydra.core.override_parser.overrides_parser import OverridesParser  # slow to import
    from hydra.errors import HydraException

    if word.startswith("~"):
        raise ValueError(f"the override {word!r} is a deletion, not supported here: set a value")
    if "=" not in word:
        raise ValueError(
            f"overrides of a LazyConfig are KEY=VALUE, such as train.max_iter=100, but one of "
            f"them is {word!r}"
        )
    try:
        override = OverridesParser.create().parse_override(word)
    except HydraException as error:
        raise ValueError(
            f"the override {word!r} cannot be read ({str(error).splitlines()[0]}): put its value, "
            "or each value of a list, into quotes, as in \"key='a value'\""
        ) from error
    if override.is_sweep_override():
        raise ValueError(
            f"the override {word!r} has several values: write [a,b] for a list, or quote them"
        )
    adds = override.is_add() or override.is_force_add()
    return adds, override.key_or_group, override.value()


def _leaves(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Split a dict into its leaves, so that other keys of its section are kept."""
    if not isinstance(value, dict) or not value:
        yield key, value
        return
    for name, inner in value.items():
        yield from _leaves(f"{key}.{name}", inner)


def _check_lazy(plain: dict, key: str, adds: bool) -> None:
    """Raise a ValueError if a key cannot exist, or is missing and not to be added."""
    node: Any = plain
    parts = key.split(".")
    for index, part in enumerate(parts):
        inside, where = _inside(node), ".".join(parts[:index])
        if isinstance(node, list) and part not in inside:
            raise ValueError(
                f"'{where}' is a list of {len(node)}, numbered from 0, and has no '{part}': to "
                f"make it longer give all of it, as {where}=[...]"
            )
        if part not in inside and not (adds or _takes(node, part)):
            known = list(_lazy_keys(plain))
            end = "" if key in RENAMED else f"; '+{key}=VALUE' adds one"
            raise ValueError(unknown_key(key, known) + end)
        if not isinstance(node, dict | list | None):
            raise ValueError(f"'{where}' is {node!r}, and has no '{part}' inside")
        node = inside.get(part)


def _inside(node: Any) -> dict[str, Any]:
    if isinstance(node, list):
        return {str(i): x for i, x in enumerate(node)}
    return node if isinstance(node, dict) else {}


def _takes(node: Any, name: str) -> bool:
    """Whether a section without a key can have it."""
    if node is None:
        return name == "_target_"
    names, others = _arguments(node)
    return others or name in names


def _arguments(node: Any) -> tuple[list[str], bool]:
    """The argument names of a section's target, and whether it takes any others."""
    if "_target_" not in _inside(node):
        return [], False
    try:
        parameters = _parameters(node)
    except ValueError:  # functions in C may have no signature
        return [], True
    anything = (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)
    names = [x.name for x in parameters.values() if x.kind not in anything]
    return names, any(x.kind is Parameter.VAR_KEYWORD for x in parameters.values())


def _fitting(plain: Any, key: str, value: Any) -> Any:
    """Convert a value to its key's type, as 1e4 to an int; a ValueError if it has another type."""
    section, _, name = key.rpartition(".")
    node = reduce(lambda node, part: _inside(node).get(part), section.split("."), plain)
    now = _inside(node if section else plain).get(name)
    if isinstance(now, dict) and not isinstance(value, dict):
        if section and "_target_" in now:  # a value may replace a call that makes one
            return value
        raise ValueError(f"'{key}' is a section: name one of its keys, as {key}.{next(iter(now))}")
    kind = None if now is None else _kind(node, name, now)
    if kind is None or value is None or isinstance(value, str) and "${" in value:
        return value
    if kind is int:
        value = as_int(value)
    # Unlike in Python, a bool is not an int here; an int may replace a float.
    fits = type(value) is kind or kind is float and type(value) is int
    if not fits:
        raise ValueError(
            f"'{key}' takes values such as {now!r} ({kind.__name__}), not {value!r} "
            f"({type(value).__name__})"
        )
    return value


def _kind(node: Any, name: str, now: Any) -> type | None:
    """The only type among bool, int, float and str that a key accepts; None if unknown."""
    if isinstance(now, str) and "${" in now or not isinstance(node, dict):
        return None
    # Without a target it is a training option.
    kind = _annotations(node).get(name) if "_target_" in node else type(now)
    return kind if kind in (bool, int, float, str) else None


def as_int(value: Any) -> Any:
    """Convert a float without fraction, such as 1e4, to an int; leave anything else as it is."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return value
    is_whole = number.is_integer() and not isinstance(value, bool)
    return int(number) if is_whole else value


def _parameters(node: dict) -> Mapping[str, Parameter]:
    target = node["_target_"]
    return signature(locate(target) if isinstance(target, str) else target).parameters


def _annotations(node: dict) -> dict[str, Any]:
    try:
        return {x.name: x.annotation for x in _parameters(node).values()}
    except ValueError:
        return {}


def _lazy_keys(node: Any, prefix: str = "") -> Iterator[str]:
    """The keys that a config has or can have."""
    inside = _inside(node)
    for name in dict.fromkeys([*inside, *_arguments(node)[0]]):
        yield f"{prefix}{name}"
        yield from _lazy_keys(inside.get(name), f"{prefix}{name}.")


def _check_target(key: str, value: Any) -> None:
    """Raise a ValueError if a `_target_` is not the path of a callable."""
    what = f"'{key}' is {value!r}"
    if not isinstance(value, str) or not value:
        raise ValueError(f"{what}: give the path of a class or function, as torch.nn.Linear")
    try:
        found = locate(value)
    except pydoc.ErrorDuringImport as error:
        raise ValueError(f"{what}, which fails while it is imported: {error}") from error
    except ImportError as error:
        module, _, name = str(value).rpartition(".")
        near = [f"{module}.{x}" for x in nearest(name, dir(pydoc.locate(module)))]
        end = f"; did you mean: {', '.join(near)}" if near else ""
        raise ValueError(f"{what}, which cannot be imported{end}") from error
    if not callable(found):
        raise ValueError(f"{what}, which is no class or function but a {type(found).__name__}")
