"""A tokenizer's metadata in a GGUF file: vocabulary, merges, special tokens, and how text is split before merging."""

from __future__ import annotations

import json
from typing import Any

# How Llama 3 and Qwen 2 split text. They differ in how many digits stay together.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# GGUF files name the way text is split; llama.cpp has it built in. Keys: the steps, and True if whole words skip the
# merges.
PRE_TOKENIZERS = {
    (("gpt-2",), False): "gpt-2",
    (("digits", "gpt-2"), False): "smollm",
    ((_WORDS % r"\p{N}{1,3}", "bytes"), True): "llama-bpe",
    ((_WORDS % r"\p{N}", "bytes"), False): "qwen2",
}


def add_tokenizer(writer: Any, tokenizer: Any, rows: int) -> None:
    """Add a fast transformers tokenizer to a `gguf.GGUFWriter`, for an embedding of `rows` rows.

    Only byte-level BPE with one of the ways of splitting in `PRE_TOKENIZERS`. Unicode normalization (Qwen's NFC) cannot
    be stored: llama.cpp does none.

    Raises:
        ValueError: another kind of tokenizer, or a token beyond the embedding.
    """
    import gguf

    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ValueError(f"tokenizer: a {type(tokenizer).__name__} has no tokenizer.json; expected a fast tokenizer")
    state = json.loads(backend.to_str())
    model = state["model"]
    pre = _pre_tokenizer(state)
    tokens = {index: token for token, index in backend.get_vocab(with_added_tokens=True).items()}
    if max(tokens) >= rows:
        raise ValueError(f"tokenizer: token {max(tokens)} has no row in the embedding, which has {rows}")
    added = {entry["id"]: entry["special"] for entry in state["added_tokens"]}
    special, user, unused, normal = (
        gguf.TokenType[name] for name in ("CONTROL", "USER_DEFINED", "UNUSED", "NORMAL")
    )
    types = {index: special if is_special else user for index, is_special in added.items()}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([tokens.get(index, f"[PAD{index}]") for index in range(rows)])
    writer.add_token_types([types.get(index, normal if index in tokens else unused) for index in range(rows)])
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]])
    for kind in ("bos", "eos", "unk", "pad"):
        index = getattr(tokenizer, f"{kind}_token_id", None)
        if index is not None:
            getattr(writer, f"add_{kind}_token_id")(index)
    sample = tokenizer("a")["input_ids"]
    writer.add_add_bos_token(len(sample) > 1 and sample[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(len(sample) > 1 and sample[-1] == tokenizer.eos_token_id)
    writer.add_add_space_prefix(False)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def _pre_tokenizer(state: dict[str, Any]) -> str:
    """GGUF's name for the way in which this tokenizer.json splits text."""
    model = state["model"]
    kind = model["type"]
    if kind != "BPE" or model.get("byte_fallback"):
        what = "BPE with byte fallback (SentencePiece)" if kind == "BPE" else kind
        raise ValueError(f"tokenizer: expected byte-level BPE, got {what}")
    normalizer = (state.get("normalizer") or {}).get("type")
    steps = tuple(_steps(state["pre_tokenizer"] or {"type": "none"}))
    name = PRE_TOKENIZERS.get((steps, bool(model.get("ignore_merges"))))
    if name is None or normalizer not in (None, "NFC"):
        raise ValueError(
            f"tokenizer: no GGUF name is known for text normalized by {normalizer} and split by {list(steps)}; "
            f"known: {', '.join(PRE_TOKENIZERS.values())}"
        )
    return name


def _steps(node: dict[str, Any]) -> list[str]:
    kind = node["type"]
    if kind == "Sequence":
        return [step for part in node["pretokenizers"] for step in _steps(part)]
    if kind == "ByteLevel" and not node["add_prefix_space"]:
        return ["gpt-2" if node["use_regex"] else "bytes"]
    if kind == "Digits" and node["individual_digits"]:
        return ["digits"]
    if kind == "Split" and node["behavior"] == "Isolated" and not node["invert"]:
        return [node["pattern"].get("Regex", "a string")]
    return [json.dumps(node)]
