"""The tables and figures of README.md and docs/benchmarks.md, from the newest records in bench/results."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench import record, show
from bench.machine import REPOSITORY
from bench.providers import LABELS
from bench.record import Record, commit_of, disturbed, machine_of

RESULTS = REPOSITORY / "bench" / "results"
FIGURES = REPOSITORY / "docs" / "figures"
DRAWN = {
    "roofline": ("run", "Kernels under the measured ceilings"),
    "memory": ("run", "Peak memory of a layer's optimizer step"),
    "model": ("run", "Step, token and memory of SmolLM2-135M"),
    "growth": ("growth", "Milliseconds of an optimizer step over tokens, rank and hidden size"),
    "curves": ("finetune", "Losses, and how far ours is from stock"),
    "classify": ("classify", "Accuracy by rank"),
}
"""Of each figure, the kind of record that it is drawn from and the table that it stands below, and what it shows."""
def newest(kind: str) -> dict[str, list[Record]]:
    """The records of a kind from its newest day, by machine: a name is the date, the kind, more words, the machine."""
    found: dict[str, list[Path]] = {}
    for path in sorted(RESULTS.glob(f"*-{kind}-*.json")):
        paths = found.setdefault(path.stem.rsplit("-", 1)[1], [])
        if paths and paths[0].name[:10] != path.name[:10]:
            paths.clear()
        paths.append(path)
    read = record.read_json if kind == "demo" else record.read
    return {machine: [read(path) for path in paths] for machine, paths in found.items()}


def documents() -> dict[Path, str]:
    """Every document with its tables rendered anew."""
    texts: dict[Path, str] = {}
    for name, (document, kind, render) in TABLES.items():
        path = REPOSITORY / document
        text = texts.get(path) or path.read_text(encoding="utf-8")
        begin, end = f"<!-- {name}: rendered by `python -m bench report` -->", f"<!-- {name}: end -->"
        before, rest = text.split(begin)
        parts = []
        for machine, results in newest(kind).items():
            shown = [f"![{what}](figures/{one}-{machine}.svg)" for one, (table, what) in DRAWN.items() if table == name]
            parts.append("\n\n".join([render(results), *shown]))
        rendered = "\n\n".join(parts) or "Not measured yet."
        texts[path] = f"{before}{begin}\n{rendered}\n{end}{rest.split(end)[1]}"
    return texts


def figures() -> dict[Path, Any]:
    """Every figure drawn anew, by its path."""
    from bench import plots

    drawn: dict[Path, Any] = {}
    for kind in dict.fromkeys(kind for kind, _ in DRAWN.values()):
        names = [name for name, (source, _) in DRAWN.items() if source == kind]
        for machine, found in newest(kind).items():
            for name, figure in plots.draw(plots.merged(found), names).items():
                drawn[FIGURES / f"{name}-{machine}.svg"] = figure
    return drawn


def write(texts: dict[Path, str], drawn: dict[Path, Any]) -> list[Path]:
    """Documents and figures; what was written."""
    from bench import plots

    FIGURES.mkdir(exist_ok=True)
    written = plots.write(drawn)
    for path, text in texts.items():
        record.replace(path, text)
    return [*written, *texts]


def demo_table(results: Sequence[Record]) -> str:
    """The demo's three runs and two controls."""
    result = results[0]
    sheet = show.demo(result)
    table = _markdown(sheet.head, _bold(sheet), "l" + "r" * (len(sheet.head) - 2) + "l")
    hardware, versions, settings = result["hardware"], result["versions"], result["settings"]
    place = hardware["gpu"] or f"{hardware['cpu']}, {hardware['threads']} threads"
    note = (
        f"{settings['model']}, all linear layers, rank {settings['rank']}, float32, on {place}; torch "
        f"{versions['torch']}, peft {versions['peft']}; commit {commit_of(result)}, {result['date']}; ratios are "
        "medians over steps run in turn, in one process."
    )
    return f"{table}\n\n{note}"


def norm_table(results: Sequence[Record]) -> str:
    """PEFT's norm over ours, and ours in milliseconds."""
    result = results[0]
    found = {(row["dtypes"], tuple(row["shape"]), row["rank"], row["provider"]): row for row in result["rows"]}
    ranks = sorted({row["rank"] for row in result["rows"]})
    rows = []
    for dtypes, shape in dict.fromkeys(key[:2] for key in found):
        cells = []
        for rank in ranks:
            ours, peft = (found[dtypes, shape, rank, provider] for provider in ("ours", "peft_dora"))
            cells.append(f"{peft['ratios']['ours']:.1f}× ({ours['us'] / 1e3:.1f} ms)")
        rows.append([dtypes, "x".join(map(str, shape)), *cells])
    note = (
        f"{place([result])}; medians over calls made in turn, in one process, W not in the cache. Largest errors "
        f"against float64, relative: ours {_largest(result, 'ours')}, PEFT's {_largest(result, 'peft_dora')}."
    )
    head = ["W and adapters", "shape", *(f"rank {rank}" for rank in ranks)]
    return _markdown(head, rows, "ll" + "r" * len(ranks)) + "\n\n" + note


def layer_table(results: Sequence[Record]) -> str:
    """Steps and inference over PEFT's LoRA: ours, and PEFT's DoRA in brackets."""
    ratios: dict[tuple[str, int, str], dict[int, dict[str, float]]] = {}
    words = {
        "step": "step of {} tokens", "step of 4": "step of {} tokens four times", "inference": "inference, {} token(s)",
    }  # fmt: skip
    rows = [row for result in results for row in result["rows"]]
    for row in rows:
        if row["part"] in words:
            key = row["dtypes"], row["shape"][0], words[row["part"]].format(row["tokens"])
            ratios.setdefault(key, {}).setdefault(row["rank"], {})[row["provider"]] = row["ratios"]["peft_lora"]
    ranks = sorted({row["rank"] for row in rows})
    lines = []
    for (dtypes, hidden, label), by_rank in ratios.items():
        cells = [(by_rank[rank]["ours"], by_rank[rank]["peft_dora"]) for rank in ranks]
        lines.append([dtypes, str(hidden), label, *(f"{ours:.2f} ({peft:.2f})" for ours, peft in cells)])
    ours = [row["ratios"]["peft_lora"] for row in rows if row["provider"] == "ours" and row["part"] == "step of 4"]
    note = (
        f"{place(results)}; medians over runs made in turn, in one process. Over all steps of four micro-batches the "
        f"geometric mean of ours is {statistics.geometric_mean(ours):.3f}."
    )
    head = ["dtypes", "hidden", "", *(f"rank {rank}" for rank in ranks)]
    return _markdown(head, lines, "lrl" + "r" * len(ranks)) + "\n\n" + note


def providers_table(results: Sequence[Record]) -> str:
    """Everyone beside PEFT's LoRA, from the run of all suites."""
    result = results[0]
    columns = {
        ("layer", "forward and backward"): "forward and backward",
        ("layer", "step"): "optimizer step",
        ("decode", "inference"): "one token",
        ("host", "inference"): "tiny layer",
    }
    found = {(row["suite"], row["part"], row["provider"]): row for row in result["rows"]}
    rows = []
    for name in LABELS:
        cells = []
        for suite, part in columns:
            row = found.get((suite, part, name))
            cells.append("" if row is None else f"{row['ratios']['peft_lora']:.2f} ({show.duration(row['us'])})")
        peak = found.get(("memory", "step", name))
        if any(cells):
            label = f"**{LABELS[name]}**" if name == "ours" else LABELS[name]
            rows.append([label, *cells, "" if peak is None else f"{peak['peak_bytes'] / 2**20:.1f} MiB"])
    cases = {row["suite"]: row["case"] for row in result["rows"]}
    note = (
        "Times over those of PEFT's plain LoRA; in brackets, the times. \"Forward and backward\" reuses a kept norm, "
        "as the further micro-batches of a step do; \"optimizer step\" is one micro-batch and includes computing it. "
        f"Training: {cases['layer']}; one token: "
        f"{cases['decode']}; tiny layer, one call in evaluation: {cases['host']}; peak memory of an optimizer step: "
        f"{cases['memory']}. {place([result])}."
    )
    head = ["provider", *columns.values(), "peak memory"]
    return _markdown(head, rows, "l" + "r" * (len(head) - 1)) + "\n\n" + note


def run_tables(results: Sequence[Record]) -> str:
    """All tables of the run of all suites."""
    result = results[0]
    ceilings = ", ".join(show.ceiling(name, value) for name, value in result["ceilings"].items())
    where = f"{place([result])}; measured there: {ceilings}."
    return f"{where}\n\n{_sheets(show.tables(result))}"


def growth_note(results: Sequence[Record]) -> str:
    """Where the picture was measured."""
    return f"{place(results)}."


def finetune_table(results: Sequence[Record]) -> str:
    """Learning curves of three implementations, and what lies between two of them and between two seeds."""
    curves = [curve for one in results for curve in one["curves"]]
    found = show.gaps(curves)
    rows = [
        [what, _small(found[f"{what}, ours to stock"]), _small(found[f"{what}, seed to seed"])]
        for what in ("loss", "held-out loss", "held-out accuracy")
    ]
    head = ["difference", "ours to stock, at most", "stock, seed to seed, at least"]
    note = f"{len(curves[0]['losses'])} steps of {curves[0]['tokens']} tokens; {place(results)}."
    return "\n\n".join([_sheet(show.quality(curves)), _markdown(head, rows, "lrr"), note])


def merged_table(results: Sequence[Record]) -> str:
    """Learning curves of the merged forward in 16 bits beside stock's, and what lies between two seeds of stock."""
    curves = [curve for one in results for curve in one["curves"]]
    found = show.gaps(curves, provider="ours_merged")
    of = {(curve["provider"], curve["seed"]): curve for curve in curves}
    pairs = [(of["ours_merged", seed], of["peft_dora", seed]) for seed in sorted({seed for _, seed in of})]
    measures: dict[str, Callable[[Record], float]] = {
        "loss": lambda curve: statistics.fmean(curve["losses"]), "last losses": show.last,
        "held-out loss": lambda curve: float(curve["held_out"]),
        "held-out accuracy": lambda curve: float(curve["accuracy"]),
    }  # fmt: skip
    words = {"loss": "loss of a step", "last losses": f"mean of the last {show.LAST} losses"}
    rows = []
    for what, measure in measures.items():
        apart = statistics.fmean(measure(ours) - measure(stock) for ours, stock in pairs)
        seeds = f"{found[f'{what}, seed to seed']:.1e} – {found[f'{what}, seed to seed, at most']:.1e}"
        rows.append([words.get(what, what), f"{apart:+.1e}", _small(found[f"{what}, ours to stock"]), seeds])
    head = ["difference", "merged − stock, mean", "merged to stock, at most", "stock, seed to seed"]
    first = curves[0]
    note = f"{first['dtypes']}, {len(first['losses'])} steps of {first['tokens']} tokens; {place(results)}."
    return "\n\n".join([_sheet(show.quality(curves)), _markdown(head, rows, "lrrr"), note])


def classify_table(results: Sequence[Record]) -> str:
    """LoRA and DoRA at several ranks."""
    curves = [curve for one in results for curve in one["curves"]]
    first = curves[0]
    note = f"{first['examples']} held-out docstrings, {len(first['losses'])} steps; {place(results)}."
    return f"{_sheet(show.quality(curves))}\n\n{note}"


def fidelity_table(results: Sequence[Record]) -> str:
    """Ours over PEFT's error."""
    rows = [row for one in results for row in one["rows"]]
    ours = [sheet for sheet in show.fidelity(rows) if "torch" not in sheet.title]
    return f"{_sheets(ours)}\n\n{place(results)}."


def serve_table(results: Sequence[Record]) -> str:
    """Times over the base model's, and the bank's DoRA over its plain LoRA and PEFT's."""
    found: dict[tuple[str, str], dict[str, dict[str, float]]] = {}
    for row in (row for result in results for row in result["rows"]):
        found.setdefault((row["case"], row["part"]), {})[row["provider"]] = row["ratios"]
    names = ("peft_lora", "ours", "ours_bank_lora", "ours_bank")
    rows = []
    for (case, part), ratios in found.items():
        cells = [f"{ratios[name]['frozen']:.2f}" if name in ratios else "" for name in names]
        ours = ratios.get("ours_bank", {})
        cells += [f"{ours[name]:.2f}" if name in ours else "" for name in ("ours_bank_lora", "peft_lora")]
        rows.append([case, part, *cells])
    head = ["case", "part", *(LABELS[name] for name in names), "bank, DoRA ÷ LoRA", "bank, DoRA ÷ PEFT LoRA"]
    table = _markdown(head, rows, "ll" + "r" * (len(head) - 2))
    return f"Times over those of the base model alone, and two quotients of them.\n\n{table}\n\n{place(results)}."


def experts_table(results: Sequence[Record]) -> str:
    """Times over the frozen layer's, ours over PEFT's LoRA, and peaks of memory."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for row in (row for result in results for row in result["rows"]):
        found.setdefault((row["case"], row["part"]), {})[row["provider"]] = row
    names = ("peft_lora", "parametrized_dora", "ours_lora", "ours")
    lines = []
    for (case, part), rows in found.items():
        cells = [f"{rows[name]['ratios']['frozen']:.2f}" if name in rows else "" for name in names]
        ours, stock = rows.get("ours"), rows.get("peft_lora")
        if ours and stock:
            cells += [f"{ours['ratios']['peft_lora']:.2f}", f"{ours['peak_bytes'] / stock['peak_bytes']:.2f}"]
            cells += [f"{rows['frozen']['peak_bytes'] / stock['peak_bytes']:.2f}" if "frozen" in rows else ""]
        lines.append([case, part, *cells, *[""] * (len(names) + 3 - len(cells))])
    head = [
        "case", "", *(LABELS[name] for name in names), "DoRA ÷ PEFT LoRA", "memory, DoRA ÷ PEFT LoRA",
        "memory, frozen ÷ PEFT LoRA",
    ]  # fmt: skip
    table = _markdown(head, lines, "ll" + "r" * (len(head) - 2))
    return f"Times over those of the frozen experts, and three quotients.\n\n{table}\n\n{place(results)}."


TABLES: dict[str, tuple[str, str, Callable[[Sequence[Record]], str]]] = {
    "demo": ("README.md", "demo", demo_table),
    "providers": ("README.md", "run", providers_table),
    "run": ("docs/benchmarks.md", "run", run_tables),
    "norm": ("docs/benchmarks.md", "norm", norm_table),
    "layer": ("docs/benchmarks.md", "layer", layer_table),
    "growth": ("docs/benchmarks.md", "growth", growth_note),
    "axolotl": ("docs/benchmarks.md", "axolotl", run_tables),
    "finetune": ("docs/benchmarks.md", "finetune", finetune_table),
    "merged": ("docs/merged.md", "merged", merged_table),
    "classify": ("docs/benchmarks.md", "classify", classify_table),
    "fidelity": ("docs/benchmarks.md", "fidelity", fidelity_table),
    "serve": ("docs/serving.md", "serve", serve_table),
    "experts": ("docs/experts.md", "experts", experts_table),
}
"""Of each marker, the document, the kind of record, and what is written there of one machine's records."""


def place(results: Sequence[Record]) -> str:
    """Machine, versions, commit and date."""
    first = results[0]
    hardware, versions = first["hardware"], first["versions"]
    named = [name for name in ("torch", "triton", "peft", "transformers") if name in versions]
    names = ", ".join(f"{name} {versions[name]}" for name in named)
    commits = ", ".join(dict.fromkeys(map(commit_of, results)))
    warnings = map(disturbed, results)
    busy = next((f"; {warning}" for warning in warnings if warning), "")
    return f"{machine_of(hardware)}; {names}; commit {commits}, {first['date']}{busy}"


def _largest(result: Record, provider: str) -> str:
    errors: dict[str, float] = {}
    for row in result["rows"]:
        if row["provider"] == provider:
            errors[row["dtypes"]] = max(errors.get(row["dtypes"], 0.0), *row["errors"].values())
    return ", ".join(f"{error:.0e} ({dtypes})" for dtypes, error in errors.items())


def _sheets(sheets: Sequence[show.Sheet]) -> str:
    return "\n\n".join(_sheet(sheet) for sheet in sheets)


def _bold(sheet: show.Sheet) -> list[list[str]]:
    return [[f"**{cells[0]}**" if kind == "ours" else cells[0], *cells[1:]] for kind, cells in sheet.rows]


def _sheet(sheet: show.Sheet) -> str:
    table = _markdown(sheet.head, _bold(sheet), "l" + "r" * (len(sheet.head) - 1))
    note = f"\n\n{sheet.note[0].upper()}{sheet.note[1:]}." if sheet.note else ""
    return f"{sheet.title[0].upper()}{sheet.title[1:]}\n\n{table}{note}"


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]], align: str) -> str:
    rule = ["---" if side == "l" else "---:" for side in align]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, rule, *rows))


def _small(value: float) -> str:
    return f"{value:.1e}"
