"""GGUF files: the merged model and the adapter, written, and read back by transformers and by this package."""

from __future__ import annotations

import pytest

pytest.importorskip("gguf")
pytest.importorskip("peft")
pytest.importorskip("transformers")

import gguf
import torch
from gguf_models import MODELS, SIZES, random_model
from peft import LoraConfig, get_peft_model
from peft_models import move_adapter
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from dora_kernels import adapted_layers, apply_dora, merge_all, merge_dora
from dora_kernels.adapters import Adapter, AdapterLayer, extract
from dora_kernels.gguf import DTYPES, as_lora, export_adapter, export_model, read_adapter
from dora_kernels.gguf.layout import Layout

IDS = torch.arange(2 * 23).reshape(2, 23) * 37 % SIZES["vocab_size"]


def adapted(kind="llama", **more):
    """A DoRA model of PEFT's, away from its start in B and in the magnitude."""
    model = get_peft_model(
        random_model(kind, **more), LoraConfig(r=4, lora_alpha=6, use_dora=True, target_modules="all-linear")
    )
    return move_adapter(model).eval()


def merged(kind="llama", **more):
    return adapted(kind, **more).merge_and_unload()


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def export_and_load(model, folder, **options):
    export_model(model, folder / "model.gguf", **options)
    return AutoModelForCausalLM.from_pretrained(folder, gguf_file="model.gguf", dtype=torch.float32).eval()


def assert_same_function(found, model):
    """The distance between the logits is what float32 loses in one of them, measured against float64, twice."""
    wanted = logits(model)
    exact = logits(model.double())
    model.float()
    rounding = (wanted.double() - exact).abs().max()
    assert (logits(found).double() - exact).abs().max() <= 3 * rounding
    assert exact.std() > 1e4 * rounding


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("tied", [False, True])
def test_float32_is_the_merged_model(kind, tied, tmp_path):
    model = merged(kind, tie_word_embeddings=tied)
    found = export_and_load(model, tmp_path)
    wanted = model.state_dict()
    assert found.config.tie_word_embeddings is tied
    for name, tensor in found.state_dict().items():
        assert torch.equal(tensor, wanted[name]), name
    assert_same_function(found, model)


def test_the_adapter_is_in_the_file(tmp_path):
    """The merged model and its base differ by far more than the tests' tolerances."""
    found = export_and_load(merged(), tmp_path)
    assert (logits(found) - logits(random_model())).abs().max() > 0.1


@pytest.mark.parametrize("dtype", [name for name in DTYPES if name != "f32"])
def test_quantized_as_the_package_quantizes(dtype, tmp_path):
    """Equal, but for float32 rounding, to the model whose matrices went through gguf's quantizer where they are."""
    model = merged()
    before = logits(model)
    found = export_and_load(model, tmp_path, dtype=dtype)
    kind = gguf.GGMLQuantizationType[DTYPES[dtype][1]]
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            parameter.data = torch.from_numpy(gguf.dequantize(gguf.quantize(parameter.detach().numpy(), kind), kind))
        assert torch.equal(found.get_parameter(name), parameter), name
    assert_same_function(found, model)
    assert (logits(found) - before).abs().max() > 0


def test_rows_that_no_block_divides_stay_float16(tmp_path):
    model = random_model()
    model.model.layers[0].mlp.down_proj.weight = torch.nn.Parameter(torch.randn(64, 100))
    export_model(model, tmp_path / "m.gguf", dtype="q8_0")
    types = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    assert types["blk.0.ffn_down.weight"] == "F16" and types["blk.1.ffn_down.weight"] == "Q8_0"
    assert types["blk.0.attn_norm.weight"] == "F32"


def test_scaled_rotary_embedding_as_factors(tmp_path):
    """llama.cpp divides the frequencies by them; transformers' loader does not read them."""
    rope = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 64}  # fmt: skip
    model = MODELS["llama"](rope_scaling=rope)
    export_model(model, tmp_path / "m.gguf")
    factors = next(t.data for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors if t.name == "rope_freqs.weight")
    plain = 10000.0 ** (-torch.arange(0, 16, 2, dtype=torch.float64) / 16)
    wanted = model.model.rotary_emb.inv_freq.double()
    torch.testing.assert_close(plain / torch.tensor(factors), wanted, rtol=1e-6, atol=0)
    assert factors.max() == pytest.approx(4.0) and factors.min() == pytest.approx(1.0)


def test_what_is_refused(tmp_path):
    file = tmp_path / "m.gguf"
    small = dict(n_embd=8, n_layer=1, n_head=1, vocab_size=9)
    with pytest.raises(ValueError, match=r"model type 'gpt2' cannot .*: llama, mistral, qwen2"):
        export_model(GPT2LMHeadModel(GPT2Config(**small)), file)
    with pytest.raises(ValueError, match=r"0.self_attn.q_proj .* still has an adapter; merge first: .*merge_and"):
        export_model(adapted(), file)
    model = random_model()
    with pytest.raises(ValueError, match=r"dtype='q3'; expected one of f32, f16"):
        export_model(model, file, dtype="q3")
    with pytest.raises(ValueError, match=r"attention_bias=True"):
        export_model(random_model(attention_bias=True), file)
    with pytest.raises(ValueError, match=r"rotary embedding of type 'yarn'"):
        export_model(random_model(rope_scaling={"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}), file)
    model.model.layers[1].mlp.extra = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"tensor model.layers.1.mlp.extra.weight has no name in GGUF"):
        export_model(model, file)
    del model.model.layers[1].mlp.extra
    assert not list(tmp_path.iterdir())

    export_model(model, file)
    whole = file.read_bytes()
    with pytest.raises(FileExistsError, match=r"m.gguf: exists already; force=True"):
        export_model(model, file, dtype="f16")
    model.lm_head.weight.data[3, 4] = 1e6
    with pytest.raises(ValueError, match=r"output.weight has the value 1000000.0, which F16 cannot hold"):
        export_model(model, file, dtype="f16", force=True)
    model.lm_head.weight.data[3, 4] = float("nan")
    with pytest.raises(ValueError, match=r"output.weight has the value nan"):
        export_model(model, file, force=True)
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"] and file.read_bytes() == whole
    export_model(random_model(), file, dtype="f16", force=True)
    assert file.read_bytes() != whole


def equal_layers(one, other):
    assert one.keys() == other.keys()
    for name, layer in one.items():
        found = other[name]
        for field in ("lora_A", "lora_B", "magnitude"):
            a, b = getattr(layer, field), getattr(found, field)
            assert (a is None) is (b is None), (name, field)
            assert a is None or (a.dtype == b.dtype and torch.equal(a, b)), (name, field)
        assert (found.kind, found.scaling, found.magnitude_axis, found.eps) == (
            layer.kind, layer.scaling, layer.magnitude_axis, layer.eps
        )  # fmt: skip


def layer(out, inputs, rank=3, dtype=torch.float32, axis="out", kind="linear", magnitude=True, scaling=0.1, eps=0.0):
    size = out if axis == "out" else inputs
    return AdapterLayer(
        kind, torch.randn(rank, inputs, dtype=dtype), torch.randn(out, rank, dtype=dtype),
        torch.randn(size, dtype=dtype) if magnitude else None, scaling, axis, eps,
    )  # fmt: skip


def test_an_adapter_comes_back_bit_for_bit(tmp_path):
    adapter = Adapter({
        "model.layers.0.self_attn.q_proj": layer(64, 64, scaling=1 / 3),
        "model.layers.1.self_attn.k_proj": layer(32, 64, rank=5, axis="in"),
        "model.layers.1.self_attn.v_proj": layer(32, 64, dtype=torch.bfloat16, eps=1e-8),
        "model.layers.0.mlp.down_proj": layer(64, 96, dtype=torch.float16, magnitude=False),
        "model.layers.0.mlp.up_proj": layer(96, 64, dtype=torch.float64),
        "model.embed_tokens": layer(64, 96, kind="embedding"),
        "lm_head": layer(96, 64),
    })  # fmt: skip
    export_adapter(adapter, tmp_path / "a.gguf", base=random_model().config)
    found = read_adapter(tmp_path / "a.gguf")
    equal_layers(adapter.layers, found.layers)
    assert list(found.layers) == list(adapter.layers) and found.format == "gguf"
    fields = gguf.GGUFReader(tmp_path / "a.gguf").fields
    assert fields["adapter.type"].contents() == "dora" and "adapter.lora.alpha" not in fields


def test_the_layers_of_this_package(tmp_path):
    """Exported from the model, and merged into it."""
    model = random_model()
    apply_dora(model, "all-linear", rank=3)
    with torch.no_grad():
        for found in adapted_layers(model).values():
            found.lora_B.weight.normal_(std=0.1)
            found.lora_magnitude_vector.mul_(1.2)
    export_adapter(model, tmp_path / "a.gguf")
    equal_layers(extract(model).layers, read_adapter(tmp_path / "a.gguf").layers)
    with pytest.raises(ValueError, match=r"still has an adapter; merge first: .* merge_all\(model\)"):
        export_model(model, tmp_path / "model.gguf")
    plain = merge_all(model)
    assert_same_function(export_and_load(plain, tmp_path), plain)


def test_rows_of_an_adapter_are_those_of_the_merged_file(tmp_path):
    """W, B and the magnitude are in one order: merging the two files' tensors gives the file of the merged model."""
    base = random_model()
    names = {"blk.0.attn_q": "model.layers.0.self_attn.q_proj", "blk.1.attn_k": "model.layers.1.self_attn.k_proj"}
    adapter = Adapter({name: layer(*base.get_submodule(name).weight.shape) for name in names.values()})
    export_adapter(adapter, tmp_path / "a.gguf", base=base)
    export_model(base, tmp_path / "base.gguf")
    for name, found in adapter.layers.items():
        weight = base.get_submodule(name).weight
        weight.data = merge_dora(weight.data, found.lora_A, found.lora_B, found.magnitude, scaling=found.scaling)
    export_model(base, tmp_path / "merged.gguf")
    parts = {}
    for file in ("a", "base", "merged"):
        reader = gguf.GGUFReader(tmp_path / f"{file}.gguf")
        parts[file] = {tensor.name: torch.tensor(tensor.data) for tensor in reader.tensors}
    for name in names:
        a, b, m = (parts["a"][f"{name}.weight.{part}"] for part in ("lora_a", "lora_b", "dora_magnitude"))
        found = merge_dora(parts["base"][f"{name}.weight"], a, b, m, scaling=0.1)
        torch.testing.assert_close(found, parts["merged"][f"{name}.weight"], rtol=1e-5, atol=1e-6)


def test_plain_lora_is_what_llama_cpp_reads(tmp_path):
    names = ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.k_proj"]
    plain = Adapter({name: layer(64 if "q_" in name else 32, 64, magnitude=False, scaling=2.0) for name in names})
    export_adapter(plain, tmp_path / "a.gguf", base=random_model())
    reader = gguf.GGUFReader(tmp_path / "a.gguf")
    assert [reader.fields[key].contents() for key in ("general.type", "adapter.type", "adapter.lora.alpha")] == [
        "adapter", "lora", 6.0
    ]  # fmt: skip
    shapes = {tensor.name: list(tensor.shape) for tensor in reader.tensors}
    assert shapes["blk.1.attn_k.weight.lora_a"] == [64, 3] and shapes["blk.1.attn_k.weight.lora_b"] == [3, 32]
    plain.layers[names[1]] = layer(32, 64, magnitude=False, scaling=1.0)
    with pytest.raises(ValueError, match=r"different alphas \(6 in .*q_proj, 3 in .*k_proj\), .* see as_lora"):
        export_adapter(plain, tmp_path / "b.gguf", base=random_model())


def test_the_nearest_lora():
    """Exact at full rank; below it, the error is that of the singular values cut off."""
    base, name = random_model(), "model.layers.1.self_attn.k_proj"
    dora = layer(32, 64)
    weight = base.get_submodule(name).weight.detach().double()
    full = (dora.lora_A.double(), dora.lora_B.double(), dora.magnitude.double())
    update = merge_dora(weight, *full, scaling=dora.scaling) - weight
    values = torch.linalg.svdvals(update)
    for rank in (32, 7):
        adapter, errors = as_lora(Adapter({name: dora}), base, rank)
        found = adapter.layers[name]
        assert found.rank == rank and found.magnitude is None
        product = found.scaling * found.lora_B.double() @ found.lora_A.double()
        missing = float((update - product).norm() / update.norm())
        assert missing == pytest.approx(float(values[rank:].norm() / values.norm()), abs=2e-6)
        assert errors[name] == pytest.approx(missing, abs=2e-6)
    assert missing > 0.1
    with pytest.raises(ValueError, match=r"rank: 33 is not possible for .*k_proj"):
        as_lora(Adapter({name: dora}), base, 33)


def test_adapters_that_are_refused(tmp_path):
    config = random_model().config
    good = Adapter({"model.layers.0.self_attn.q_proj": layer(64, 64)})
    with pytest.raises(TypeError, match=r"base: required for an Adapter"):
        export_adapter(good, tmp_path / "a.gguf")
    with pytest.raises(ValueError, match=r"layer model.layers.0.self_attn.x_proj has no name"):
        export_adapter(Adapter({"model.layers.0.self_attn.x_proj": layer(64, 64)}), tmp_path / "a.gguf", base=config)
    with pytest.raises(ValueError, match=r"kind conv1d"):
        conv = Adapter({"model.layers.0.mlp.up_proj": layer(96, 64, kind="conv1d")})
        export_adapter(conv, tmp_path / "a.gguf", base=config)
    with pytest.raises(ValueError, match=r"no layers"):
        export_adapter(Adapter({}), tmp_path / "a.gguf", base=config)
    assert not list(tmp_path.iterdir())
    export_adapter(good, tmp_path / "a.gguf", base=config)
    with pytest.raises(FileExistsError, match=r"a.gguf: exists"):
        export_adapter(good, tmp_path / "a.gguf", base=config)
    whole = (tmp_path / "a.gguf").read_bytes()
    for length in (0, 3, 30, 200, len(whole) // 2, len(whole) - 300):
        (tmp_path / "cut.gguf").write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"cut.gguf"):
            read_adapter(tmp_path / "cut.gguf")
    export_model(random_model(), tmp_path / "m.gguf")
    with pytest.raises(ValueError, match=r"m.gguf: holds a model, not an adapter"):
        read_adapter(tmp_path / "m.gguf")


def test_order_of_rows():
    """Element i of a head's first half and of its second stand next to each other in the file, head by head."""
    layout = Layout("llama", 1, heads=2, kv_heads=1)
    rows = torch.arange(8)
    assert layout.to_file("blk.0.attn_q.weight", rows).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert layout.to_file("blk.0.attn_k.weight", rows).tolist() == [0, 4, 1, 5, 2, 6, 3, 7]
    assert layout.to_file("blk.0.attn_v.weight", rows).tolist() == list(range(8))
    assert Layout("qwen2", 1, 2, 1).to_file("blk.0.attn_q.weight", rows).tolist() == list(range(8))
    for name in ("blk.0.attn_q.weight", "blk.0.attn_k.weight", "blk.0.attn_v.weight"):
        assert torch.equal(layout.from_file(name, layout.to_file(name, rows)), rows)
