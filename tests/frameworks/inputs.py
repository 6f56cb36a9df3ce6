"""A tiny random Llama with a tokenizer, and a small data set in the shapes that the frameworks read."""

from __future__ import annotations

import json
from pathlib import Path

WORDS = "the a cat dog sat ran on under mat tree quickly slowly and then slept".split()  # noqa: SIM905
TEMPLATE = (
    "{% for message in messages %}<s>{{ message['role'] }} {{ message['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant {% endif %}"
)


def write(folder: Path) -> None:
    """Write ``model/``, ``data/chats/train.jsonl``, ``data/alpaca.json`` and ``data/text.jsonl`` into `folder`."""
    import torch
    from tokenizers import ByteLevelBPETokenizer
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = ByteLevelBPETokenizer()
    sentences = [" ".join(WORDS[(i * k) % len(WORDS)] for i in range(9)) for k in range(1, 17)]
    tokenizer.train_from_iterator(sentences, vocab_size=300, special_tokens=["<pad>", "<s>", "</s>"])
    (folder / "model").mkdir(parents=True)
    tokenizer.save(str(folder / "bpe.json"))
    fast = PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "bpe.json"), pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder / "model")
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(fast), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=1024, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        )
    ).save_pretrained(folder / "model")  # fmt: skip
    data = folder / "data"
    (data / "chats").mkdir(parents=True)
    pairs = [(one, other) for one, other in zip(sentences, sentences[1:] + sentences[:1])] * 4
    chats = [{"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]} for q, a in pairs]
    (data / "chats" / "train.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    (data / "alpaca.json").write_text(json.dumps([{"instruction": q, "input": "", "output": a} for q, a in pairs]))
    (data / "text.jsonl").write_text("".join(json.dumps({"text": f"{q} {a}"}) + "\n" for q, a in pairs))
