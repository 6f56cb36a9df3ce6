"""Learning curves: SmolLM2-135M fine-tuned on real prose by stock DoRA, patched DoRA and LoRA, from several seeds.

Each seed gives A other numbers; the batches stay the same, so that the seeds differ as little as they can and the
comparison is the harder to pass: at every step, and on held-out text, the patched model has to be nearer to the stock
one of the same seed than two seeds of the stock model are to each other.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch

from bench import show
from bench.demo import data, train
from bench.demo import model as models
from bench.demo.settings import Settings
from bench.problem import DTYPES
from bench.providers import LABELS, Missing
from bench.record import significant

if TYPE_CHECKING:
    from bench.run import Run

PROVIDERS = ("peft_dora", "ours", "peft_lora")
KINDS = {"peft_dora": "stock", "ours": "patched", "peft_lora": "lora"}
"""What `bench.demo` calls them."""
RANK = 16
TOKENS = 128
WINDOWS = 12
"""Of held-out text, 256 tokens each."""
DIGITS = 9


def stages(run: Run) -> Iterator[tuple[str, Callable[[], None]]]:
    """One seed after another, with the last the comparison."""
    trainings = list(itertools.product(run.given.ranks or [RANK], run.given.seeds))
    for rank, seed in trainings:

        def work(rank: int = rank, seed: int = seed) -> None:
            _train(run, rank, seed)
            if (rank, seed) == trainings[-1]:
                compare(run, "finetune")

        yield f"finetune: rank {rank}, seed {seed}", work


def settings(run: Run, rank: int = RANK, seed: int = 0) -> Settings:
    """Of the demo's machinery, for this run."""
    return Settings(rank=rank, lr=5e-4, out=run.given.folder, seed=seed)


def load(run: Run) -> tuple[Any, Any, data.Corpus]:
    """Base model, tokenizer and text, converted once and kept."""
    if "finetune" not in run.shared:
        given = settings(run)
        try:
            source = models.prepare(given)
        except (models.DemoError, ImportError) as reason:
            raise Missing(str(reason)) from reason
        base, tokenizer = models.load(source).to(run.device), models.load_tokenizer(source)
        run.shared["finetune"] = base, tokenizer, data.make_corpus(*data.read_text(None), tokenizer, 256)
    return run.shared["finetune"]


def adapted(run: Run, provider: str, rank: int, seed: int, dtypes: str = "fp32") -> Any:
    """A provider's model, its A drawn from the seed."""
    base_dtype, adapter_dtype = DTYPES[dtypes]
    base, name = load(run)[0], f"finetune, {base_dtype}"
    if base_dtype != torch.float32:
        if name not in run.shared:
            run.shared[name] = copy.deepcopy(base).to(base_dtype)
        base = run.shared[name]
    model = models.adapt(base, KINDS[provider], settings(run, rank, seed))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(adapter_dtype)
    if provider == "ours":
        handle = models.patch(model)
        if handle.skipped:
            raise RuntimeError(f"patch_peft skipped {handle.skipped}")
    return model


def _train(run: Run, rank: int, seed: int) -> None:
    _, _, corpus = load(run)
    given = settings(run, rank, seed)
    trained = {
        name: train.make_run(KINDS[name], adapted(run, name, rank, seed), given) for name in run.chosen(PROVIDERS)
    }
    windows = [window.to(run.device) for window in corpus.windows(256, WINDOWS)]
    before = {name: _held_out(one.model, windows) for name, one in trained.items()}
    orders = list(itertools.permutations(trained.values()))
    steps = run.given.steps
    for step, batch in enumerate(corpus.batches(TOKENS, steps, seed=0)):
        for one in orders[step % len(orders)]:
            train.train_step(one, batch.to(run.device), step)
        run.advance(step + 1, steps)
    for name, one in trained.items():
        after = _held_out(one.model, windows)
        run.record["curves"].append({
            "suite": "finetune", "provider": name, "rank": rank, "seed": seed, "tokens": TOKENS, "dtypes": "fp32",
            "losses": [significant(loss, DIGITS) for loss in one.losses],
            "held_out_before": significant(before[name][0], DIGITS), "held_out": significant(after[0], DIGITS),
            "accuracy_before": significant(before[name][1]), "accuracy": significant(after[1]),
            "largest_rescale": models.largest_rescale(one.model),
        })  # fmt: skip


@torch.no_grad()
def _held_out(model: Any, windows: list[torch.Tensor]) -> tuple[float, float]:
    """Mean loss, and the share of next tokens that the model puts first."""
    model.eval()
    losses, hits = [], []
    for window in windows:
        output = model(input_ids=window, labels=window, use_cache=False)
        losses.append(output.loss.item())
        hits.append((output.logits[:, :-1].argmax(-1) == window[:, 1:]).float().mean().item())
    model.train()
    return sum(losses) / len(losses), sum(hits) / len(hits)


def compare(run: Run, suite: str) -> None:
    """A failure if ours is as far from stock as two seeds of stock are from each other."""
    curves = [curve for curve in run.record["curves"] if curve["suite"] == suite]
    if len(run.given.seeds) < 2 or not {"peft_dora", "ours"} <= {curve["provider"] for curve in curves}:
        return
    found = show.gaps(curves, suite)
    for what in ("loss", "held-out loss"):
        ours, seeds = found[f"{what}, ours to stock"], found[f"{what}, seed to seed"]
        if not ours < seeds:
            run.fail(suite, f"{LABELS['ours']}: {what} {ours:.1e} from stock's, seeds differ by {seeds:.1e}")
