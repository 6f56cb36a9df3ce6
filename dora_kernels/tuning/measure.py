"""`tune`: measure the candidates for a model's shapes, and write what was found where the engine looks for it."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dora_kernels.core import validation
from dora_kernels.engine import choices
from dora_kernels.engine.dispatch import ONE_PASS_TOKENS
from dora_kernels.tuning import tiles
from dora_kernels.tuning.candidates import Layer
from dora_kernels.tuning.quantised import QuantisedLayer
from dora_kernels.tuning.shapes import Shape, quantised_of, shapes_of
from dora_kernels.tuning.timing import in_turns

_TILE_QUESTIONS = 8
"""About how many a rank's kernels ask."""
TOKENS = {"cpu": (1, 16, 128, 512, 2048), "cuda": (1, 64, 256, 1024, 4096, 8192)}


@dataclass(frozen=True)
class Tuned:
    """What `tune` has found.

    Attributes:
        path: the table's file.
        table: what is in it: ``layers`` has the choices for each shape and the times that they were made by.
        wrong: candidates that were left out because their result was wrong, by shape and name, with what was wrong.
    """

    path: Path
    table: dict[str, Any]
    wrong: dict[str, str]

    def __str__(self) -> str:
        lines = [f"{self.table['device']}, {self.table['dtype']}: {self.path}"]
        for name, found in self.table["layers"].items():
            fused = found.get("fused_from_tokens", {})
            parts = [f"norm {found['norm']}"] if "norm" in found else []
            parts += [f"fused in {part} from {_tokens(first)}" for part, first in fused.items()]
            if "one_pass_to_tokens" in found:
                parts.append(f"in one pass up to {found['one_pass_to_tokens']} tokens")
            if "merged_from_tokens" in found:
                parts.append(f"merged faster from {_tokens(found['merged_from_tokens'])} per step")
            lines.append(f"  {name}: {', '.join(parts)}")
        return "\n".join([*lines, *(f"  left out: {name}: {reason}" for name, reason in self.wrong.items())])


def _tokens(first: int | None) -> str:
    return "no number of tokens measured" if first is None else f"{first} tokens"


def tune(
    model_or_shapes: nn.Module | Sequence[Shape],
    *,
    rank: int = 16,
    tokens: Sequence[int] | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    seconds: float = 120.0,
    progress: bool = True,
) -> Tuned:
    """Measure which way is fastest for a model's linear layers on this machine, and keep the answers for it.

    Measured are the forms of the norm and the merged forward beside the composed one; on a GPU also the formula beside
    the fused kernels, few tokens in one pass beside the BLAS's products, and the tile sizes of the kernels. Each
    candidate's result is checked first, the tiles' against the shipped ones', all others' against float64; a wrong one
    is left out. The answers go into a JSON table in the user's cache folder, which `DORA_KERNELS_CACHE` may name,
    beside those for other shapes. They count from then on for the same device, dtype and versions, tiles and forms of a
    GPU's norm in later processes. They change results by rounding at most. How many tokens a merged forward needs is
    advice: it stays an option. Nothing calls this function by itself.

    Args:
        model_or_shapes: a model, whose adapted linear layers count (or all of them, if none is adapted), or
            ``(out_features, in_features, rank)`` of each.
        rank: for a model without adapters.
        tokens: numbers of tokens to measure with; by default 1 to 2048 on a CPU, 1 to 8192 on a GPU.
        device: by default the model's; for shapes a GPU if there is one.
        dtype: of the layers; by default the model's, for shapes float32 on a CPU and bfloat16 on a GPU.
        seconds: about how long it may take; each comparison gets an equal part, and at least five rounds.
        progress: show a bar or, without rich or a terminal, a line per comparison, on standard error.

    Returns:
        The table, its file and the candidates that were wrong.

    Raises:
        TypeError: an argument has a wrong type.
        ValueError: there is no linear layer or shape, or a number is out of range. Nothing is written.
        OSError: the table cannot be written.
    """
    validation.check_size(rank, "rank")
    validation.check_number(seconds, "seconds")
    shapes, of_device, of_dtype = shapes_of(model_or_shapes, int(rank))
    quantised = quantised_of(model_or_shapes, int(rank))
    default = of_device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        where = torch.device(device) if device is not None else default
    except RuntimeError:
        where = torch.device("meta")
    if where.type not in TOKENS:
        raise ValueError(f"device: expected cpu or cuda, got {str(device or where)!r}")
    if where.type == "cuda" and (where.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device: there is no {where}, but {torch.cuda.device_count()} of its kind")
    if where.type == "cuda" and where.index is None:
        where = torch.device("cuda", torch.cuda.current_device())
    dtype = dtype or of_dtype or (torch.bfloat16 if where.type == "cuda" else torch.float32)
    if dtype not in validation.DTYPES:
        raise ValueError(f"dtype: expected float32, bfloat16, float16 or float64, got {dtype}")
    counts = sorted(set(TOKENS[where.type] if tokens is None else tokens))
    if not counts:
        raise ValueError("tokens: expected at least one number")
    for count in counts:
        validation.check_size(count, "tokens", "ints")
    # With the kernels also evaluation, and their tiles.
    comparisons = len(shapes) * (2 + len(counts) * (1 if where.type == "cpu" else 2))
    comparisons += 0 if where.type == "cpu" else _TILE_QUESTIONS
    each = seconds / comparisons
    path = choices.table_path(where, dtype)
    before, _ = choices.read_table(path, where)
    layers: dict[str, Any] = {} if before is None else before["layers"]
    table = {
        "format": choices.FORMAT, "device": choices.device_name(where), "dtype": str(dtype).removeprefix("torch."),
        "versions": choices.versions(where), "measured": time.strftime("%Y-%m-%d"), "layers": layers,
        "tiles": {} if before is None else before.get("tiles", {}),
    }  # fmt: skip
    wrong: dict[str, str] = {}
    try:
        with _progress(comparisons, progress) as advance:
            for shape in shapes:
                name, layer = _made(shape, dtype, where, quantised.get(shape))
                layers[name] = _measure(layer, name, counts, each, advance, wrong)
                _write(path, table)  # as they come: a run that is cut short is not lost
            asked: set[str] = set()
            for shape in sorted(shapes, key=math.prod, reverse=True):  # a question is the same for many shapes
                name, layer = _made(shape, dtype, where, quantised.get(shape))
                if "fused" in layer.ways() and f"{name}, fused" not in wrong:
                    for key, times, best in tiles.tuned(layer, counts, each, asked):
                        layers[name]["microseconds"][key] = _microseconds(times)
                        table["tiles"] |= {key: best} if best else {}
                        advance(f"{name}: {key}")
                        _write(path, table)
    finally:
        choices.forget()
    return Tuned(path, table, wrong)


def _made(shape: Shape, dtype: torch.dtype, where: torch.device, base: nn.Module | None) -> tuple[str, Layer]:
    """The name in the table and the layer of a shape, whose base layer is quantised unless it is None."""
    if base is None:
        return choices.key_of(*shape), Layer(shape, dtype, where)
    return f"{choices.key_of(*shape)} {type(base).__name__}", QuantisedLayer(shape, dtype, where, base)


def _measure(
    layer: Layer, name: str, tokens: list[int], each: float, advance: Callable[[str], None], wrong: dict[str, str]
) -> dict[str, Any]:
    found: dict[str, Any] = {}
    microseconds: dict[str, Any] = {}

    def times(what: str, calls: dict[str, Callable[[], object]]) -> dict[str, float]:
        timed = in_turns(calls, layer.device, each) if len(calls) > 1 else {}
        microseconds[what] = _microseconds(timed)
        advance(f"{name}: {what}")
        return timed

    norms = layer.norms()
    for form, call in list(norms.items()):
        if reason := layer.wrong_norm(call):
            wrong[f"{name}, {form} norm"] = reason
            del norms[form]
    if norms and (timed := times("norm", norms)):
        found["norm"] = min(timed, key=lambda form: timed[form])
    ways = []
    for way in layer.ways():
        if reason := layer.wrong(way):
            wrong[f"{name}, {way}"] = reason
        else:
            ways.append(way)
    refresh = times("once per step", layer.refreshes(ways))
    steps = [way for way in ways if way != "one pass"]
    training = {count: times(f"training, {count} tokens", layer.calls(steps, count, True)) for count in tokens}
    if "fused" in ways:
        evaluation = {}
        for count in tokens:
            kinds = [way for way in ways if way != "merged" and (way != "one pass" or count <= ONE_PASS_TOKENS)]
            evaluation[count] = times(f"evaluation, {count} tokens", layer.calls(kinds, count, False))
        if "one pass" in ways:
            found["one_pass_to_tokens"] = _last(evaluation, "one pass", "fused")
        if "formula" in ways:
            best = {count: {**each, "fused": min(each["fused"], each.get("one pass", math.inf))}
                    for count, each in evaluation.items() if each}  # fmt: skip
            found["fused_from_tokens"] = {
                "training": _first(training, "fused", ["formula"], {}),
                "evaluation": _first(best, "fused", ["formula"], {}),
            }
    others = [way for way in steps if way != "merged"]
    if "merged" in ways and others:
        found["merged_from_tokens"] = _first(training, "merged", others, refresh)
    return {**found, "microseconds": microseconds}


def _microseconds(times: dict[str, float]) -> dict[str, float]:
    return {name: round(1e6 * value, 1) for name, value in times.items()}


def _last(measured: dict[int, dict[str, float]], way: str, other: str) -> int:
    """The most tokens up to which `way` is the faster one at every number measured with it; 0 if at none."""
    last = 0
    for count in sorted(measured):
        times = measured[count]
        if way not in times or times[way] >= times[other]:
            break
        last = count
    return last


def _first(measured: dict[int, dict[str, float]], way: str, others: list[str], once: dict[str, float]) -> int | None:
    """The fewest tokens from which on `way` is the fastest at every number measured, what a step does once included."""
    first = None
    for count in sorted(measured, reverse=True):
        total = {name: value + once.get(name, 0.0) for name, value in measured[count].items()}
        if way not in total or total[way] >= min(total[other] for other in others):
            break
        first = count
    return first


@contextmanager
def _progress(total: int, wanted: bool) -> Iterator[Callable[[str], None]]:
    if not wanted:
        yield lambda text: None
        return
    if not sys.stderr.isatty() or importlib.util.find_spec("rich") is None:
        done = iter(range(1, total + 1))
        yield lambda text: print(f"{next(done, total)}/{total} {text}", file=sys.stderr)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("checking", total=total)
        yield lambda text: bar.update(task, advance=1, description=text)


def _write(path: Path, table: dict[str, Any]) -> None:
    """Write through a temporary name: a table is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        temporary.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
