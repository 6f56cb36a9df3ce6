"""Files that are wrong: one clear error each, naming file and key, and a model that is as it was."""

from __future__ import annotations

import json
import pickle
import re
import struct

import pytest
import torch
from adapter_models import Model, adapter_for
from test_adapters_attach import assert_unchanged, state

from dora_kernels import attach, load_adapter, read_adapter, save_adapter
from dora_kernels.adapters import FORMATS

pytest.importorskip("safetensors")
from safetensors.torch import load_file, save_file

NAMES = ["layers.0.q_proj", "layers.1.up_proj", "lm_head"]

# the keys of the last layer's parts
KEYS = {
    "peft": ("base_model.model.lm_head.lora_A.weight", "base_model.model.lm_head.lora_B.weight",
             "base_model.model.lm_head.lora_magnitude_vector"),
    "lycoris": ("lycoris_lm_head.lora_down.weight", "lycoris_lm_head.lora_up.weight", "lycoris_lm_head.dora_scale"),
    "kohya": ("lora_unet_lm_head.lora_down.weight", "lora_unet_lm_head.lora_up.weight", "lora_unet_lm_head.dora_scale"),
    "torchtune": ("lm_head.lora_a.weight", "lm_head.lora_b.weight", "lm_head.magnitude"),
    "nvidia": ("base_model.model.lm_head.lora_A.weight", "base_model.model.lm_head.lora_B.weight",
               "base_model.model.lm_head.weight_m_wdecomp.weight"),
    "qdora": ("lm_head.dora_layer.lora_A.weight", "lm_head.dora_layer.lora_B.weight",
              "lm_head.magnitude_layer.magnitude"),
    "mlx": ("lm_head.lora_a", "lm_head.lora_b", "lm_head.m"),
}  # fmt: skip


@pytest.fixture(params=KEYS)
def saved(request, tmp_path):
    """The format, the file in a folder of its own, and the keys of its last layer."""
    save_adapter(adapter_for(Model(), NAMES), tmp_path, format=request.param)
    file = tmp_path / FORMATS[request.param].weights
    assert set(KEYS[request.param]) < set(load_file(file))
    return request.param, file, KEYS[request.param]


def refused(file, message, error=ValueError, **options):
    """Both a base model and one that is adapted already are unchanged; the message names the file first."""
    for adapted in (False, True):
        model = Model()
        if adapted:
            attach(model, adapter_for(model, NAMES, seed=8))
        before = state(model)
        with pytest.raises(error, match=re.escape(f"{file}: ") + message):
            load_adapter(file, model, **options)
        assert_unchanged(model, before)


def change(file, changed):
    tensors = load_file(file)
    changed(tensors)
    save_file(tensors, file)


@pytest.mark.parametrize("part", [0, 1, 2])
def test_a_missing_tensor(saved, part):
    format, file, keys = saved
    change(file, lambda tensors: tensors.pop(keys[part]))
    refused(file, rf"\S*lm_head has no {re.escape(keys[part].partition('lm_head.')[2].removesuffix('.weight'))}")


@pytest.mark.parametrize("part", [0, 1, 2])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite(saved, part, value):
    format, file, keys = saved
    change(file, lambda tensors: tensors[keys[part]].view(-1)[-1:].fill_(value))
    refused(file, re.escape(keys[part]) + " has values that are not finite")


@pytest.mark.parametrize("part", [0, 1, 2])
def test_integers(saved, part):
    format, file, keys = saved
    change(file, lambda tensors: tensors.update({keys[part]: tensors[keys[part]].int()}))
    refused(file, re.escape(keys[part]) + " is of torch.int32, which is no floating-point type")


@pytest.mark.parametrize("part", [0, 1, 2])
def test_sizes(saved, part):
    """One row or one column less, no values at all, one dimension."""
    format, file, keys = saved
    whole = load_file(file)
    tensor = whole[keys[part]]
    for other in (tensor[:-1], tensor[..., :-1], tensor[:0], tensor.flatten()[:1], tensor[None]):
        if other.shape != tensor.shape and other.numel() != tensor.numel():
            save_file({**whole, keys[part]: other.contiguous()}, file)
            refused(file, r"\S*lm_head")


def test_truncated_and_oversized(saved):
    format, file, keys = saved
    whole = file.read_bytes()
    length = struct.unpack("<Q", whole[:8])[0]
    for content in (whole[:-4], whole[: 8 + length], whole[:20], whole[:8], b"", whole + b"\0\0\0\0",
                    struct.pack("<Q", 2**40) + whole[8:], struct.pack("<Q", length + 1) + whole[8:]):  # fmt: skip
        file.write_bytes(content)
        refused(file, "truncated, or not a safetensors file")


def test_a_part_that_is_unknown(saved):
    """A bias of lora_B changes the function: not left out as other tensors are."""
    format, file, keys = saved
    key = keys[1].removesuffix(".weight") + ".bias"
    change(file, lambda tensors: tensors.update({key: torch.ones(30)}))
    refused(file, re.escape(key) + " belongs to an adapted layer, but the format")


@pytest.mark.parametrize("part", ["alpha", "dora_scale", "reshape_weight", "lora_mid.weight", "diff_b", "lora_m"])
def test_a_part_of_another_format(saved, part):
    """Inside an adapted layer: nothing that could be left out."""
    format, file, keys = saved
    key = f"{keys[0].partition('lm_head')[0]}lm_head.{part}"
    if key not in load_file(file):
        change(file, lambda tensors: tensors.update({key: torch.ones(1)}))
        refused(file, r"\S*lm_head")


def test_another_model(saved):
    format, file, keys = saved
    changed = {key: key.replace("lm_head", "lm_tail") for key in load_file(file)}
    tensors = load_file(file)
    save_file({changed[key]: tensor for key, tensor in tensors.items()}, file)
    if format == "peft":  # whose ranks are by name
        config = file.with_name("adapter_config.json")
        config.write_text(config.read_text().replace("lm_head", "lm_tail"))
    refused(file, r"\S*lm_tail: the model has no such layer")


def test_two_keys_for_one_part(tmp_path):
    save_adapter(adapter_for(Model(), NAMES), tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    key = KEYS["peft"][1]
    change(file, lambda tensors: tensors.update({key.removeprefix("base_model.model."): tensors[key].clone()}))
    refused(file, rf"{re.escape(key)} and .*lora_B.weight are both the lora_B of lm_head|lm_head.lora_B.weight and")


def test_other_algorithms_of_lycoris(tmp_path):
    file = tmp_path / "file.safetensors"
    save_adapter(adapter_for(Model(), NAMES), file, format="lycoris")
    change(file, lambda tensors: tensors.update({"lycoris_other.hada_w1_a": torch.ones(3, 3)}))
    refused(file, "lycoris_other.hada_w1_a belongs to a LyCORIS algorithm that is not a product of two factors")
    save_file({"lycoris_other.lokr_w1": torch.ones(3, 3)}, file)
    refused(file, "not an adapter in a known format: its keys are lycoris_other.lokr_w1")


OTHER_KEYS = ["hada_w1_a", "lokr_w2", "lokr_t2", "oft_blocks", "boft_blocks", "a1.weight", "b2.weight", "w_norm",
              "b_norm", "diff", "diff_b", "on_input"]  # fmt: skip


@pytest.mark.parametrize("key", OTHER_KEYS)
def test_other_algorithms_by_the_end_of_the_key(tmp_path, key):
    """A module may be called as they are: ``model.diffusion_model``."""
    file = tmp_path / "file.safetensors"
    parts = {"lora_down.weight": torch.ones(2, 4), "lora_up.weight": torch.ones(3, 2), "alpha": torch.tensor(2.0)}
    names = [f"model.{key.partition('.')[0]}usion_model.q", f"x.{key.partition('.')[0]}.q"]
    save_file({f"{name}.{part}": tensor.clone() for name in names for part, tensor in parts.items()}, file)
    assert list(read_adapter(file).layers) == names
    change(file, lambda tensors: tensors.update({f"x.q.{key}": torch.ones(3)}))
    refused(file, re.escape(f"x.q.{key} belongs to a LyCORIS algorithm"))


@pytest.mark.parametrize("alpha", [torch.tensor(0.0), torch.tensor(float("nan")), torch.ones(2), torch.empty(0)])
def test_alpha_of_lycoris(tmp_path, alpha):
    file = tmp_path / "file.safetensors"
    save_adapter(adapter_for(Model(), NAMES), file, format="lycoris")
    change(file, lambda tensors: tensors.update({"lycoris_lm_head.alpha": alpha}))
    refused(file, "lycoris_lm_head.alpha: expected a number that is not 0, got")


class Dangerous:
    def __reduce__(self):
        return (pytest.fail, ("it was unpickled",))


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth", ".ckpt", ".safetensors"])
def test_pickles_are_never_read(tmp_path, suffix):
    file = tmp_path / f"adapter_model{suffix}"
    file.write_bytes(pickle.dumps(Dangerous()))
    safe = suffix == ".safetensors"
    refused(file, "truncated, or not a safetensors file" if safe else "a pickle, which can run any code")
    if not safe:
        refused(tmp_path, f"contains no safetensors file, only adapter_model{suffix}, a pickle", FileNotFoundError)
        with pytest.raises(ValueError, match="only written as safetensors"):
            save_adapter(adapter_for(Model(), NAMES), file, force=True)


def test_places(tmp_path):
    refused(tmp_path, "contains no safetensors file", FileNotFoundError)
    refused(tmp_path / "nothing", "no such file", FileNotFoundError)
    for name in ("one.safetensors", "two.safetensors"):
        save_adapter(adapter_for(Model(), NAMES), tmp_path / name, format="qdora")
    refused(tmp_path, "expected one adapter file, got one.safetensors, two.safetensors")
    (tmp_path / "two.safetensors").unlink()
    assert list(read_adapter(tmp_path).layers) == NAMES


def configure(folder, **values):
    """As by others, whose tensors do not say which configuration they were saved with."""
    for weights in folder.glob("*.safetensors"):
        change(weights, lambda tensors: None)
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))
    return file


CONFIGS = {
    "no r": ("peft", {"r": None}, "r: expected a number, got None"),
    "a word": ("peft", {"lora_alpha": "16"}, "lora_alpha: expected a number, got '16'"),
    "NaN": ("peft", {"lora_alpha": float("nan"), "alpha_pattern": {}}, "lora_alpha: expected a number, got nan"),
    "too large": ("torchtune", {"lora_alpha": 10**400}, "lora_alpha: expected a number, got 1000"),
    "bad pattern": ("peft", {"rank_pattern": {"(": 4}}, "rank_pattern: '(' is not a regular expression: missing )"),
    "no patterns": ("peft", {"alpha_pattern": [1]}, "alpha_pattern: expected a mapping of regular expressions"),
    "lora_bias": ("peft", {"lora_bias": True}, "lora_bias=True is not supported"),
    "replication": ("peft", {"layer_replication": [[0, 2]]}, "layer_replication=[[0, 2]] is not supported"),
    "aLoRA": ("peft", {"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens=[1, 2] is not supported"),
    "QALoRA": ("peft", {"use_qalora": True}, "use_qalora=True is not supported"),
    "BD-LoRA": ("peft", {"use_bdlora": {"nblocks": 2}}, "use_bdlora={'nblocks': 2} is not supported"),
    "Arrow": ("peft", {"arrow_config": {"top_k": 3}}, "arrow_config={'top_k': 3} is not supported"),
    "KaSA": ("peft", {"kasa_config": {"beta": 1e-4}}, "kasa_config={'beta': 0.0001} is not supported"),
    "MonteCLoRA": ("peft", {"monteclora_config": {"a": 1}}, "monteclora_config={'a': 1} is not supported"),
    "LoRA-GA": ("peft", {"init_lora_weights": "lora_ga"}, "init_lora_weights='lora_ga' changes the base weights"),
    "PiSSA": ("peft", {"init_lora_weights": "pissa_niter_4"}, "init_lora_weights='pissa_niter_4' changes the base"),
    "torchtune's rank": ("torchtune", {"lora_alpha": []}, "lora_alpha: expected a number, got []"),
    "AdaLoRA": ("peft", {"peft_type": "ADALORA"}, "peft_type: expected 'LORA', got 'ADALORA'"),
    "no scale": ("mlx", {"lora_parameters": 3}, "lora_parameters.scale: expected a number, got None"),
}


@pytest.mark.parametrize("what", CONFIGS)
def test_configurations(tmp_path, what):
    format, values, message = CONFIGS[what]
    save_adapter(adapter_for(Model(), NAMES), tmp_path, format=format)
    config = configure(tmp_path, **values)
    model = Model()
    before = state(model)
    with pytest.raises(ValueError, match=re.escape(f"{config}: {message}")):
        load_adapter(tmp_path, model)
    assert_unchanged(model, before)


def test_fields_of_peft(tmp_path):
    """One that is not known is named, unless it is off; PEFT's own, at their defaults, are all known."""
    save_adapter(adapter_for(Model(), NAMES), tmp_path)
    configure(tmp_path, use_tomorrow={"a": 1}, use_qalora=False, kasa_config=None, use_yesterday=False)
    notes = read_adapter(tmp_path).notes
    assert notes == ["use_tomorrow={'a': 1} in the configuration is unknown and was ignored"]
    peft = pytest.importorskip("peft")
    ours = json.loads((tmp_path / "adapter_config.json").read_text())
    configure(tmp_path, **{**peft.LoraConfig().to_dict(), **ours, "use_tomorrow": None})
    assert read_adapter(tmp_path).notes == []


def test_configurations_that_contradict_the_file(tmp_path):
    for format, values, message in (
        ("peft", {"use_dora": False}, "it has magnitudes, and .*adapter_config.json says use_dora=False"),
        ("peft", {"r": 5, "rank_pattern": {}}, r"layers.0.q_proj: lora_A \[2, 12\]: the configuration says rank 5"),
        ("torchtune", {"r": 5}, r"layers.0.q_proj: lora_A \[4, 12\]: the configuration says rank 5"),
        ("mlx", {"fine_tune_type": "lora"}, "it has magnitudes, and .*adapter_config.json says fine_tune_type='lora'"),
    ):
        folder = tmp_path / f"{format}-{'-'.join(values)}"
        save_adapter(adapter_for(Model(), NAMES), folder, format=format)
        configure(folder, **values)
        refused(folder / FORMATS[format].weights, message)
    for content in ("{", "[]", "[" * 100_000):
        (folder / "adapter_config.json").write_text(content)
        with pytest.raises(ValueError, match="adapter_config.json: not a valid adapter configuration"):
            read_adapter(folder)


def test_arguments(tmp_path):
    save_adapter(adapter_for(Model(), NAMES), tmp_path)
    with pytest.raises(ValueError, match="format: expected one of 'auto', 'peft', .* got 'PEFT'"):
        read_adapter(tmp_path, format="PEFT")
    with pytest.raises(ValueError, match="magnitude_axis: expected 'out' or 'in', got 0"):
        read_adapter(tmp_path, magnitude_axis=0)
    with pytest.raises(ValueError, match="scaling: expected a finite number, got inf"):
        read_adapter(tmp_path, scaling=float("inf"))
    with pytest.raises(TypeError, match="path: expected a str or os.PathLike, got int"):
        read_adapter(3)
    with pytest.raises(TypeError, match="model: expected a torch.nn.Module, got dict"):
        load_adapter(tmp_path, {})
    with pytest.raises(TypeError, match="source: expected a torch.nn.Module or an Adapter, got str"):
        save_adapter("model", tmp_path)


def raw(file, header, data=b""):
    content = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(content)) + content + data)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("shape", [[0, 2**62, 2**62], [0, 2**64 - 1], [2**63], [2**70], [-1], [0] * 5000, [[1]]])
def test_shapes_that_no_tensor_has(tmp_path, shape):
    """Without values there may be any; the package safetensors lets torch's own errors through."""
    file = tmp_path / "adapter_model.safetensors"
    keys = ("lm_head.lora_A.weight", "lm_head.lora_B.weight")
    raw(file, {key: {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]} for key in keys})
    refused(file, "")
    with pytest.raises(ValueError) as error:
        read_adapter(file)
    assert len(str(error.value)) < 1000


UNNAMES = [20_000 * "a.", 7_000 * "lora_A", 9_000 * "a.lora_A.", "lm_head.\x1b[31mx", "a\nb", "a\u202eb"]


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", UNNAMES)
def test_names_that_no_module_has(saved, name):
    """The search for the module that a long one is inside took the square of its length; escapes reach a terminal."""
    format, file, keys = saved
    change(file, lambda tensors: tensors.update({name: torch.ones(1)}))
    refused(file, f"a name {f'of {len(name)} characters' if len(name) > 1000 else 'with characters that cannot be'}")
    with pytest.raises(ValueError) as error:
        read_adapter(file)
    assert str(error.value).isprintable() and len(str(error.value)) < 1000


@pytest.mark.timeout(60)
def test_many_long_names_inside_a_layer(saved):
    """As long as a name may be: each is looked up by its prefixes, without a copy of its parts for each."""
    format, file, keys = saved
    tensors = {f"{496 * 'a.'}{i:05}": torch.ones(0) for i in range(300)}
    change(file, lambda whole: whole.update(tensors))
    assert any("299 more: not part of the adapter, but beside it" in note for note in read_adapter(file).notes)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
def test_patterns_that_take_for_ever(tmp_path, field):
    save_adapter(adapter_for(Model(), NAMES, rank=3, scaling=1.0), tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    long = 900 * "a"
    save_file({key.replace("lm_head", long): tensor for key, tensor in load_file(file).items()}, file)
    config = configure(tmp_path, **{field: {r"(([a-z]+)+[a-z]+)+!": 7, ".*" * 20 + "!": 8}})
    assert {layer.scaling for layer in read_adapter(tmp_path).layers.values()} == {1.0}
    configure(tmp_path, **{field: {f".*{'(a{1,90}' * 5}{'){1,90}' * 5}!{i}": 7 for i in range(200)}})
    with pytest.raises(ValueError, match=re.escape(f"{config}: {field}: to match the regular expressions takes more")):
        read_adapter(tmp_path)


@pytest.mark.timeout(60)
def test_configurations_that_are_nested_deeply(tmp_path):
    save_adapter(adapter_for(Model(), NAMES), tmp_path)
    config = tmp_path / "adapter_config.json"
    for depth in (101, 600, 900, 100_000):
        for text in ('{"a":' * depth + "1" + "}" * depth, '{"a":' + "[" * depth + "]" * depth + "}"):
            config.write_text(text)
            with pytest.raises(ValueError, match=f"{re.escape(str(config))}: not a valid adapter configuration: "):
                read_adapter(tmp_path)


def test_what_a_configuration_says_is_shown_in_part(tmp_path):
    """Notes and errors have neither megabytes of it nor its control characters."""
    save_adapter(adapter_for(Model(), NAMES), tmp_path)
    configure(tmp_path, **{"\x1b[2J": 1_000_000 * "x", "y" * 1_000_000: "\x1b[2J", "z": [[1] * 10**5]})
    notes = read_adapter(tmp_path).notes
    assert len(notes) == 3 and all(note.isprintable() and len(note) < 600 for note in notes)
    huge = 1_000_000 * "\x1b[2J"
    wrong = [{"r": huge}, {"lora_alpha": [huge]}, {"peft_type": huge}, {"lora_bias": huge}, {"rank_pattern": huge},
             {"rank_pattern": {huge + "(": 1}}, {"init_lora_weights": "pissa" + huge},
             {"alpha_pattern": {"q_proj": huge}}, {"use_dora": False, "task_type": huge}]  # fmt: skip
    for values in wrong:
        folder = tmp_path / next(iter(values))
        save_adapter(adapter_for(Model(), NAMES), folder, force=True)
        configure(folder, **values)
        with pytest.raises(ValueError) as error:
            read_adapter(folder)
        assert str(error.value).isprintable() and len(str(error.value)) < 1000, values.keys()
