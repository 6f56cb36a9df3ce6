"""`dora-kernels convert` and `dora-kernels inspect`: adapters of a small model in all formats."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("rich")
pytest.importorskip("safetensors")

import rich.console
from adapter_models import Model, adapted64, adapter_for, assert_same_function, norm64
from safetensors.torch import load_file, save_file

from dora_kernels import cli
from dora_kernels.adapters import FORMATS, Adapter, read_adapter, save_adapter

NAMES = ["layers.0.q_proj", "layers.0.up_proj", "layers.1.down"]


@pytest.fixture
def base(tmp_path):
    model = Model()
    (tmp_path / "base").mkdir()
    save_file(model.state_dict(), tmp_path / "base" / "model.safetensors")
    return tmp_path / "base"


def saved(place, adapter, format="peft"):
    save_adapter(adapter, place, format=format)
    return place


# convert


@pytest.mark.parametrize("source", list(FORMATS))
@pytest.mark.parametrize("target", ["peft", "kohya"])
def test_convert(call, tmp_path, base, source, target):
    """The same function, with and without the base model's names."""
    model, adapter = Model(), adapter_for(Model(), NAMES, rank=3, scaling=0.5)
    saved(tmp_path / "in", adapter, source)
    status, stdout, stderr = call("convert", tmp_path / "in", tmp_path / "out", "--to", target, "--base", base)
    assert (status, stderr) == (0, ""), stderr
    assert f"{source}, 3 layers" in stdout.replace("\n", " ") and f"{tmp_path / 'out'}: {target}" in stdout
    assert_same_function(model, read_adapter(tmp_path / "out", model, format=target, magnitude_axis="out"), adapter)


def test_convert_takes_an_axis_and_a_format(call, tmp_path):
    adapter = adapter_for(Model(), NAMES[:1], axis="in", rank=3)
    saved(tmp_path / "in", adapter, "lycoris")
    place = tmp_path / "in"
    status, _, stderr = call("convert", place, tmp_path / "out", "--to", "lycoris", "--from", "lycoris", "--axis", "in")
    assert (status, stderr) == (0, "")
    again = read_adapter(tmp_path / "out", Model(), format="lycoris", magnitude_axis="in")
    assert_same_function(Model(), again, adapter)
    status, _, stderr = call("convert", place, tmp_path / "peft", "--to", "peft", "--axis", "in")
    assert status == 2 and stderr.startswith("error: ") and stderr.count("\n") == 1 and "q_proj" in stderr
    assert not (tmp_path / "peft").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["convert", "in", "in", "--to", "peft"], "exists already; --force overwrites it"),
        (["convert", "in", "in", "--to", "peft", "--scaling", "x"], "--scaling: expected a finite number, got 'x'"),
        (["inspect", "in", "--scaling", "nan"], "--scaling: expected a finite number, got 'nan'"),
        (["merge", "base", "in", "out", "--scaling", "inf"], "--scaling: expected a finite number, got 'inf'"),
        (["merge", "base", "in", "out", "--strength", "abc"], "--strength: expected a finite number, got 'abc'"),
        (["merge", "base", "in", "out", "--strength", "-inf"], "--strength: expected a finite number, got '-inf'"),
        (["merge", "base", "in", "out", "--seed", "1.5"], "--seed: expected a whole number from 0 to"),
        (["merge", "base", "in", "out", "--seed", "-1"], "got '-1'"),
        (["merge", "base", "in", "out", "--rounding", "up"], "--rounding: expected 'nearest' or 'stochastic'"),
        (["convert", "bare", "out", "--to", "peft"], "pass --scaling to read it anyway"),
        (["inspect", "bare"], "pass --scaling to read it anyway"),
        (["merge", "base", "bare", "out"], "pass --scaling to read it anyway"),
        (["inspect", "square"], "pass --axis 'out' or 'in'"),
        (["inspect", "in", "--axis", "in"], "--axis 'out' would fit"),
        (["inspect", "in", "--from", "mlx"], "--from 'mlx', but its keys are"),
        (["merge", "base", "in", "out", "--from", "mlx"], "--from 'mlx', but its keys are"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_errors_name_the_commands_options(call, tmp_path, base, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    saved(tmp_path / "in", adapter_for(Model(), NAMES, rank=3))
    saved(tmp_path / "bare", adapter_for(Model(), NAMES, rank=3))
    (tmp_path / "bare" / "adapter_config.json").unlink()
    saved(tmp_path / "square", adapter_for(Model(), NAMES[:1], rank=3), "lycoris")
    file = tmp_path / "square" / "adapter_model.safetensors"
    save_file({key: tensor.flatten() if "scale" in key else tensor for key, tensor in load_file(file).items()}, file)
    status, stdout, stderr = call(*arguments)
    assert (status, stdout) == (2, "") and stderr.count("\n") == 1 and words in stderr, stderr
    assert not (tmp_path / "out").exists()


def test_a_scaling_that_no_file_says(call, tmp_path, base):
    """Of a file without its configuration: what every command asks for helps."""
    adapter = adapter_for(Model(), NAMES, rank=3, scaling=0.5)
    saved(tmp_path / "in", adapter)
    (tmp_path / "in" / "adapter_config.json").unlink()
    options = ["--scaling", "0.5", "--from", "peft"]
    assert call("convert", tmp_path / "in", tmp_path / "out", "--to", "peft", *options)[0] == 0
    assert_same_function(Model(), read_adapter(tmp_path / "out"), adapter)
    found = json.loads(call("inspect", tmp_path / "in", "--json", *options)[1])
    assert {layer["scaling"] for layer in found["layers"].values()} == {0.5}
    assert call("merge", base, tmp_path / "in", tmp_path / "merged", *options)[0] == 0
    merged = load_file(tmp_path / "merged" / "model.safetensors")[f"{NAMES[1]}.weight"]
    wanted = adapted64(Model().get_submodule(NAMES[1]), adapter.layers[NAMES[1]])
    torch.testing.assert_close(merged.double(), wanted, rtol=1e-5, atol=1e-6)


# inspect


@pytest.mark.parametrize("format", list(FORMATS))
def test_inspect(call, tmp_path, base, format):
    adapter = adapter_for(Model(), NAMES, rank=3, scaling=0.5)
    saved(tmp_path / "in", adapter, format)
    status, stdout, stderr = call("inspect", tmp_path / "in", "--base", base, "--axis", "out", "--json")
    assert (status, stderr) == (0, ""), stderr
    found = json.loads(stdout)
    assert found["format"] in (format, "lycoris", "kohya") and not found["suspicious"]
    assert found["layers"].keys() == set(NAMES)
    for name, layer in found["layers"].items():
        own = adapter.layers[name]
        assert (layer["kind"], layer["rank"], layer["axis"], layer["dtypes"]) == ("linear", 3, "out", ["float32"])
        low = layer["scaling"] * layer["norm_A"] * layer["norm_B"]
        assert low == pytest.approx(float(0.5 * own.lora_A.norm() * own.lora_B.norm()), rel=1e-5)
        assert layer["magnitude"]["max"] == pytest.approx(float(own.magnitude.max()))
        direction = adapted64(Model().get_submodule(name), replace(own, magnitude=None))
        scale = own.magnitude.double() / norm64(direction, "out").flatten()
        assert layer["g"]["median"] == pytest.approx(float(scale.median()), rel=1e-5)
        assert layer["g"]["min"] == pytest.approx(float(scale.min()), rel=1e-5)
    count = sum(len(layer.magnitude) for layer in adapter.layers.values())
    for histogram in (found["magnitudes"], found["g"]):
        assert sum(histogram["counts"]) == count and len(histogram["edges"]) == len(histogram["counts"]) + 1


def test_inspect_prints_tables_and_histograms(call, tmp_path, base):
    adapter = adapter_for(Model(), NAMES, rank=3, scaling=0.5)
    saved(tmp_path / "in", adapter)
    status, stdout, stderr = call("inspect", tmp_path / "in", "--base", base)
    assert (status, stderr) == (0, "")
    rows = [line.split() for line in stdout.splitlines()]
    assert ["layer", "kind", "rank", "scaling", "axis", "|A|", "|B|", "magnitude", "g"] in rows
    assert all(any(row[:5] == [name, "linear", "3", "0.5", "out"] for row in rows) for name in NAMES)
    assert "magnitudes:" in stdout and "g = magnitude / norm:" in stdout and "█" in stdout
    assert "suspicious" not in stdout
    plain = adapter_for(Model(), NAMES, plain=True, rank=2, scaling=1.0)
    saved(tmp_path / "plain", plain)
    status, stdout, _ = call("inspect", tmp_path / "plain")
    assert status == 0 and "magnitudes:" not in stdout and "none" in stdout


def test_inspect_counts_layers(call, tmp_path):
    """Layer 2 stands before layer 10."""
    layer = adapter_for(Model(), NAMES[:1], rank=3).layers[NAMES[0]]
    saved(tmp_path / "a", Adapter({f"blocks.{index}.q": layer for index in (10, 2, 1)}))
    _, stdout, _ = call("inspect", tmp_path / "a")
    assert [line.split()[0] for line in stdout.splitlines() if line.startswith("blocks")] == [
        "blocks.1.q", "blocks.2.q", "blocks.10.q",
    ]  # fmt: skip


@pytest.mark.parametrize("terminal", [False, True])
def test_inspect_prints_long_names_whole(call, tmp_path, monkeypatch, terminal):
    """In a line of any length where nobody watches, folded on a terminal."""
    name = ".".join(["encoder_block_number"] * 9) + ".q"
    adapter = adapter_for(Model(), NAMES[:1], rank=3, scaling=0.5)
    saved(tmp_path / "in", Adapter({name: adapter.layers[NAMES[0]]}))
    if terminal:
        monkeypatch.setattr("dora_kernels.cli.inspect.console", lambda: rich.console.Console(width=100, markup=False))
    status, stdout, _ = call("inspect", tmp_path / "in")
    assert status == 0
    lines = stdout.splitlines()
    start = next(i for i, line in enumerate(lines) if "|A|" in line)
    row = lines[start + 1].split()
    assert row[1:5] == ["linear", "3", "0.5", "out"] and row[-1] != "..." and len(row) == 12, stdout
    if not terminal:
        assert row[0] == name
        return
    folded = row[0] + "".join(line.strip() for line in lines[start + 2 : lines.index("", start)])
    assert folded == name and max(map(len, lines[start:])) <= 100


def single(place, **tensors):
    """An adapter of one layer ``q`` with 8 inputs and 6 outputs."""
    place.mkdir()
    torch.manual_seed(0)
    parts = {"lora_A.weight": torch.randn(2, 8), "lora_B.weight": torch.randn(6, 2),
             "lora_magnitude_vector": torch.ones(6), **tensors}  # fmt: skip
    save_file({f"base_model.model.q.{part}": tensor for part, tensor in parts.items()},
              place / "adapter_model.safetensors")  # fmt: skip
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "use_dora": True}
    (place / "adapter_config.json").write_text(json.dumps(config))
    return place


@pytest.mark.parametrize(
    ("tensors", "norm_b", "largest"),
    [
        ({"lora_B.weight": torch.full((6, 2), 1e25).bfloat16()}, float(torch.tensor(1e25).bfloat16()) * 12**0.5, 1.0),
        ({"lora_B.weight": torch.full((6, 2), 1e300, dtype=torch.float64)}, 1e300 * 12**0.5, 1.0),
        ({"lora_B.weight": torch.full((6, 2), 1.7e308, dtype=torch.float64)}, None, 1.0),
        ({"lora_magnitude_vector": torch.tensor([3e38, -3e38, 0, 1, 2, 3])}, 0, 3e38),
        ({"lora_magnitude_vector": torch.tensor([1.7e308, -1.7e308, 0, 1, 2, 3], dtype=torch.float64)}, 0, 1.7e308),
        ({"lora_magnitude_vector": torch.zeros(6)}, 0, 0.0),
    ],
    ids=["bf16", "squares", "sums", "float32", "float64", "zeros"],
)  # fmt: skip
def test_inspect_of_huge_values(call, tmp_path, tensors, norm_b, largest):
    """Whatever is finite is shown; what exceeds float64 is null in JSON."""
    place = single(tmp_path / "in", **tensors)
    status, stdout, stderr = call("inspect", place, "--json")
    assert (status, stderr) == (0, "")
    found = json.loads(stdout)
    layer, histogram = found["layers"]["q"], found["magnitudes"]
    assert layer["norm_B"] == (norm_b if norm_b is None else pytest.approx(norm_b or layer["norm_B"], rel=1e-6))
    assert layer["magnitude"]["max"] == pytest.approx(largest, rel=1e-6)
    assert sum(histogram["counts"]) == 6 and histogram["edges"][-1] == pytest.approx(largest, rel=1e-6)
    status, stdout, stderr = call("inspect", place)
    assert (status, stderr) == (0, "") and ("not finite" in stdout) == (norm_b is None)


def test_inspect_of_scales_that_are_not_finite(call, tmp_path):
    """Suspicious, and null."""
    (tmp_path / "base").mkdir()
    weight, magnitude = torch.randn(6, 8, dtype=torch.float64), torch.ones(6, dtype=torch.float64)
    weight[0] *= 1e-150
    magnitude[0] = 1e300
    save_file({"q.weight": weight}, tmp_path / "base" / "model.safetensors")
    place = single(tmp_path / "in", **{"lora_B.weight": torch.zeros(6, 2), "lora_magnitude_vector": magnitude})
    status, stdout, stderr = call("inspect", place, "--base", tmp_path / "base", "--json")
    assert (status, stderr) == (0, "")
    found = json.loads(stdout)
    assert found["layers"]["q"]["g"]["max"] is None and sum(found["g"]["counts"]) == 5
    assert any("magnitudes are not within" in text for text in found["suspicious"])


def test_an_ascii_output(tmp_path, monkeypatch):
    place = single(tmp_path / "n\xe4h")
    with (tmp_path / "stdout").open("w", encoding="ascii") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        assert cli.main(["inspect", str(place)]) == 0
    written = (tmp_path / "stdout").read_text()
    assert "n\\xe4h: peft" in written and "####" in written


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
@pytest.mark.parametrize("options", [[], ["--json"]])
@pytest.mark.parametrize("buffered", [True, False])
def test_a_full_device(tmp_path, monkeypatch, capsys, options, buffered):
    """A line, and no traceback, also when Python ends."""
    place = single(tmp_path / "in")
    opened = open("/dev/full", "wb", -1 if buffered else 0)  # noqa: SIM115
    with io.TextIOWrapper(opened, write_through=not buffered) as stdout, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stdout)
        assert cli.main(["inspect", str(place), *options]) == 2
    assert capsys.readouterr().err == "error: standard output: No space left on device\n"


COMMANDS = {
    "help": ["--help"],
    "no command": [],
    "doctor": ["doctor"],
    "doctor, json": ["doctor", "--json"],
    "parity": ["parity", "--shape", "3,4,5", "--rank", "2", "--dtype", "float32", "--axis", "out", "--device", "cpu"],
    "tune": ["tune", "4x5x2", "--tokens", "1", "--seconds", "1", "--device", "cpu"],
    "convert": ["convert", "in", "out", "--to", "lycoris"],
    "merge": ["merge", "base", "in", "out"],
    "inspect": ["inspect", "in"],
    "inspect, json": ["inspect", "in", "--json"],
    "serve-check": ["serve-check", "base", "in"],
    "serve-check, json": ["serve-check", "base", "in", "--json"],
}


@pytest.mark.parametrize("arguments", COMMANDS.values(), ids=COMMANDS)
@pytest.mark.parametrize("buffered", [True, False])
def test_a_reader_that_has_gone(tmp_path, base, monkeypatch, capsys, arguments, buffered):
    """As ``| head -1``: every command ends without a word, with a shell's status, and what it writes is complete."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DORA_KERNELS_CACHE", str(tmp_path / "cache"))
    saved(tmp_path / "in", adapter_for(Model(), NAMES, rank=3))
    reading, writing = os.pipe()
    os.close(reading)
    with io.TextIOWrapper(open(writing, "wb", -1 if buffered else 0), write_through=not buffered) as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        assert cli.main(arguments) == 141
    said = capsys.readouterr().err
    assert said == "" or (arguments[0] == "tune" and "error" not in said)  # which shows its progress
    assert (tmp_path / "out").exists() == (arguments[:1] in (["convert"], ["merge"]))


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_reader_that_has_gone_when_python_ends(tmp_path, stream):
    """Of a message on standard error too."""
    single(tmp_path / "in")
    reading, writing = os.pipe()
    os.close(reading)
    program = [sys.executable, "-m", "dora_kernels", "inspect", str(tmp_path / ("in" if stream == "stdout" else "no"))]
    done = subprocess.run(program, **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, stream: writing})
    os.close(writing)
    assert (done.returncode, done.stdout or b"", done.stderr or b"") == (141, b"", b"")


PREFIX = f"base_model.model.{NAMES[1]}."


def zero(key, rows=slice(None)):
    def change(tensors):
        tensors[PREFIX + key][rows] = 0.0

    return change


def scale(factor, rows):
    def change(tensors):
        tensors[PREFIX + "lora_magnitude_vector"][rows] *= factor

    return change


def to_half(tensors):
    tensors[PREFIX + "lora_B.weight"] = tensors[PREFIX + "lora_B.weight"].half()


def all_to_half(tensors):
    tensors.update({key: tensor.half() for key, tensor in tensors.items() if key.startswith(PREFIX)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (zero("lora_B.weight"), "layers.0.up_proj: lora_B is all zero: untrained"),
        (zero("lora_A.weight"), "layers.0.up_proj: lora_A is all zero"),
        (zero("lora_magnitude_vector", slice(0, 2)), "layers.0.up_proj: 2 of 20 magnitudes are zero"),
        (scale(-1.0, slice(0, 3)), "layers.0.up_proj: 3 of 20 magnitudes are negative"),
        (scale(9.0, slice(0, 4)), "layers.0.up_proj: 4 magnitudes are not within 0.5 to 2"),
        (to_half, "layers.0.up_proj: dtypes are mixed: float16, float32"),
        (all_to_half, "layers are of different dtypes: float16, float32"),
    ],
)
def test_suspicious_values(call, tmp_path, base, change, message):
    """Named, with status 0; each alone."""
    saved(tmp_path / "in", adapter_for(Model(), NAMES, rank=3, scaling=0.5))
    file = tmp_path / "in" / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    status, stdout, stderr = call("inspect", tmp_path / "in", "--base", base)
    assert (status, stderr) == (0, "")
    lines = [line for line in stdout.splitlines() if line.startswith("suspicious: ")]
    assert any(message in line for line in lines), stdout


@pytest.mark.parametrize("format", ["mlx", "torchtune", "peft"])
def test_ranks_that_are_not_the_configurations(call, tmp_path, format):
    """Of MLX, whose scaling does not depend on it; of others that is an error."""
    saved(tmp_path / "in", adapter_for(Model(), NAMES, rank=3, scaling=0.5), format)
    file = tmp_path / "in" / "adapter_config.json"
    config = json.loads(file.read_text())
    status, stdout, _ = call("inspect", tmp_path / "in")
    assert status == 0 and "suspicious" not in stdout
    (config["lora_parameters"] if format == "mlx" else config)["rank" if format == "mlx" else "r"] = 2
    weights = tmp_path / "in" / FORMATS[format].weights
    save_file(load_file(weights), weights)  # as others, which do not say what configuration belongs to it
    file.write_text(json.dumps(config))
    status, stdout, stderr = call("inspect", tmp_path / "in")
    if format == "mlx":
        assert status == 0 and "suspicious: layers.0.up_proj: rank 3, the configuration says 2" in stdout
    else:
        assert (status, stdout) == (2, "") and ": the configuration says rank 2" in stderr


def test_damaged_files(call, tmp_path):
    """Not only suspicious: an error that names the key, and status 2."""
    saved(tmp_path / "in", adapter_for(Model(), NAMES, rank=3, scaling=0.5))
    file = tmp_path / "in" / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors[PREFIX + "lora_magnitude_vector"][3] = float("nan")
    save_file(tensors, file)
    status, stdout, stderr = call("inspect", tmp_path / "in")
    assert (status, stdout) == (2, "") and PREFIX + "lora_magnitude_vector" in stderr and stderr.count("\n") == 1
    file.write_bytes(file.read_bytes()[:-8])
    status, stdout, stderr = call("inspect", tmp_path / "in")
    assert (status, stdout) == (2, "") and str(file) in stderr and "truncated" in stderr


def test_without_the_extra(call, tmp_path, monkeypatch):
    saved(tmp_path / "in", adapter_for(Model(), NAMES, rank=3))
    monkeypatch.setitem(sys.modules, "safetensors", None)
    line = "error: adapter files need safetensors: pip install 'dora-kernels[files]'\n"
    assert call("inspect", tmp_path / "in") == (2, "", line)


def test_help_names_the_formats(call):
    for command in ("convert", "merge", "inspect"):
        assert call(command, "--help")[0] == 0
    assert all(name in call("convert", "--help")[1] for name in (*FORMATS, "vllm", "sglang"))

