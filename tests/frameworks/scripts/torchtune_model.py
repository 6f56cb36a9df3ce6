"""torchtune's Llama with its own DoRA layers or, with "ours" as third argument, with this package's."""

import sys

import torch
from torch import nn
from torchtune.models.llama2 import lora_llama2
from torchtune.modules.peft import DoRALinear, get_adapter_params, set_trainable_params

torch.manual_seed(0)
attention = ["q_proj", "k_proj", "v_proj", "output_proj"]
model = lora_llama2(
    lora_attn_modules=attention, apply_lora_to_mlp=True, vocab_size=200, num_layers=2, num_heads=4, num_kv_heads=2,
    embed_dim=32, intermediate_dim=48, max_seq_len=32, lora_rank=4, lora_alpha=8, use_dora=True,
)  # fmt: skip
layers = {name: module for name, module in model.named_modules() if isinstance(module, DoRALinear)}
for layer in layers.values():
    layer.initialize_dora_magnitude()
set_trainable_params(model, get_adapter_params(model))
if "ours" in sys.argv[3:]:
    import dora_kernels

    for name, theirs in layers.items():
        linear = nn.Linear(theirs.in_dim, theirs.out_dim, bias=False)
        linear.weight = theirs.weight
        ours = dora_kernels.DoRALinear.from_linear(linear, rank=theirs.lora_a.weight.shape[0], alpha=8)
        with torch.no_grad():
            ours.lora_A.weight.copy_(theirs.lora_a.weight)
            ours.lora_B.weight.copy_(theirs.lora_b.weight)
            ours.lora_magnitude_vector.copy_(theirs.magnitude)
        model.set_submodule(name, ours)
    print(f"dora_kernels: {len(layers)} DoRA layers in place of torchtune's", file=sys.stderr)
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
rows = torch.randint(0, 200, (12, 16), generator=torch.Generator().manual_seed(0))
for step in range(6):
    batch = rows[2 * step : 2 * step + 2]
    logits = model(batch)
    loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), batch[:, 1:].flatten())
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print("LOSS", loss.item())
