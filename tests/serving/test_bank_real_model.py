"""SmolLM2-135M: greedy tokens of a mixed batch, beside each adapter alone through PEFT."""

from __future__ import annotations

import copy

import pytest

pytest.importorskip("peft")
pytest.importorskip("transformers")
pytest.importorskip("gguf")

import torch
from peft import LoraConfig, get_peft_model
from peft_models import lora_layers

from bench.providers import Missing
from bench.training import load, load_tokenizer, prepare
from dora_kernels import AdapterBank

PROMPTS = ["The capital of France is", "A good name for a cat is", "Two and two make", "The capital of France is"]


@pytest.mark.slow
def test_greedy_tokens(tmp_path):
    try:
        source = prepare(tmp_path)
    except Missing as reason:
        pytest.skip(str(reason))
    base, tokenizer = load(source).cpu().eval(), load_tokenizer(source)
    tokenizer.pad_token, tokenizer.padding_side = tokenizer.pad_token or tokenizer.eos_token, "left"
    bank, models = AdapterBank(base, slots=2), {None: base}
    for seed, (name, dora) in enumerate({"dora": True, "lora": False, "other": True}.items()):
        twin = copy.deepcopy(base, {id(parameter): parameter for parameter in base.parameters()})
        targets = ["q_proj", "v_proj", "down_proj"] if seed else "all-linear"
        model = get_peft_model(twin, LoraConfig(r=4 + 4 * seed, lora_alpha=8, use_dora=dora, target_modules=targets))
        torch.manual_seed(seed)
        with torch.no_grad():
            for layer in lora_layers(model):
                torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.02)
                if dora:
                    layer.lora_magnitude_vector["default"].weight.mul_(1 + 0.05 * torch.rand(layer.out_features))
        model.save_pretrained(tmp_path / name)
        models[name] = model.eval()
        bank.load(name, tmp_path / name)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": tokenizer.pad_token_id}
    for names in ([None, "dora", "lora", "dora"], ["other", "dora", None, "other"]):
        inputs = tokenizer(PROMPTS, return_tensors="pt", padding=True)
        found = bank.generate(inputs, names, **options)
        texts = set()
        for name in dict.fromkeys(names):
            rows = [i for i, one in enumerate(names) if one == name]
            wanted = models[name].generate(**tokenizer(PROMPTS, return_tensors="pt", padding=True), **options)
            for i in rows:
                assert torch.equal(found[i], wanted[i]), (name, tokenizer.decode(found[i]), tokenizer.decode(wanted[i]))
                texts.add(tokenizer.decode(found[i], skip_special_tokens=True))
        assert len(texts) > 2
