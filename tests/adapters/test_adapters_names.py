"""What is said of a name that the model has not: the nearest that it has, and what the names differ in."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dora_kernels import Adapter, attach, combine_adapters, load_adapter, read_adapter, save_adapter
from dora_kernels.adapters import AdapterLayer
from dora_kernels.adapters.names import proposal

pytest.importorskip("safetensors")


def model(start=""):
    built: nn.Module = nn.ModuleDict({"layers": nn.ModuleList(
        nn.ModuleDict({"self_attn": nn.ModuleDict({"q_proj": nn.Linear(6, 6), "k_proj": nn.Linear(6, 6)})})
        for _ in range(2)
    )})  # fmt: skip
    for part in reversed(start.split(".") if start else []):
        built = nn.ModuleDict({part: built})
    return built


def adapter(name):
    return Adapter({name: AdapterLayer("linear", torch.ones(1, 6), torch.ones(6, 1), torch.ones(6), 1.0)})


Q = "layers.1.self_attn.q_proj"


@pytest.mark.parametrize(
    "start, name, said",
    [
        ("", "layers.1.self_attn.q_prj", f"the nearest is {Q}"),
        ("", "layers.9.self_attn.q_proj", "the nearest is layers.[01].self_attn.q_proj"),
        ("model", Q, f"it has model.{Q}: the model's names start with 'model.', the adapter's do not"),
        ("model.language_model", Q, "the model's names start with 'model.language_model.', the adapter's do not"),
        ("", f"model.{Q}", f"it has {Q}: the adapter's names start with 'model.', the model's do not"),
        ("", "zzz", "it has layers.0.self_attn.k_proj, layers.0.self_attn.q_proj and 2 more"),
    ],
)
def test_the_nearest_name(tmp_path, start, name, said):
    """Everywhere that names are compared."""
    whole = adapter(name)
    save_adapter(whole, tmp_path / "peft")
    for call in (
        lambda: attach(model(start), whole),
        lambda: load_adapter(tmp_path / "peft", model(start)),
        lambda: read_adapter(tmp_path / "peft", model(start).state_dict()),
        lambda: combine_adapters(model(start), [whole], [1.0]),
    ):
        with pytest.raises(ValueError, match=f"{name}: the model has no such layer; .*{said}"):
            call()


def test_names_with_underscores(tmp_path):
    save_adapter(adapter(Q), tmp_path / "file.safetensors", format="kohya")
    with pytest.raises(ValueError, match="q_proj: the model has no such layer; it has model.lay.*start with 'model.'"):
        read_adapter(tmp_path / "file.safetensors", model("model"))


TOWER = "model.language_model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    "file, own",
    [
        ("text_model.encoder.layers.0.self_attn.q_proj", "encoder.layers.0.self_attn.q_proj"),
        ("encoder.layers.0.self_attn.q_proj", "text_model.encoder.layers.0.self_attn.q_proj"),
        ("language_model.model.layers.0.self_attn.q_proj", TOWER),
        ("model.layers.0.self_attn.q_proj", TOWER),
        (TOWER, "language_model.model.layers.0.self_attn.q_proj"),
        (TOWER, "model.layers.0.self_attn.q_proj"),
        ("visual.blocks.0.attn.qkv", "model.visual.blocks.0.attn.qkv"),
    ],
)
def test_names_of_another_release_of_transformers(tmp_path, file, own):
    """In PEFT's files, too, as long as all fit in one way."""

    def built(name):
        layer: nn.Module = nn.Linear(6, 6)
        for part in reversed(name.split(".")):
            layer = nn.ModuleDict({part: layer})
        return layer

    save_adapter(adapter(file), tmp_path)
    read = load_adapter(tmp_path, built(own))
    assert list(read.layers) == [own]
    assert read.notes == [f"names like {file} were read as names like {own}, which this model has"]
    assert attach(built(own), read_adapter(tmp_path)) == [own]
    both = adapter(file)
    both.layers["other"] = both.layers[file]
    save_adapter(both, tmp_path, force=True)
    with pytest.raises(ValueError, match="the model has no such layer"):
        read_adapter(tmp_path, built(own))


def test_bounded_work(monkeypatch):
    """Of names of any length and models of any size."""
    import difflib

    compared = []

    def matches(word, possibilities, *options):
        compared.append((len(word), len(possibilities)))
        return []

    monkeypatch.setattr(difflib, "get_close_matches", matches)
    known = [f"layers.{i}.q_proj" for i in range(50_000)]
    proposal("layers.x.q_proj", known)
    proposal("x" * 40_000, known)
    proposal("layers.x.q_prj", known)
    assert all(length <= 200 and count <= 500 for length, count in compared) and compared
