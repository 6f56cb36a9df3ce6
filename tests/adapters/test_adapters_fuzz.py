"""Corrupted files: each is read right or refused with an error of ours, and a refusal leaves the model as it was."""

from __future__ import annotations

import json
import math

import pytest
import torch
from adapter_models import adapter_for
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from dora_kernels import extract, load_adapter, save_adapter
from dora_kernels.adapters import FORMATS
from dora_kernels.adapters.adapter import problem_of

pytest.importorskip("safetensors")
from safetensors.torch import load_file, save_file

NAMES = ["a.b", "c"]


def small():
    torch.manual_seed(0)
    return nn.ModuleDict({"a": nn.ModuleDict({"b": nn.Linear(4, 4)}), "c": nn.Linear(4, 6)})


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A good file of every format."""
    made = {}
    for format in FORMATS:
        made[format] = tmp_path_factory.mktemp(format)
        save_adapter(adapter_for(small(), NAMES, rank=2, scaling=0.5), made[format], format=format)
    return made


def outcome(folder):
    """Load into a model; on an error of ours nothing has changed, otherwise all is sound."""
    model = small()
    modules = dict(model.named_modules())
    state = {name: (p, p.detach().clone(), p.requires_grad) for name, p in model.named_parameters()}
    try:
        adapter = load_adapter(folder, model)
    except (ValueError, FileNotFoundError) as error:
        assert str(folder) in str(error), error
        assert dict(model.named_modules()) == modules
        for name, parameter in model.named_parameters():
            identity, value, trains = state[name]
            assert parameter is identity and torch.equal(parameter, value) and parameter.requires_grad == trains
        return None
    assert set(adapter.layers) <= set(NAMES) and adapter.layers
    for name, layer in adapter.layers.items():
        assert problem_of(layer) is None and math.isfinite(layer.scaling), name
        for tensor in (layer.lora_A, layer.lora_B, layer.magnitude):
            assert tensor is None or (tensor.isfinite().all() and tensor.is_floating_point()), name
    assert extract(model).layers.keys() == adapter.layers.keys()
    return adapter


def corrupted(folder, tmp_path_factory, tensors=None, config=None, content=None):
    """A copy of a folder with its file's bytes, its tensors or its configuration exchanged."""
    new = tmp_path_factory.mktemp("corrupted")
    for file in folder.iterdir():
        (new / file.name).write_bytes(file.read_bytes())
    (file,) = new.glob("*.safetensors")
    if content is not None:
        file.write_bytes(content)
    if tensors is not None:
        save_file({key: tensor.contiguous().clone() for key, tensor in tensors.items()}, file)
    if config is not None:
        (new / "adapter_config.json").write_text(config)
    return new


@pytest.mark.parametrize("format", FORMATS)
@given(data=st.data())
def test_bytes(folders, tmp_path_factory, data, format):
    """Bytes flipped (most of them in the header), cut out, put in."""
    (file,) = folders[format].glob("*.safetensors")
    content = bytearray(file.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, max(0, len(content) - 1)))
        kind = data.draw(st.sampled_from(["flip", "set", "cut", "insert"]))
        if kind == "flip" and content:
            content[at] ^= 1 << data.draw(st.integers(0, 7))
        elif kind == "set" and content:
            content[at] = data.draw(st.sampled_from(list(b'\0\xff"{}[]:,09-.eF')))
        elif kind == "cut":
            del content[at : at + data.draw(st.integers(1, 40))]
        else:
            content[at:at] = data.draw(st.binary(min_size=1, max_size=9))
    outcome(corrupted(folders[format], tmp_path_factory, content=bytes(content)))


DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.uint8, torch.bool,
          torch.complex64, torch.float8_e4m3fn]  # fmt: skip


@pytest.mark.parametrize("format", FORMATS)
@given(data=st.data())
def test_tensors(folders, tmp_path_factory, data, format):
    """Tensors lost, renamed, of other types, shapes and values."""
    (file,) = folders[format].glob("*.safetensors")
    tensors = dict(sorted(load_file(file).items()))
    keys = list(tensors)
    for _ in range(data.draw(st.integers(1, 3))):
        key = data.draw(st.sampled_from(keys))
        if key not in tensors:
            continue
        tensor = tensors[key]
        kind = data.draw(st.sampled_from(["drop", "rename", "dtype", "shape", "value", "more"]))
        if kind == "drop":
            del tensors[key]
        elif kind == "rename":
            cut = data.draw(st.integers(0, len(key)))
            name = data.draw(st.sampled_from([key[cut:], key[:cut], key.upper(), key.replace("_", "."), key + ".x",
                                              key.replace("c.", "a.b."), "x." + key, data.draw(st.sampled_from(keys))]))
            tensors[name or "."] = tensors.pop(key)
        elif kind == "dtype":
            tensors[key] = tensor.float().abs().to(data.draw(st.sampled_from(DTYPES)))
        elif kind == "shape":
            shape = data.draw(st.lists(st.integers(0, 7), max_size=6))
            tensors[key] = torch.ones(shape, dtype=tensor.dtype if tensor.dtype.is_floating_point else torch.float32)
        elif kind == "value" and tensor.numel() and tensor.is_floating_point():
            value = data.draw(st.sampled_from([float("nan"), float("inf"), 0.0, 3e38, -1.0]))
            tensors[key] = tensor.clone().contiguous()
            tensors[key].view(-1)[0] = value
        else:
            tensors[f"{key}{data.draw(st.sampled_from(['.bias', '2', '.default.weight']))}"] = tensor
    outcome(corrupted(folders[format], tmp_path_factory, tensors=tensors))


SIMPLE = st.none() | st.booleans() | st.integers(-3, 9) | st.floats() | st.sampled_from(["", "a", "(", "lora", 10**400])
KEYS = st.sampled_from(["c", "(", "scale", ""])
VALUES = st.recursive(
    SIMPLE, lambda inner: st.lists(inner, max_size=2) | st.dictionaries(KEYS, inner, max_size=2), max_leaves=4
)


@pytest.mark.slow
@pytest.mark.parametrize("format", [name for name, format in FORMATS.items() if format.configured])
@given(data=st.data())
def test_configurations(folders, tmp_path_factory, data, format):
    """Values of any type and size, entries lost, and what is no object."""
    config = json.loads((folders[format] / "adapter_config.json").read_text())
    for _ in range(data.draw(st.integers(1, 3))):
        key = data.draw(st.sampled_from(sorted(config)))
        config[key] = data.draw(VALUES)
        if data.draw(st.booleans()):
            del config[data.draw(st.sampled_from(sorted(config)))]
    whole = json.dumps(config)
    whole = data.draw(st.sampled_from([whole] * 6 + [json.dumps(data.draw(VALUES)), whole[:-9]]))
    outcome(corrupted(folders[format], tmp_path_factory, config=whole))


def test_the_good_files_are_read(folders):
    """Otherwise the others would show nothing."""
    for format, folder in folders.items():
        assert outcome(folder).format == format
