"""Names with underscores for dots, as LyCORIS and kohya write them, and the model's names that they stand for."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Collection

from dora_kernels.shown import shown

UNDERSCORED = "underscored"
"""The entry of `Adapter.config` that says that names are still those of the file."""

PREFIX = "prefix"
"""The entry of `Adapter.config` that says which prefix the file's names have, if it is one for all."""

_PREFIX = re.compile(r"(lycoris|lora_unet|lora_te\d?|lora)_")


def prefix_of(name: str, asked: str = "") -> str:
    """What says which model a name is of: `asked`, "lycoris", "lora_unet", "lora_te1", ...; empty without."""
    if asked and name.startswith(f"{asked}_"):
        return asked
    found = _PREFIX.match(name)
    return found[1] if found else ""


def check_prefix(prefix: object) -> str:
    """`prefix` without an underscore at its end; TypeError or ValueError for what no name starts with."""
    if not isinstance(prefix, str):
        raise TypeError(f"prefix: expected a str, got {type(prefix).__name__}")
    if not prefix.strip("_") or "." in prefix:
        raise ValueError(f"prefix: expected one such as 'lora_te1', without dots, got {prefix!r}")
    return prefix.removesuffix("_")


def resolve(
    names: Collection[str],
    known: Collection[str],
    error: Callable[[str], ValueError],
    notes: list[str],
    asked: str = "",
) -> dict[str, str]:
    """The model's name (of `known`) that each of a file's names stands for. `asked` is a prefix that they may have.

    A file may be of several models, told apart by the prefix (``lora_unet``, ``lora_te1``): prefixes of which no layer
    is the model's are left out, with a note, if another's all are.

    Raises:
        ValueError: a name stands for none of the model's, or for several, or two for the same.
    """
    candidates: dict[str, list[str]] = defaultdict(list)
    for name in known:
        candidates[name.replace(".", "_")].append(name)
    found: dict[str, str] = {}
    came: dict[str, str] = {}
    missing: dict[str, list[str]] = defaultdict(list)
    for name in names:
        prefix = prefix_of(name, asked)
        rest = name[len(prefix) + 1 :] if prefix else name
        exact = "." in name and name in known  # then no dot was lost
        meant = {name} if exact else {each for way in (name, rest) for each in candidates[way.replace(".", "_")]}
        if not meant:
            missing[prefix].append(name)
            continue
        if len(meant) > 1:
            raise error(f"{name} may be any of {shown(', '.join(sorted(meant)), 1000)}")
        own = meant.pop()
        if own in came:
            raise error(f"{came[own]} and {name} are both {own}; read it with prefix= to take one model's")
        found[name], came[own] = own, name
    hits = {prefix_of(name, asked) for name in found}
    for prefix, others in missing.items():
        if prefix in hits or not hits or not prefix.startswith("lora_"):
            raise error(f"{others[0]}: the model has no such layer")
        notes.append(f"{len(others)} layers with the prefix {prefix} are of another model and left out")
    return found
