"""Writing: nothing is overwritten unasked, and no old file is lost, whatever fails and when."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from adapter_models import Model, adapter_for, assert_same_function

import dora_kernels
from dora_kernels import read_adapter, save_adapter
from dora_kernels.adapters import FORMATS
from dora_kernels.files import storage

pytest.importorskip("safetensors")
import safetensors.torch

NAMES = ["layers.0.q_proj", "layers.1.up_proj", "lm_head"]
FORMATS_OF_TWO_FILES = [name for name, format in FORMATS.items() if format.configured]

ROOT, SUPPORT = Path(dora_kernels.__file__).parents[1], Path(__file__).parents[1] / "support"


def content(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.fixture
def old(tmp_path):
    """A folder with an adapter, the bytes in it, and another adapter to write there."""
    save_adapter(adapter_for(Model(), NAMES), tmp_path)
    return tmp_path, content(tmp_path), adapter_for(Model(), NAMES, seed=2, rank=6)


def test_nothing_is_overwritten_unasked(old):
    folder, before, other = old
    with pytest.raises(FileExistsError, match="adapter_model.safetensors: exists already; force=True overwrites it"):
        save_adapter(other, folder)
    assert content(folder) == before
    save_adapter(other, folder, force=True)
    assert content(folder).keys() == before.keys()
    assert_same_function(Model(), read_adapter(folder), other)
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(FileExistsError, match="adapter_config.json: exists already"):
        save_adapter(other, folder)
    assert not (folder / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("there", FORMATS)
@pytest.mark.parametrize("format", FORMATS)
def test_a_folder_with_another_formats_adapter(tmp_path, format, there):
    """It is exchanged as a whole, or not touched, with and without force."""
    save_adapter(adapter_for(Model(), NAMES), tmp_path, format=there)
    before = content(tmp_path)
    for force in (False, True):
        try:
            save_adapter(adapter_for(Model(), NAMES, seed=2, rank=6), tmp_path, format=format, force=force)
        except FileExistsError:
            assert content(tmp_path) == before
            assert format != there or not force
            read_adapter(tmp_path)
        else:
            assert force
            both = {FORMATS[format].weights, "adapter_config.json"} if FORMATS[format].configured else {
                FORMATS[format].weights}  # fmt: skip
            assert content(tmp_path).keys() == both
            assert read_adapter(tmp_path).format == format


def test_a_file_of_its_own_in_such_a_folder(tmp_path):
    save_adapter(adapter_for(Model(), NAMES), tmp_path)
    save_adapter(adapter_for(Model(), NAMES), tmp_path / "other.safetensors", format="lycoris")
    with pytest.raises(FileExistsError, match="contains adapter_config.json of an adapter in another format than"):
        save_adapter(adapter_for(Model(), NAMES), tmp_path / "adapter_model.safetensors", format="lycoris", force=True)
    with pytest.raises(FileExistsError, match="contains adapter_model.safetensors of .* 'mlx'; choose another folder"):
        save_adapter(adapter_for(Model(), NAMES), tmp_path, format="mlx", force=True)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("second", [False, True])
def test_a_write_that_fails_half_way(tmp_path, monkeypatch, format, second):
    """In the tensors' file, or in the configuration when the tensors are complete."""
    if second and format not in FORMATS_OF_TWO_FILES:
        return
    save_adapter(adapter_for(Model(), NAMES), tmp_path, format=format)
    before = content(tmp_path)
    written = []

    def half(target, *args):
        Path(target).write_bytes(b"half a file")
        written.append(target)
        raise OSError(28, "No space left on device")

    if second:
        monkeypatch.setattr(storage, "save_json", half)
    else:
        monkeypatch.setattr(safetensors.torch, "save_file", lambda tensors, file, metadata: half(file))
    with pytest.raises(OSError, match="No space left"):
        save_adapter(adapter_for(Model(), NAMES, seed=2), tmp_path, format=format, force=True)
    assert len(written) == 1 and Path(written[0]).parent == tmp_path  # beside, so that moving it is one step
    assert content(tmp_path) == before


@pytest.mark.parametrize("moment", ["storage.save_json", "os.fsync", "replacing.exchange"])
def test_a_process_that_dies(old, moment):
    """Killed before the first file is in its place, the old ones are whole: leftovers have names of their own."""
    folder, before, _ = old
    module, name = moment.split(".")
    code = f"""
        import os, sys
        sys.path[:0] = {[str(ROOT), str(SUPPORT)]!r}
        from dora_kernels import save_adapter
        from dora_kernels.files import replacing, storage
        from adapter_models import Model, adapter_for
        {module}.{name} = lambda *args: os._exit(9)
        save_adapter(adapter_for(Model(), {NAMES!r}, seed=2), {str(folder)!r}, force=True)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, timeout=120)
    assert done.returncode == 9, done.stderr
    after = content(folder)
    assert {name: after[name] for name in before} == before
    assert all(name.startswith(".") and name.endswith(".tmp") for name in after.keys() - before.keys())
    read_adapter(folder)


def test_what_cannot_be_written_leaves_no_folder(tmp_path):
    adapter = adapter_for(Model(), NAMES)
    adapter.layers["lm_head"].lora_B[0, 0] = float("nan")
    with pytest.raises(ValueError, match="source: base_model.model.lm_head.lora_B.weight has values that are not"):
        save_adapter(adapter, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    with pytest.raises(ValueError, match="file.safetensors: the format 'peft' has a configuration .*so pass a folder"):
        save_adapter(adapter_for(Model(), NAMES), tmp_path / "file.safetensors")
    (tmp_path / "folder.safetensors" / "adapter_model.safetensors").mkdir(parents=True)
    with pytest.raises(IsADirectoryError):
        save_adapter(adapter_for(Model(), NAMES), tmp_path / "folder.safetensors", force=True)


@pytest.mark.parametrize("format", FORMATS)
def test_scalings(tmp_path, format):
    """What is written is read again; what no reader takes is no file's."""
    for scaling in (1e20, -1e20, 1e-30, -2.0):
        adapter, model = adapter_for(Model(), NAMES, scaling=scaling), Model()
        save_adapter(adapter, tmp_path, format=format, force=True)
        assert_same_function(model, read_adapter(tmp_path, model), adapter, 1e-6)
    before = content(tmp_path)
    said = f"{NAMES[0]} cannot be written as '{format}': scaling .*: expected a finite number"
    for scaling in (float("nan"), float("inf"), -float("inf"), 1e300, 1e21):
        with pytest.raises(ValueError, match=said):
            save_adapter(adapter_for(Model(), NAMES, scaling=scaling), tmp_path, format=format, force=True)
    with pytest.raises(ValueError, match="eps nan: expected a finite number"):
        save_adapter(adapter_for(Model(), NAMES, eps=float("nan")), tmp_path, format=format, force=True)
    assert content(tmp_path) == before


def test_json_has_no_nan(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        storage.save_json(tmp_path / "file.json", {"a": float("nan")})


def test_permissions(tmp_path):
    """As any other new file's, not the temporary file's."""
    save_adapter(adapter_for(Model(), NAMES), tmp_path)
    (tmp_path / "other").write_text("")
    modes = {stat.S_IMODE(os.stat(file).st_mode) for file in tmp_path.iterdir()}
    assert len(modes) == 1


def test_tensors_that_share_memory_or_are_views(tmp_path):
    adapter = adapter_for(Model(), ["layers.0.q_proj"])
    adapter.layers["layers.1.q_proj"] = adapter.layers["layers.0.q_proj"]
    layer = adapter_for(Model(), ["lm_head"]).layers["lm_head"]
    object.__setattr__(layer, "lora_A", torch.stack([layer.lora_A, layer.lora_A], dim=2)[..., 0].requires_grad_())
    adapter.layers["lm_head"] = layer
    save_adapter(adapter, tmp_path)
    assert_same_function(Model(), read_adapter(tmp_path), adapter, 0.0)
