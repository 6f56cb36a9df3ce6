"""`dora-kernels serve-check`: engines that serve an adapter, and those that would drop its magnitudes."""

from __future__ import annotations

import json
import os

import pytest

pytest.importorskip("typer")
pytest.importorskip("rich")
pytest.importorskip("safetensors")
pytest.importorskip("transformers")

from cli_models import adapter_file, llama
from experts_models import qwen3_moe
from safetensors.torch import load_file, save_file

import dora_kernels
from dora_kernels.cli import serve_check
from dora_kernels.vllm import TESTED, registry


@pytest.fixture
def base(tmp_path):
    llama().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture(autouse=True)
def no_vllm(monkeypatch):
    """Whether vLLM is installed here decides nothing but where a test says so."""
    monkeypatch.setattr(serve_check, "version_of", lambda *_: None)


def asked(call, *arguments):
    status, out, error = call("serve-check", *arguments, "--json")
    return status, json.loads(out) if status != 2 else error


def serves(found):
    return {name: verdict["serves"] for name, verdict in found.items()}


def test_dora(call, tmp_path, base):
    adapter, _ = adapter_file(tmp_path, llama())
    status, found = asked(call, base, adapter)
    assert status == 0 and serves(found) == {
        "bank": "right", "vllm": "unchecked", "sglang": "refused", "lorax": "wrong", "tgi": "wrong",
        "tensorrt-llm": "wrong", "llama.cpp": "refused",
    }  # fmt: skip
    assert "--max-lora-rank 8" in found["vllm"]["advice"] and "merge" in found["lorax"]["advice"]
    status, out, _ = call("serve-check", base, adapter)
    assert status == 0 and "DoRA, peft, 3 layers, rank 3" in out and "unused adapter weights" in out
    assert call("serve-check", base, adapter, "--engine", "vllm")[0] == 0
    status, found = asked(call, base, adapter, "--engine", "tgi")
    assert status == 1 and list(found) == ["tgi"]


def test_installed_versions(call, tmp_path, base, monkeypatch):
    adapter, _ = adapter_file(tmp_path, llama())
    monkeypatch.setattr(serve_check, "serves_with_lora", lambda names: names == ("LlamaForCausalLM",))
    for version, wanted in ((TESTED[0], "right"), (f"{TESTED[-1]}+cpu", "right"), ("0.1.0", "refused")):
        monkeypatch.setattr(serve_check, "version_of", lambda *_, version=version: version)
        found = asked(call, base, adapter, "--engine", "vllm")[1]["vllm"]
        assert found["serves"] == wanted
    assert "0.1.0 has not been tested" in found["reason"] and f"vllm=={TESTED[-1]}" in found["advice"]


def test_the_models_class(call, tmp_path, base, monkeypatch):
    """Of vLLM, by what it answers; of the others nothing is known, and "right" would be a guess."""
    adapter, _ = adapter_file(tmp_path, llama())
    config = json.loads((base / "config.json").read_text())

    def verdict(answer, names=("LlamaForCausalLM",), **options):
        def ask(given):
            assert given == names
            if isinstance(answer, Exception):
                raise answer
            return answer

        (base / "config.json").write_text(json.dumps(config | {"architectures": list(names)} | options))
        monkeypatch.setattr(serve_check, "serves_with_lora", ask)
        status, found = asked(call, base, adapter, "--engine", "vllm")
        assert status == (found["vllm"]["serves"] == "refused")
        return found["vllm"]

    unchecked = "whether it serves {} with LoRA was not checked"
    found = verdict(AssertionError("not installed: not asked"), ("T5ForConditionalGeneration",))
    assert found["serves"] == "unchecked"
    assert found["reason"].endswith(f"{unchecked.format('T5ForConditionalGeneration')}: vLLM is not installed here")
    monkeypatch.setattr(serve_check, "version_of", lambda *_: TESTED[0])
    assert verdict(True)["serves"] == "right"
    found = verdict(False, ("GPT2LMHeadModel",))
    assert found["serves"] == "refused" and "serves GPT2LMHeadModel without LoRA" in found["reason"]
    found = verdict(None, ("Own",))
    assert found["serves"] == "unchecked" and "has no class of its own for Own" in found["reason"]
    found = verdict(None, ("T5ForConditionalGeneration",), is_encoder_decoder=True)
    assert found["serves"] == "refused" and "encoder-decoders" in found["reason"]
    found = verdict(RuntimeError("vLLM could not be asked: no torch"))
    assert found["serves"] == "unchecked" and found["reason"].endswith("could not be asked: no torch")
    for named in (None, "Llama", []):
        found = verdict(AssertionError("not asked"), architectures=named)
        assert found["serves"] == "unchecked" and "names no class" in found["reason"]


def test_a_vllm_that_cannot_be_asked(monkeypatch, tmp_path):
    (tmp_path / "vllm.py").write_text("raise OSError('half\\ninstalled')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    with pytest.raises(RuntimeError, match="vLLM could not be asked: installed"):
        registry.serves_with_lora(["LlamaForCausalLM"])


def test_plain_lora_and_other_formats(call, tmp_path, base):
    adapter, _ = adapter_file(tmp_path, llama(), plain=True)
    found = serves(asked(call, base, adapter)[1])
    assert found.pop("bank") == "right" and set(found.values()) == {"unchecked"}
    adapter, _ = adapter_file(tmp_path / "two", llama(), "kohya")
    status, found = asked(call, base, adapter)
    assert found["bank"]["serves"] == "right" and found["vllm"]["serves"] == "refused"
    assert "'kohya'" in found["vllm"]["reason"] and "convert" in found["vllm"]["advice"]
    assert found["lorax"]["serves"] == "wrong"


def test_magnitudes_along_in(call, tmp_path, base):
    adapter, _ = adapter_file(tmp_path, llama(), "lycoris", axis="in")
    found = asked(call, base, adapter, "--axis", "in")[1]
    assert "right" not in serves(found).values()
    assert "along 'out'" in found["bank"]["reason"] and "along 'out'" in found["vllm"]["reason"]


@pytest.mark.parametrize("dora", [True, False], ids=["dora", "lora"])
def test_experts(call, tmp_path, dora):
    """In no engine with DoRA; plain LoRA in the layouts of vLLM and SGLang."""
    model = qwen3_moe()
    model.save_pretrained(tmp_path / "base")
    dora_kernels.apply_dora(model, ["q_proj"], use_dora=dora, target_parameters=["experts.down_proj"], rank=2)
    dora_kernels.save_adapter(model, tmp_path / "adapter")
    found = asked(call, tmp_path / "base", tmp_path / "adapter")[1]
    assert set(serves(found).values()) == {"refused"}
    for engine in ("vllm", "sglang"):
        assert found[engine]["advice"].endswith("serve OUT" if dora else f"--to {engine}")
    config = tmp_path / "base" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"architectures": ["GptOssForCausalLM"]}))
    found = asked(call, tmp_path / "base", tmp_path / "adapter")[1]
    assert found["vllm"]["serves"] == ("refused" if dora else "unchecked")  # it reads that model's stacks
    assert found["sglang"]["serves"] == "refused"


def test_bad_input(call, tmp_path, base):
    adapter, _ = adapter_file(tmp_path, llama())
    status, error = asked(call, base, adapter, "--engine", "triton")
    assert status == 2 and "--engine: expected one of bank, vllm," in error
    other = llama(num_key_value_groups=1)
    del other.model.layers[1]
    other.config.num_hidden_layers = 1
    other.save_pretrained(tmp_path / "other")
    status, error = asked(call, tmp_path / "other", adapter)
    assert status == 2 and "the model has no such layer" in error


def test_tensors_trained_beside_the_adapter(call, tmp_path, base):
    """No engine has them: refused where it starts with an error, wrong where it answers without them."""
    adapter, _ = adapter_file(tmp_path, llama(), plain=True)
    file = adapter / "adapter_model.safetensors"
    tensors, stored = load_file(file), load_file(base / "model.safetensors")["lm_head.weight"]
    save_file(tensors | {"base_model.model.lm_head.weight": stored + 1}, file)
    found = asked(call, base, adapter)[1]
    assert {name: each for name, each in serves(found).items() if each != "wrong"} == {
        "bank": "refused", "vllm": "refused"
    }  # fmt: skip
    assert all("lm_head.weight trained beside" in verdict["reason"] for verdict in found.values())
    save_file(tensors | {"base_model.model.lm_head.weight": stored}, file)
    assert set(serves(asked(call, base, adapter)[1]).values()) == {"right", "unchecked"}, "the base model's own"
