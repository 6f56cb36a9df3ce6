"""Convert names of a U-Net's layers in Stability's code, on which sd-scripts trains SDXL, to diffusers' names.

Both have two residual blocks in each down block and three in each up block
(ldm/modules/diffusionmodules/openaimodel.py; diffusers: loaders/single_file_utils.py).
"""

from __future__ import annotations

import re

_WHOLE = {
    "input_blocks_0_0": "conv_in",
    "out_2": "conv_out",
    "time_embed_0": "time_embedding.linear_1",
    "time_embed_2": "time_embedding.linear_2",
    "label_emb_0_0": "add_embedding.linear_1",
    "label_emb_0_2": "add_embedding.linear_2",
}
_INSIDE = {
    "in_layers_2": "conv1",
    "out_layers_3": "conv2",
    "emb_layers_1": "time_emb_proj",
    "skip_connection": "conv_shortcut",
}
_BLOCK = re.compile(r"(input_blocks|output_blocks|middle_block)_(\d+)_(?:(\d+)_)?(.+)")


def from_ldm(name: str) -> str | None:
    """Return diffusers' name, with underscores for some dots, for a layer's name in Stability's code; else None."""
    flat = name.replace(".", "_")
    if flat in _WHOLE:
        return _WHOLE[flat]
    found = _BLOCK.fullmatch(flat)
    if found is None:
        return None
    part, number, inner, rest = found[1], int(found[2]), found[3], found[4]
    if part == "middle_block":
        rest = rest if inner is None else f"{inner}_{rest}"
        place = ("resnets.0", "attentions.0", "resnets.1")[number] if number < 3 else None
        return None if place is None else f"mid_block.{place}.{_INSIDE.get(rest, rest)}"
    if inner is None:
        return None
    block, layer = divmod(number - 1, 3) if part == "input_blocks" else divmod(number, 3)
    side = "down_blocks" if part == "input_blocks" else "up_blocks"
    if rest == "op":
        return f"{side}.{block}.downsamplers.0.conv"
    if rest == "conv":
        return f"{side}.{block}.upsamplers.0.conv"
    kind = "resnets" if inner == "0" else "attentions"
    return f"{side}.{block}.{kind}.{layer}.{_INSIDE.get(rest, rest)}"
