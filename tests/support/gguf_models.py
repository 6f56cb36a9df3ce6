"""What the tests of GGUF files share: small models, and tokenizers that cut text in each way that has a name."""

from __future__ import annotations

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from dora_kernels.gguf import tokenizer

# Grouped queries: q and k have different numbers of heads. Heads of 16, so that the order of their rows matters.
SIZES = dict(
    vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=0,
)  # fmt: skip
MODELS = {
    "llama": lambda **more: LlamaForCausalLM(LlamaConfig(**SIZES, **more)),
    "mistral": lambda **more: MistralForCausalLM(MistralConfig(**SIZES, **more)),
    "qwen2": lambda **more: Qwen2ForCausalLM(Qwen2Config(**SIZES, **more)),
}


def random_model(kind="llama", **more):
    torch.manual_seed(5)
    model = MODELS[kind](**more)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.3 if parameter.ndim == 2 else 0.1) + ("norm" in name))
    return model.eval()


def byte_level(*steps, ignore_merges=False):
    """A tokenizer that cuts text by `steps`, then merges bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(["<|bos|>", "<|eos|>", *alphabet, "th", "the", "Ġthe", "12"])}
    merges = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("1", "2")]
    backend = Tokenizer(models.BPE(vocab, merges, ignore_merges=ignore_merges))
    backend.pre_tokenizer = pre_tokenizers.Sequence(list(steps))
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<|bos|>", eos_token="<|eos|>")


def words(regex):
    return [pre_tokenizers.Split(Regex(regex), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]


REGEXES = {name: steps[0] for (steps, _), name in tokenizer.PRE_TOKENIZERS.items()}
WAYS = {
    "gpt-2": lambda: byte_level(pre_tokenizers.ByteLevel(False)),
    "smollm": lambda: byte_level(pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(False)),
    "llama-bpe": lambda: byte_level(*words(REGEXES["llama-bpe"]), ignore_merges=True),
    "qwen2": lambda: byte_level(*words(REGEXES["qwen2"])),
}
