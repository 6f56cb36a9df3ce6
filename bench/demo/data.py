"""Real prose, split into training and held-out tokens."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.demo.settings import DemoError

HELD_OUT_SHARE = 0.1
FEWEST_PIECES = 20
PROMPT_TOKENS = 24


@dataclass(frozen=True)
class Corpus:
    """Token ids of the text, whose two parts share no paragraph, and a prompt for samples."""

    name: str
    train: torch.Tensor
    held_out: torch.Tensor
    prompt: torch.Tensor

    def batches(self, length: int, steps: int, seed: int) -> list[torch.Tensor]:
        """`[1, length]` training batches in a fixed random order."""
        windows = self.train[: len(self.train) // length * length].view(-1, 1, length)
        order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))
        return [windows[order[step % len(order)]] for step in range(steps)]

    def windows(self, length: int, count: int) -> list[torch.Tensor]:
        """Up to `count` held-out `[1, length]` windows, spread over the held-out part."""
        windows = self.held_out[: len(self.held_out) // length * length].view(-1, 1, length)
        stride = max(1, len(windows) // count)
        return [window.clone() for window in windows[::stride][:count]]


def read_text(path: Path | None) -> tuple[str, str]:
    """Name and text of the corpus: a file, or the language reference every Python carries."""
    if path is None:
        from pydoc_data.topics import topics

        return "pydoc_data.topics", "\n\n".join(topics[key] for key in sorted(topics))
    try:
        return path.name, path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DemoError(f"--data: {path} is not UTF-8 text ({error.reason})") from error
    except OSError as error:
        raise DemoError(f"--data: cannot read {path} ({error.strerror})") from error


def pieces(text: str) -> tuple[str, list[str]]:
    """Separator and paragraphs, or lines, or plain slices where there are too few of those.

    Repeats are dropped, so that none is both trained on and held out.
    """
    for separator in ("\n\n", "\n"):
        parts = list(dict.fromkeys(part for part in text.split(separator) if part.strip()))
        if len(parts) >= FEWEST_PIECES:
            return separator, parts
    size = max(1, -(-len(text) // FEWEST_PIECES))
    return "", [text[start : start + size] for start in range(0, len(text), size)]


def first_prose(paragraphs: list[str]) -> str:
    """The first paragraph that reads like a sentence, not like code or a heading."""
    for paragraph in paragraphs:
        if len(paragraph.split()) >= 2 * PROMPT_TOKENS and paragraph[:1].isupper():
            return paragraph
    return " ".join(paragraphs)


def make_corpus(name: str, text: str, tokenizer: Any, length: int) -> Corpus:
    """Tokenise `text`; the last tenth of its paragraphs, by size, is held out."""
    separator, paragraphs = pieces(text)
    limit = (1 - HELD_OUT_SHARE) * sum(map(len, paragraphs))
    split, size = 0, 0
    while split < len(paragraphs) and size + len(paragraphs[split]) <= limit:
        size += len(paragraphs[split])
        split += 1

    def encode(part: str) -> torch.Tensor:
        ids = tokenizer(part, add_special_tokens=False)["input_ids"]
        return torch.tensor(ids, dtype=torch.long)

    train, held_out = (encode(separator.join(part)) for part in (paragraphs[:split], paragraphs[split:]))
    if len(train) < 4 * length or len(held_out) < length:
        raise DemoError(
            f"--data: {name} is too short: {len(train)} training and {len(held_out)} held-out "
            f"tokens, at least {4 * length} and {length} are needed"
        )
    prompt = encode(" ".join(first_prose(paragraphs[split:]).split()))[None, :PROMPT_TOKENS]
    return Corpus(name, train, held_out, prompt)
