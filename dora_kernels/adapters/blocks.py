"""Names of the tensors of mixtures of experts: in a model's files, and in transformers' model, where they differ."""

from __future__ import annotations

import re
from collections.abc import Iterable

_SINGLE = {
    "w1": "gate_proj", "w3": "up_proj", "w2": "down_proj", "fc1": "gate_proj", "fc3": "up_proj", "fc2": "down_proj",
}  # fmt: skip
"""Names of a single expert's linear layers in files, and those that are used here."""

_SHARED = (
    (r"\.shared_experts\.w1\.", ".shared_experts.gate_proj."),
    (r"\.shared_experts\.w2\.", ".shared_experts.down_proj."),
    (r"\.shared_experts\.w3\.", ".shared_experts.up_proj."),
)

_RENAMED = (
    # Mixtral, MiniMax, and with a forget gate Kimi Linear
    ((r"\.block_sparse_moe\.", ".mlp."), (r"\.self_attn\.f_([ab])_proj\.", r".self_attn.forget_gate.f_\1_proj.")),
    # MiniMax M3
    ((r"\.block_sparse_moe\.e_score_correction_bias$", ".mlp.gate.e_score_correction_bias"),),
    # Phi-3.5-MoE
    ((r"\.block_sparse_moe\.gate\.", ".mlp.router."),),
    # Granite
    ((r"\.block_sparse_moe\.input_linear\.weight$", ".block_sparse_moe.experts.gate_up_proj"),
     (r"\.block_sparse_moe\.output_linear\.weight$", ".block_sparse_moe.experts.down_proj"),
     (r"\.block_sparse_moe\.router\.layer\.", ".block_sparse_moe.router.")),
    # Nemotron-H
    ((r"^backbone\.", "model."),),
    # Step 3.7
    ((r"\.moe\.gate\.", ".mlp.gate."), (r"\.moe\.router_bias$", ".mlp.gate.e_score_correction_bias"),
     (r"\.moe\.down_proj\.weight$", ".mlp.experts.down_proj"), (r"\.share_expert\.", ".mlp.shared_experts.")),
    # Hunyuan V3
    ((r"\.mlp\.router\.gate\.", ".mlp.gate."), (r"\.mlp\.expert_bias$", ".mlp.e_score_correction_bias"),
     (r"\.mlp\.shared_mlp\.", ".mlp.shared_experts.")),
    # Laguna
    ((r"\.mlp\.shared_expert\.", ".mlp.shared_experts."),
     (r"\.mlp\.experts\.e_score_correction_bias$", ".mlp.gate.e_score_correction_bias")),
    # Aria
    ((r"\.mlp\.experts\.fc1\.weight$", ".mlp.experts.gate_up_proj"),
     (r"\.mlp\.experts\.fc2\.weight$", ".mlp.experts.down_proj")),
    # Inkling
    ((r"\.mlp\.experts\.w2_weight$", ".mlp.experts.down_proj"), (r"\.shared_w2_weight$", ".down_proj"),
     (r"\.mlp\.w2_md\.", ".mlp.down_proj."), (r"\.mlp\.gate\.bias$", ".mlp.gate.e_score_correction_bias")),
    # Dots 3
    ((r"\.mlp\.gate_weight$", ".mlp.gate.weight"), (r"\.mlp\.router_bias$", ".mlp.e_score_correction_bias")),
    # Bailing Hybrid
    ((r"\.mlp\.gate\.expert_bias$", ".mlp.gate.e_score_correction_bias"),
     (r"\.attention\.dense\.", ".self_attn.o_proj."), (r"\.attention\.f_proj\.", ".self_attn.forget_gate.f_proj."),
     (r"\.attention\.", ".self_attn."), (r"^model\.word_embeddings\.", "model.embed_tokens.")),
    # EXAONE
    ((r"\.mlp\.e_score_correction_bias$", ".mlp.gate.e_score_correction_bias"),),
    # Ernie 4.5
    ((r"\.mlp\.moe_statics\.", ".mlp.gate.moe_statics."),),
    # Kolibri
    ((r"\.moe\.router\.expert_bias$", ".mlp.gate.e_score_correction_bias"),),
    # DeepSeek V4
    ((r"\.ffn\.gate\.bias$", ".mlp.gate.e_score_correction_bias"), (r"\.ffn\.", ".mlp."),
     *_SHARED, (r"\.attn\.", ".self_attn."), (r"\.indexer\.compressor\.", ".compressor.indexer."),
     (r"\.indexer\.weights_proj\.", ".compressor.indexer.scorer.weights_proj."),
     (r"\.indexer\.wq_b\.", ".compressor.indexer.q_b_proj."),
     (r"\.wq_a\.", ".q_a_proj."), (r"\.self_attn\.wq_b\.", ".self_attn.q_b_proj."), (r"\.wkv\.", ".kv_proj."),
     (r"\.wgate\.", ".gate_proj."), (r"\.wo_a\.", ".o_a_proj."), (r"\.wo_b\.", ".o_b_proj.")),
    # Mistral Large 4
    (*_SHARED, (r"(?<=\d)\.(gate|experts|shared_experts)\.", r".mlp.\1."),
     (r"\.feed_forward\.w1\.", ".mlp.gate_proj."), (r"\.feed_forward\.w2\.", ".mlp.down_proj."),
     (r"\.feed_forward\.w3\.", ".mlp.up_proj."), (r"\.attention\.", ".self_attn."), (r"\.wq\.", ".q_proj."),
     (r"\.wkv_a_with_mqa\.", ".kv_a_proj_with_mqa."), (r"\.wkv_b\.", ".kv_b_proj."), (r"\.wo\.", ".o_proj.")),
)  # fmt: skip
"""Names in files, and in transformers 5 (conversion_mapping.py), where tensors are renamed as a whole."""

_EXPERT = re.compile(rf"(.+\.experts\.\d+\.)({'|'.join(_SINGLE)})\.weight")


def names_in_model(keys: Iterable[str]) -> dict[str, str]:
    """Return the keys of a model's files by every name that they may have in the model, their own first."""
    own = {key: key for key in keys}
    own |= {f"{match[1]}{_SINGLE[match[2]]}.weight": key for key in own if (match := _EXPERT.fullmatch(key))}
    found = dict(own)
    for rules in _RENAMED:
        for name, key in own.items():
            for pattern, new in rules:
                name = re.sub(pattern, new, name)
            found.setdefault(name, key)
    return found
