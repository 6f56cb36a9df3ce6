"""`dora-kernels inspect`: show the content of an adapter file and suspicious values in it."""

# Annotations are evaluated at once: typer reads them. The commands are made only after typer is known to be installed.

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
from torch import Tensor

from dora_kernels.adapters import Adapter, AdapterLayer, read_adapter
from dora_kernels.checkpoints.checkpoint import Checkpoint, read_for, scales
from dora_kernels.cli.options import AXIS, FROM, PREFIX, SCALING, read_options
from dora_kernels.cli.output import console, errors, progress, say, say_each
from dora_kernels.core.shown import quoted

if TYPE_CHECKING:
    import typer
    from rich.console import Console

# A g outside this range is not from fine-tuning: DoRA changes magnitudes by a few percent.
_FAR = 0.5, 2.0
_BINS = 16
_BAR = 40


def add(app: "typer.Typer") -> None:
    """Add the command."""
    import typer

    @app.command("inspect")
    def inspect_command(
        path: Annotated[Path, typer.Argument(metavar="ADAPTER", help="A safetensors file or its folder, any format.")],
        base: Annotated[
            str,
            typer.Option(metavar="MODEL_DIR", show_default=False, help="Base model, to compute g = magnitude / norm."),
        ] = "",
        source_format: Annotated[str, typer.Option("--from", metavar="FORMAT", help=FROM)] = "auto",
        axis: Annotated[str, typer.Option(metavar="NAME", help=AXIS)] = "auto",
        scaling: Annotated[str, typer.Option(metavar="X", show_default=False, help=SCALING)] = "",
        prefix: Annotated[str, typer.Option(metavar="NAME", show_default=False, help=PREFIX)] = "",
        as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
    ) -> None:
        """Show rank, axis, scaling and norms of an adapter, and suspicious values in it.

        Exit status 2 for a damaged file. Suspicious values are only reported, with status 0.
        """
        with errors():
            found = inspect(path, base, **read_options(source_format, axis, scaling, prefix))
        print(json.dumps(found, indent=2, allow_nan=False)) if as_json else _print(found, console())


def inspect(path: str | Path, base: str | Path = "", **options: Any) -> dict[str, Any]:
    """Return the report of `dora-kernels inspect`, ready for JSON. The options are those of `read_adapter`.

    Raises:
        TypeError, FileNotFoundError, ValueError: as `read_adapter` and `Checkpoint`.
    """
    g: dict[str, Tensor] = {}
    if base:
        checkpoint = Checkpoint(base)
        adapter, keys = read_for(checkpoint, path, **options)
        with progress() as advance:
            for name, scale in scales(checkpoint, adapter, keys):
                if scale is not None:
                    g[name] = scale.double()
                advance(name, len(adapter.layers))
    else:
        adapter = read_adapter(path, **options)
    layers = {name: _layer(layer, g.get(name)) for name, layer in adapter.layers.items()}
    suspicious = _of_all(adapter)
    for name, layer in adapter.layers.items():
        suspicious += [f"{name}: {text}" for text in _suspicious(layer, g.get(name))]
    return {
        "path": str(path),
        "format": adapter.format,
        "notes": adapter.notes,
        "layers": layers,
        "magnitudes": _histogram([each.magnitude for each in adapter.layers.values()
                                  if each.magnitude is not None]),
        "g": _histogram(list(g.values())),
        "suspicious": suspicious,
    }  # fmt: skip


def _layer(layer: AdapterLayer, g: Tensor | None) -> dict[str, Any]:
    found: dict[str, Any] = {
        "kind": layer.kind,
        "features": list(layer.features),
        "rank": layer.rank,
        "scaling": layer.scaling,
        "axis": layer.magnitude_axis if layer.magnitude is not None else None,
        "dtypes": _dtypes(layer),
        "norm_A": _norm(layer.lora_A),
        "norm_B": _norm(layer.lora_B),
    }
    if layer.magnitude is not None:
        found["magnitude"] = _spread(layer.magnitude)
    if g is not None:
        found["g"] = _spread(g)
    return found


def _dtypes(layer: AdapterLayer) -> list[str]:
    tensors = (layer.lora_A, layer.lora_B, layer.magnitude)
    return sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors if tensor is not None})


def _suspicious(layer: AdapterLayer, g: Tensor | None) -> list[str]:
    found = []
    if not bool(layer.lora_B.any()):
        found.append("lora_B is all zero: untrained")
    if not bool(layer.lora_A.any()):
        found.append("lora_A is all zero")
    if layer.magnitude is not None:
        zero, negative = int((layer.magnitude == 0).sum()), int((layer.magnitude < 0).sum())
        found += [f"{count} of {layer.magnitude.numel()} magnitudes are {what}"
                  for count, what in ((zero, "zero"), (negative, "negative")) if count]  # fmt: skip
    far = 0 if g is None else int((~((g.abs() >= _FAR[0]) & (g.abs() <= _FAR[1]))).sum())  # counts NaN too
    if far:
        found.append(f"{far} magnitudes are not within {_FAR[0]:g} to {_FAR[1]:g} times the adapted weight's norm")
    if len(_dtypes(layer)) > 1:
        found.append(f"dtypes are mixed: {', '.join(_dtypes(layer))}")
    return found


def _of_all(adapter: Adapter) -> list[str]:
    """Report mixed dtypes, and ranks that differ from the configuration's if the format does not check them (MLX)."""
    parameters = adapter.config.get("lora_parameters")
    rank = parameters.get("rank") if isinstance(parameters, Mapping) else None
    found = [f"{name}: rank {layer.rank}, the configuration says {quoted(rank)}"
             for name, layer in adapter.layers.items() if rank not in (None, layer.rank)]  # fmt: skip
    dtypes = sorted({str(layer.lora_A.dtype).removeprefix("torch.") for layer in adapter.layers.values()})
    if len(dtypes) > 1:
        found.append(f"layers are of different dtypes: {', '.join(dtypes)}")
    return found


def _norm(values: Tensor) -> float | None:
    """The norm in float64, even if the squares of the values overflow; None if the norm itself does."""
    largest = values.double().abs().max()
    return _finite(largest * (values.double() / largest).norm()) if largest > 0 else 0.0


def _spread(values: Tensor) -> dict[str, float | None]:
    values = values.double()
    return {"min": _finite(values.min()), "median": _finite(values.median()), "max": _finite(values.max())}


def _finite(value: Tensor) -> float | None:
    """The value, or None if JSON cannot hold it."""
    return float(value) if bool(value.isfinite()) else None


def _histogram(values: list[Tensor]) -> dict[str, Any] | None:
    """A histogram of the finite values, as shares of the largest, so that float64 holds any range."""
    every = torch.cat([part.double().flatten().cpu() for part in values]) if values else torch.zeros(0)
    every = every[every.isfinite()]
    if not len(every):
        return None
    largest = float(every.abs().max()) or 1.0
    every = every / largest
    low, high = float(every.min()), float(every.max())
    counts = torch.histc(every, _BINS, low, high) if high > low else torch.tensor([float(len(every))])
    edges = largest * torch.linspace(low, high, len(counts) + 1, dtype=torch.float64)
    return {"edges": edges.tolist(), "counts": [int(count) for count in counts]}


def _print(found: dict[str, Any], output: "Console") -> None:
    from rich.table import Table

    say(output, f"{found['path']}: {found['format']}, {len(found['layers'])} layers")
    say_each(output, "note", found["notes"])
    table = Table(box=None, padding=(0, 2, 0, 0))
    compared = found["g"] is not None
    table.add_column("layer", overflow="fold", min_width=12)
    for heading in ("kind", "rank", "scaling", "axis", "|A|", "|B|", "magnitude", *(("g",) if compared else ())):
        table.add_column(heading, no_wrap=True)
    for name, layer in sorted(found["layers"].items(), key=lambda item: _in_order(item[0])):
        cells = [layer["kind"], str(layer["rank"]), f"{layer['scaling']:g}", layer["axis"] or "none"]
        cells += [_short(layer["norm_A"]), _short(layer["norm_B"]), _three(layer.get("magnitude"))]
        table.add_row(name, *cells, *((_three(layer.get("g")),) if compared else ()))
    output.print(table, soft_wrap=True)
    for title, histogram in (("magnitudes", found["magnitudes"]), ("g = magnitude / norm", found["g"])):
        if histogram is not None:
            output.print(f"\n{title}:")
            most, block = max(histogram["counts"]), "█" if output.encoding.startswith("utf") else "#"
            for count, low, high in zip(histogram["counts"], histogram["edges"], histogram["edges"][1:]):
                bar = block * max(1 if count else 0, round(_BAR * count / most))
                output.print(f"{low:>10.4g} to {high:<10.4g} {count:>8} {bar}".rstrip())
    say_each(output, "suspicious", found["suspicious"])


def _three(spread: Mapping[str, float | None] | None) -> str:
    return "none" if spread is None else " / ".join(_short(spread[name]) for name in ("min", "median", "max"))


def _short(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.3g}"


def _in_order(name: str) -> list[tuple[int, str]]:
    """Sort key that puts layer 2 before layer 10."""
    return [(int(part) if part.isdecimal() else -1, part) for part in name.split(".")]
