"""Names with underscores for dots, as LyCORIS and kohya write them, and the model's names that they stand for."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Collection
from typing import TypeVar

UNDERSCORED = "underscored"
"""The entry of `Adapter.config` that says that names are still those of the file."""

_PREFIX = re.compile(r"(lycoris|lora_unet|lora_te\d?|lora)_")

T = TypeVar("T")


def prefix_of(name: str) -> str:
    """What says which model a name is of: "lycoris", "lora_unet", "lora_te1"; empty without."""
    found = _PREFIX.match(name)
    return found[1] if found else ""


def underscored(names: Collection[str]) -> bool:
    return any(prefix_of(name) and "." not in name for name in names)


def resolve(
    layers: dict[str, T], known: Collection[str], error: Callable[[str], ValueError], notes: list[str]
) -> dict[str, T]:
    """`layers` under the model's names (`known`).

    A file may be of several models, told apart by the prefix (``lora_unet``, ``lora_te1``): prefixes of which no layer
    is the model's are left out, with a note, if another's all are.

    Raises:
        ValueError: a name stands for none of the model's, or for several, or two for the same.
    """
    candidates: dict[str, list[str]] = defaultdict(list)
    for name in known:
        candidates[name.replace(".", "_")].append(name)
    found: dict[str, T] = {}
    came: dict[str, str] = {}
    missing: dict[str, list[str]] = defaultdict(list)
    hits: set[str] = set()
    for name, layer in layers.items():
        prefix = prefix_of(name)
        rest = name[len(prefix) + 1 :] if prefix else name
        exact = [each for each in (name, rest) if each in known]
        names = exact[:1] or candidates[rest.replace(".", "_")]
        if not names:
            missing[prefix].append(name)
            continue
        if len(names) > 1:
            raise error(f"{name} may be any of {', '.join(sorted(names))}")
        if names[0] in found:
            raise error(f"{came[names[0]]} and {name} are both {names[0]}")
        found[names[0]], came[names[0]] = layer, name
        hits.add(prefix)
    for prefix, names in missing.items():
        if prefix in hits or not hits or not prefix.startswith("lora_"):
            raise error(f"{names[0]}: the model has no such layer")
        notes.append(f"{len(names)} layers with the prefix {prefix} are of another model and left out")
    return found
