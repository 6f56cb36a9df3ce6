"""Small models of pipelines, their adapters, and what PEFT and diffusers make of them."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn

from dora_kernels import Adapter, apply_dora, extract
from dora_kernels.adapters import AdapterLayer

ATTENTION = ["q_proj", "v_proj", "out_proj", "fc1"]


def unet(sdxl=False):
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    more = {"transformer_layers_per_block": (1, 2)} if sdxl else {}
    return diffusers.UNet2DConditionModel(
        sample_size=8, layers_per_block=2, block_out_channels=(8, 16), norm_num_groups=4, cross_attention_dim=12,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4, **more,
    )  # fmt: skip


def clip(projection=False, seed=1, hidden=16):
    torch.manual_seed(seed)
    config = transformers.CLIPTextConfig(
        vocab_size=30, hidden_size=hidden, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=8, projection_dim=12, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return (transformers.CLIPTextModelWithProjection if projection else transformers.CLIPTextModel)(config).eval()


def t5():
    torch.manual_seed(3)
    config = transformers.T5Config(vocab_size=30, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2)
    return transformers.T5EncoderModel(config).eval()


class Transformer(nn.Module):
    """With names as those of diffusers' transformers."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(4)
        attention = nn.ModuleDict({"to_q": nn.Linear(12, 12), "to_out": nn.ModuleList([nn.Linear(12, 12)])})
        self.transformer_blocks = nn.ModuleList([nn.ModuleDict({"attn": attention})])
        self.proj_out = nn.Linear(12, 6)


def trained(model, targets, **options):
    """Adapted, with values as of training; the adapter."""
    apply_dora(model, targets, rank=2, **options)
    torch.manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.3)
            if "magnitude" in name:
                parameter.mul_(1 + 0.02 * torch.randn_like(parameter))
    return extract(model)


def modules_of(models):
    """As one, without adapters."""
    return nn.ModuleDict(models)


UNET = ["to_q", "to_out.0", "conv1", "ff.net.2"]
PIPELINES = {
    "SD 1.5": (lambda: {"unet": unet(), "text_encoder": clip()}, {"unet": "lora_unet", "text_encoder": "lora_te"}),
    "SDXL": (
        lambda: {"unet": unet(sdxl=True), "text_encoder": clip(), "text_encoder_2": clip(True, 2, 20)},
        {"unet": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"},
    ),
    "Flux": (
        lambda: {"transformer": Transformer(), "text_encoder": clip(), "text_encoder_2": t5()},
        {"transformer": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te3"},
    ),
    "SD 3": (
        lambda: {"transformer": Transformer(), "text_encoder": clip(True), "text_encoder_2": clip(True, 2, 20),
                 "text_encoder_3": t5()},
        {"transformer": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2",
         "text_encoder_3": "lora_te3"},
    ),
}  # fmt: skip
TARGETS = [*UNET, *ATTENTION, "SelfAttention.q", "DenseReluDense.wo"]


def adapted_pipeline(name):
    make, prefixes = PIPELINES[name]
    models = make()
    adapters = {component: trained(model, TARGETS) for component, model in models.items()}
    wanted = Adapter({f"{component}.{layer}": each for component, adapter in adapters.items()
                      for layer, each in adapter.layers.items()})  # fmt: skip
    return make, models, wanted, prefixes


def peft_state(model, targets):
    """What PEFT gives of an adapted model, and the adapter."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, lora_alpha=4, use_dora=True, target_modules=targets, init_lora_weights=False)
    adapted = peft.get_peft_model(model, config)
    for name, parameter in adapted.named_parameters():
        if "magnitude" in name:
            parameter.data.mul_(1 + 0.02 * torch.randn_like(parameter))
    return {key.removeprefix("base_model.model."): tensor.detach().clone() for key, tensor in
            peft.get_peft_model_state_dict(adapted).items()}  # fmt: skip


def expected_of(state):
    """Without anything of this package's readers."""
    names = [key.removesuffix(".lora_A.weight") for key in state if key.endswith(".lora_A.weight")]
    layers = {}
    for name in names:
        a, b = state[f"{name}.lora_A.weight"], state[f"{name}.lora_B.weight"]
        m = state[f"{name}.lora_magnitude_vector"].flatten()
        layers[name] = AdapterLayer("linear" if a.dim() == 2 else "conv2d", a, b, m, 1.0)
    return Adapter(layers)
