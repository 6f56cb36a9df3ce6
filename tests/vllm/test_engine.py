"""vLLM's own engine serves DoRA adapters mixed with plain LoRA and the base model, token for token as PEFT does."""

from __future__ import annotations

import functools
import importlib.util
import json
import shutil
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed: `make test-vllm` runs the tests with its engine", allow_module_level=True)

from safetensors.torch import load_file, save_file
from vllm_models import PROMPTS, TARGETS, peft_logits, quantise, run_engine, save_adapter, save_model

ADAPTERS: dict[str, Any] = {
    "lora": {"r": 4, "lora_alpha": 8},
    "other lora": {"r": 16, "lora_alpha": 16},
    "dora": {"r": 8, "lora_alpha": 8, "use_dora": True},
    # another rank and scaling, on some projections of one layer
    "partial": {"r": 5, "lora_alpha": 20, "use_dora": True, "use_rslora": True, "layers_to_transform": [1]},
}


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """Folders of a tiny model and its adapters, by kind of model; "base" is the model."""

    @functools.cache
    def make(kind: str) -> dict[str, Path]:
        folder = tmp_path_factory.mktemp(kind)
        base, targets = save_model(kind, folder / "base"), TARGETS[kind]
        some = targets[1:3] if len(targets) > 4 else targets[2:3]
        folders = {"base": base}
        for seed, (name, options) in enumerate(ADAPTERS.items(), 1):
            of = list(some if name == "partial" else targets)
            folders[name] = save_adapter(base, folder / name, seed, target_modules=of, **options)
        return folders

    return make


def mixed(folders, names, prompts=PROMPTS):
    """A batch in which every prompt asks for every adapter, "base" for none."""
    return [[None if name == "base" else str(folders[name]), prompt] for prompt in prompts for name in names]


def judge(folders, batch, served, dtype=torch.float32):
    """By adapter: sequences whose tokens are not PEFT's greedy ones, and the worst error of a log-probability."""
    logits = functools.cache(lambda adapter: peft_logits(folders["base"], adapter, dtype))
    wrong, worst = defaultdict(int), defaultdict(float)
    for (adapter, prompt), (tokens, found) in zip(batch, served, strict=True):
        name = "base" if adapter is None else Path(adapter).name
        true = logits(adapter)(prompt + tokens[:-1])[len(prompt) - 1 :]
        wrong[name] += true.argmax(1).tolist() != tokens
        wanted = true.log_softmax(1).gather(1, torch.tensor(tokens).unsqueeze(1)).squeeze(1)
        worst[name] = max(worst[name], float((wanted - torch.tensor(found, dtype=torch.float64)).abs().max()))
    print({name: (wrong[name], f"{worst[name]:.1e}") for name in wrong})
    return wrong, worst


def as_exact(worst, *names):
    """The errors of DoRA rows beside those of vLLM's own LoRA rows: at most `testing.limits`' four times as large."""
    return all(worst[name] <= 4.0 * worst["lora"] for name in names)


def edited(adapter: Path, to: Path, change, **configuration) -> str:
    """A copy of an adapter with other tensors and another configuration."""
    shutil.copytree(adapter, to)
    tensors = load_file(to / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, to / "adapter_model.safetensors")
    config = json.loads((to / "adapter_config.json").read_text())
    (to / "adapter_config.json").write_text(json.dumps({**config, **configuration}))
    return str(to)


Q = "base_model.model.model.layers.0.self_attn.q_proj"


def refused(folders, folder):
    """Adapters that cannot be served, and what their errors name."""
    m, a, dora = f"{Q}.lora_magnitude_vector", f"{Q}.lora_A.weight", folders["dora"]
    edit = functools.partial(edited, dora)

    def move(key, to):
        return lambda tensors: tensors.__setitem__(to, tensors.pop(key))

    def put(key, make):
        return lambda tensors: tensors.__setitem__(key, make(tensors[key]))

    embedding = {
        "base_model.model.model.embed_tokens.lora_embedding_A": torch.ones(2, 256),
        "base_model.model.model.embed_tokens.lora_embedding_B": torch.ones(128, 2),
        "base_model.model.model.embed_tokens.lora_magnitude_vector": torch.ones(128),
    }

    def seventh_layer(tensors):
        for key in [key for key in tensors if key.startswith(Q)]:
            tensors[key.replace("layers.0", "layers.7")] = tensors.pop(key)

    def nothing(tensors):
        pass

    return {
        edit(folder / "no magnitude", lambda t: t.pop(m)): ["layers.0.self_attn.q_proj", "no magnitude"],
        edit(folder / "no factor", lambda t: t.pop(a)): ["layers.0.self_attn.q_proj", "no lora_a"],
        edit(folder / "a magnitude alone", move(m, m.replace("q_proj", "w_proj"))): ["w_proj"],
        edit(folder / "short", put(m, lambda x: x[:-1].clone())): ["q_proj", "127"],
        edit(folder / "long", put(m, lambda x: torch.cat((x, x)))): ["q_proj", "256"],
        edit(folder / "not finite", put(m, lambda x: x * float("nan"))): [m, "finite"],
        edit(folder / "not DoRA", nothing, use_dora=False): ["lora_magnitude_vector", "use_dora=False"],
        edit(folder / "another model", seventh_layer): ["layers.7.self_attn.q_proj"],
        edit(folder / "embedding", lambda t: t.update(embedding)): ["embed_tokens", "linear layers"],
        edit(folder / "wide", put(a, lambda x: torch.cat((x, x), 1))): ["q_proj", "lora_A", "128"],
        edit(folder / "another rank", nothing, rank_pattern={"q_proj": 4}): ["q_proj", "lora_A [4, 128]"],
        # what vLLM's plain LoRA refuses
        edit(folder / "rank", nothing, r=64): ["rank 64", "16"],
        edit(folder / "pissa", nothing, init_lora_weights="pissa"): ["pissa"],
        edit(folder / "lora bias", nothing, lora_bias=True): ["lora_bias"],
    }


def test_mixed_batches_and_wrong_adapters(models, tmp_path):
    """Base and LoRA as ever; with DoRA in the batch all are right; what is wrong is refused and changes nothing."""
    folders = models("llama")
    stock = mixed(folders, ("base", "lora", "other lora"))
    batch = mixed(folders, ("base", "lora", "dora", "partial"))
    wrong_ones = refused(folders, tmp_path)
    loads = [{"load": path} for path in wrong_ones]
    first, before, *errors, after = run_engine(
        [{"generate": stock}, {"generate": batch}, *loads, {"generate": batch}], folders["base"], max_loras=5
    )
    wrong, _ = judge(folders, stock, first)
    assert sum(wrong.values()) == 0
    wrong, worst = judge(folders, batch, before)
    assert sum(wrong.values()) == 0 and as_exact(worst, "dora", "partial")
    for (path, names), error in zip(wrong_ones.items(), errors, strict=True):
        assert error is not None and all(name in error for name in names), (path, error)
    assert after == before


@pytest.mark.parametrize("kind", ["qwen2", "phi3"])
def test_other_layers(models, kind):
    """Biases on Q, K and V; layers that are merged in the adapter's file too."""
    folders = models(kind)
    batch = mixed(folders, ("base", "lora", "dora", "partial"))
    (served,) = run_engine([{"generate": batch}], folders["base"])
    wrong, worst = judge(folders, batch, served)
    assert sum(wrong.values()) == 0 and as_exact(worst, "dora", "partial")


@pytest.mark.parametrize("kind", ["opt", "qwen2"])
def test_two_ranks(models, kind):
    """Two processes: a row-parallel layer's norm is summed over them. OPT's have biases; Qwen2's has merged layers."""
    folders = models(kind)
    batch = mixed(folders, ("base", "lora", "dora", "partial"))
    (served,) = run_engine([{"generate": batch}], folders["base"], processes=4, tensor_parallel_size=2)
    wrong, worst = judge(folders, batch, served)
    assert sum(wrong.values()) == 0 and as_exact(worst, "dora", "partial")


def test_one_slot(models):
    """Each adapter evicts the one before, from the slot and from host memory, and comes back."""
    folders = models("llama")
    names = ("dora", "lora", "partial", "dora", "other lora", "partial")
    batches = [mixed(folders, (name,)) for name in names]
    jobs = [{"generate": batch} for batch in batches]
    served = run_engine(jobs, folders["base"], processes=3, max_loras=1, max_cpu_loras=2)
    wrong, _ = judge(folders, sum(batches, []), sum(served, []))
    assert sum(wrong.values()) == 0


def test_bfloat16(models):
    """No further from PEFT in float64 than vLLM's plain LoRA is, in the same batch."""
    folders = models("llama")
    batch = mixed(folders, ("base", "lora", "dora", "partial"))
    (served,) = run_engine([{"generate": batch}], folders["base"], dtype="bfloat16")
    _, worst = judge(folders, batch, served, torch.float64)
    assert as_exact(worst, "dora", "partial") and worst["lora"] < 0.5


def test_a_quantised_base(tmp_path):
    """Weights of 4 bits: the norm comes from the layer's forward. As near to PEFT as plain LoRA is."""
    base, targets = save_model("llama", tmp_path / "base"), list(TARGETS["llama"])
    packed = quantise(base, tmp_path / "packed")
    folders = {"base": base}
    for seed, name in enumerate(("lora", "dora"), 1):
        folders[name] = save_adapter(base, tmp_path / name, seed, target_modules=targets, **ADAPTERS[name])
    batch = mixed(folders, ("base", "lora", "dora"))
    (served,) = run_engine([{"generate": batch}], packed, dtype="bfloat16")
    _, worst = judge(folders, batch, served, torch.float64)
    assert as_exact(worst, "dora") and worst["lora"] < 1.0
