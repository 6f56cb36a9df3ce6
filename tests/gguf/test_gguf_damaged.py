"""GGUF files that are damaged: one ValueError with the file's name, in bounded time."""

from __future__ import annotations

import random
import re
import struct

import pytest
import torch

pytest.importorskip("gguf")
pytest.importorskip("transformers")

import transformers
from test_gguf import layer

from dora_kernels.adapters import Adapter
from dora_kernels.gguf import export_adapter, read_adapter
from dora_kernels.gguf.header import MOST


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    file = tmp_path_factory.mktemp("gguf") / "a.gguf"
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    )
    names = {"model.layers.0.self_attn.q_proj": (64, 64), "model.layers.1.mlp.down_proj": (64, 96)}
    export_adapter(Adapter({name: layer(*sizes) for name, sizes in names.items()}), file, base=config)
    return file.read_bytes()


def refused(file, content, message=""):
    file.write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(f"{file}: ") + message):
        read_adapter(file)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("count", [2**20, 2**33, 2**63])
def test_counts_beyond_the_file(tmp_path, whole, count):
    """The package's reader goes on beyond the end, without end."""
    file = tmp_path / "a.gguf"
    for at, what in ((8, "tensors"), (16, "values")):
        refused(file, whole[:at] + struct.pack("<Q", count) + whole[at + 8 :], f"truncated, .*: {count} {what}")
    key = whole.index(b"adapter.dora.scaling") + len(b"adapter.dora.scaling") + 8
    assert whole[key : key + 8] == struct.pack("<Q", 2)
    changed = whole[:key] + struct.pack("<Q", count) + whole[key + 8 :]
    refused(file, changed, f"truncated, .*: {count} elements")
    refused(file, whole[:key] + struct.pack("<Q", MOST // 2) + whole[key + 8 :], "truncated, .*: it ends inside its")
    name = whole.index(b"blk.0.attn_q.weight.lora_a")
    changed = whole[: name - 8] + struct.pack("<Q", count) + whole[name:]
    refused(file, changed, f"truncated, .*: a text of {count} bytes")


@pytest.mark.timeout(120)
def test_shapes_and_numbers(tmp_path, whole):
    file = tmp_path / "a.gguf"
    name = b"blk.0.attn_q.weight.lora_a"
    at = whole.index(name) + len(name)
    for sizes in ((2**62, 2**62), (0, 2**62), (2**40, 1)):
        refused(file, whole[: at + 4] + struct.pack("<QQ", *sizes) + whole[at + 20 :], "truncated, .*larger than the")
    refused(file, whole[:at] + struct.pack("<I", 2**31) + whole[at + 4 :], "truncated, .*a tensor of 2147483648 dim")
    for key, number in (("block_count", 2**31 - 1), ("attention.head_count", 0), ("attention.head_count", 7)):
        found = whole.index(f"llama.{key}".encode()) + len(f"llama.{key}") + 4
        refused(file, whole[:found] + struct.pack("<I", number) + whole[found + 4 :], f"llama.{key}|blk.0.attn_q")
    refused(file, whole.replace(b"llama", b"\x1bzama"), r"general.architecture: expected .*, got '\\x1bzama'")
    refused(file, b"", "truncated")
    refused(file, whole[:-1], "truncated")


@pytest.mark.timeout(300)
def test_random_damage(tmp_path, whole):
    """A ValueError or an adapter, whatever bytes are changed or cut off."""
    file, rng = tmp_path / "a.gguf", random.Random(0)
    header = whole.index(b"blk.0.attn_q.weight.lora_a") + 600
    errors = 0
    for _ in range(500):
        content = bytearray(whole)
        for _ in range(rng.randint(1, 3)):
            content[rng.randrange(header)] = rng.choice((0, 1, 2, 7, 8, 9, 127, 128, 255, rng.randrange(256)))
        file.write_bytes(content[: rng.choice((len(content), rng.randrange(len(content))))])
        try:
            adapter = read_adapter(file)
        except ValueError as error:
            assert str(error).startswith(f"{file}: ") and str(error).isprintable() and len(str(error)) < 2000
            errors += 1
        else:
            assert all(torch.isfinite(each.lora_A).all() for each in adapter.layers.values())
    assert errors > 150
