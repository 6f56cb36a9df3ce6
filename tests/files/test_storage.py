"""Files on their way to the disk and back: killed between two of them, on a full disk, by several processes at once."""

from __future__ import annotations

import errno
import json
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
from dora_kernels.files import replacing, storage

pytest.importorskip("safetensors")
from safetensors.torch import load_file, save_file

NAMES = ["layers.0.q_proj", "layers.1.up_proj", "lm_head"]
CONFIGURED = [name for name, format in FORMATS.items() if format.configured]
MIXED = "it was not saved with .*adapter_config.json, which has another .*: one of the two is of another save"

posix = pytest.mark.skipif(not hasattr(os, "fork"), reason="POSIX's files")

ROOT = Path(dora_kernels.__file__).parents[1]


def content(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


PREAMBLE = f"""
import os, sys
sys.path[:0] = {[str(ROOT), str(ROOT / "tests" / "support")]!r}
from dora_kernels import read_adapter, save_adapter
from dora_kernels.files import replacing, storage
from adapter_models import Model, adapter_for
names = {NAMES!r}
"""


def run(code, *arguments):
    """A script in a process of its own."""
    command = [sys.executable, "-c", PREAMBLE + textwrap.dedent(code), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.fixture(params=["at once", "by renaming", "without links"])
def way(request, monkeypatch):
    """The ways in which two files are exchanged, by what the system can."""
    if request.param != "at once":
        monkeypatch.setattr(replacing, "_exchanged_at_once", lambda one, other: False)
    elif not sys.platform.startswith("linux"):
        pytest.skip("only Linux exchanges files in one step")
    if request.param == "without links":
        monkeypatch.delattr(os, "link")
        monkeypatch.setattr(os, "link", lambda *args, **options: (_ for _ in ()).throw(OSError(95, "no links")),
                            raising=False)  # fmt: skip
    return request.param


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_exchange(tmp_path, way, kind):
    one, other = tmp_path / "one", tmp_path / "other"
    for place in (one, other):
        if kind == "folder":
            place.mkdir()
        (place / "inside" if kind == "folder" else place).write_text(place.name)
    replacing.exchange(one, other)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["one", "other"]
    assert [(place / "inside" if kind == "folder" else place).read_text() for place in (one, other)] == ["other", "one"]


def test_every_interruption_leaves_the_old_files(tmp_path, monkeypatch, way):
    """An error or Ctrl-C before and after any rename or exchange: all of the old files, or all of the new."""
    old, new = (adapter_for(Model(), NAMES, seed=seed, scaling=scaling) for seed, scaling in ((1, 0.5), (2, 2.0)))
    steps = [(os, "replace"), (os, "rename"), (replacing, "exchange"), (replacing, "_exchanged_at_once")]
    real = {name: getattr(module, name) for module, name in steps}
    happened = 0
    for error in (KeyboardInterrupt(), OSError(errno.EIO, "Input/output error")):
        for late in (False, True):
            for step in range(20):
                left = [step]

                def interrupted(name, left=left, late=late, error=error):
                    def call(*args, **options):
                        left[0] -= 1
                        now = left[0] == -1
                        if now and not late:
                            raise error
                        result = real[name](*args, **options)
                        if now:
                            raise error
                        return result

                    return call

                folder = tmp_path / f"{type(error).__name__}-{late}-{step}"
                save_adapter(old, folder)
                before = content(folder)
                with monkeypatch.context() as patch:
                    for module, name in steps:
                        patch.setattr(module, name, interrupted(name))
                    try:
                        save_adapter(new, folder, force=True)
                    except (KeyboardInterrupt, OSError):
                        happened += 1
                        assert content(folder) == before, (error, late, step)
                        continue
                assert left[0] >= 0
                assert_same_function(Model(), read_adapter(folder), new)
                break
            else:
                pytest.fail("more steps than were tried")
    assert happened >= 8


def killed_between(folder, format="peft"):
    """New tensors beside an old configuration, as a process leaves them that is killed between the two."""
    save_adapter(adapter_for(Model(), NAMES, rank=3, scaling=0.5), folder, format=format)
    done = run("""
        real, calls = replacing.exchange, []
        def exchange(one, other):
            calls.append(other) or len(calls) < 2 or os._exit(9)
            real(one, other)
        replacing.exchange = exchange
        adapter = adapter_for(Model(), names, seed=2, rank=3, scaling=2.0)
        save_adapter(adapter, sys.argv[1], format=sys.argv[2], force=True)
    """, folder, format)  # fmt: skip
    assert done.returncode == 9, done.stderr


@pytest.mark.parametrize("format", CONFIGURED)
def test_killed_between_two_files(tmp_path, format):
    """What is left would read as an adapter of four times the scaling."""
    folder = tmp_path / "adapter"
    killed_between(folder, format)
    with pytest.raises(ValueError, match=f"{FORMATS[format].weights}: {MIXED}.*tmp: left by a killed process"):
        read_adapter(folder)
    notes = save_adapter(adapter_for(Model(), NAMES, seed=2, rank=3, scaling=2.0), folder, format=format, force=True)
    assert any("tmp: left by a killed process, unless one is running: it may be removed" in note for note in notes)
    read_adapter(folder)


def test_every_reader_refuses_a_mixture(tmp_path, call):
    pytest.importorskip("peft")
    pytest.importorskip("typer")
    from dora_kernels import check_adapter

    folder = tmp_path / "adapter"
    killed_between(folder)
    with pytest.raises(ValueError, match=MIXED):
        check_adapter(folder)
    for command in (["inspect", folder], ["convert", folder, tmp_path / "new", "--to", "mlx"]):
        status, stdout, stderr = call(*command)
        assert (status, stdout, stderr.count("\n")) == (2, "", 1) and "it was not saved with" in stderr
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("format", CONFIGURED)
def test_a_configuration_that_was_edited(tmp_path, format):
    """The error says what to do, and that works."""
    save_adapter(adapter_for(Model(), NAMES, rank=3, scaling=0.5), tmp_path, format=format)
    file = tmp_path / "adapter_config.json"
    config = json.loads(file.read_text())
    if format == "mlx":
        config["lora_parameters"]["scale"] = 3.0
    else:
        config["lora_alpha"] = 9.0
    file.write_text(json.dumps(config))
    field = "lora_parameters" if format == "mlx" else "lora_alpha"
    with pytest.raises(ValueError, match=f"another {field}: one .*read with scaling= and saved has another scaling"):
        read_adapter(tmp_path)
    adapter = read_adapter(tmp_path, scaling=3.0)
    save_adapter(adapter, tmp_path, format=format, force=True)
    assert {layer.scaling for layer in read_adapter(tmp_path).layers.values()} == {3.0}


def test_files_of_others_and_what_does_not_matter(tmp_path):
    """No digest, no check; PEFT's own copy of a configuration and other fields of it are no other configuration."""
    adapter = adapter_for(Model(), NAMES)
    save_adapter(adapter, tmp_path)
    weights, file = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    config = json.loads(file.read_text())
    other = {"base_model_name_or_path": "x", "task_type": "CAUSAL_LM", "r": float(config["r"])}
    file.write_text(json.dumps({**config, **other}))
    assert_same_function(Model(), read_adapter(tmp_path), adapter)
    peft = pytest.importorskip("peft")
    peft.PeftConfig.from_pretrained(tmp_path).save_pretrained(tmp_path)
    assert json.loads(file.read_text()).keys() > config.keys()
    assert_same_function(Model(), read_adapter(tmp_path), adapter)
    save_file(load_file(weights), weights)  # without metadata, as others write it
    file.write_text(json.dumps({**config, "lora_alpha": 2 * config["lora_alpha"], "alpha_pattern": {}}))
    read_adapter(tmp_path)


def test_writers_and_readers_at_once(tmp_path):
    """Two of each on one folder: no reader gets one's tensors with the other's scaling, and no mixture stays."""
    code = PREAMBLE + """
for _ in range(60):
    adapter = adapter_for(Model(), names, rank=2, scaling=float(sys.argv[2]))
    for layer in adapter.layers.values():
        layer.lora_B.fill_(float(sys.argv[2]))
    save_adapter(adapter, sys.argv[1], force=True)
"""
    writers = [subprocess.Popen([sys.executable, "-c", code, tmp_path, scaling]) for scaling in ("1.0", "2.0")]
    found = set()
    while any(writer.poll() is None for writer in writers):
        if (tmp_path / "adapter_config.json").exists():
            for layer in read_adapter(tmp_path).layers.values():
                assert bool((layer.lora_B == layer.scaling).all())
                found.add(layer.scaling)
    assert [writer.returncode for writer in writers] == [0, 0]
    assert found == {1.0, 2.0}
    assert content(tmp_path).keys() == {"adapter_model.safetensors", "adapter_config.json"}
    read_adapter(tmp_path)


@posix
def test_another_writer_waits(tmp_path, monkeypatch):
    """Between one's two files no other's take their places, and nobody is waited for without end."""
    save_adapter(adapter_for(Model(), NAMES), tmp_path)
    real, tried = replacing.exchange, []

    def exchange(one, other):
        if not tried:
            tried.append(other)
            with pytest.raises(TimeoutError, match="another process has held its lock for 0 s"):
                save_adapter(adapter_for(Model(), NAMES, seed=3, rank=5), tmp_path, force=True)
        real(one, other)

    monkeypatch.setattr(replacing, "exchange", exchange)
    monkeypatch.setattr(replacing, "_SECONDS", 0.0)
    save_adapter(adapter_for(Model(), NAMES, seed=2, rank=6), tmp_path, force=True)
    assert tried and {layer.rank for layer in read_adapter(tmp_path).layers.values()} == {6}


# what the system says


@posix
@pytest.mark.parametrize("what", ["tensors", "configuration", "gguf"])
def test_a_full_disk(tmp_path, what):
    """Its number, and the file that was to be written; no file, old or new, is left half."""
    if what == "gguf":
        pytest.importorskip("gguf")
        pytest.importorskip("transformers")
    done = run("""
        import resource, signal
        from pathlib import Path
        what, folder = sys.argv[1], Path(sys.argv[2])
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        adapter = adapter_for(Model(), names)
        limit = 1000
        if what == "configuration":
            limit, adapter.config["base_model_name_or_path"] = 20_000, 40_000 * "x"
        if what == "gguf":
            from cli_models import llama
            from dora_kernels.gguf import export_model
            model = llama()
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        try:
            export_model(model, folder / "model.gguf") if what == "gguf" else save_adapter(adapter, folder)
        except OSError as error:
            print(error.errno, error.filename, list(folder.iterdir()))
    """, what, tmp_path)  # fmt: skip
    name = {"tensors": "adapter_model.safetensors", "configuration": "adapter_config.json", "gguf": "model.gguf"}[what]
    assert done.stdout.splitlines() == [f"{errno.EFBIG} {tmp_path / name} []"], done.stderr


@posix
def test_a_full_disk_on_the_command_line(tmp_path):
    pytest.importorskip("typer")
    pytest.importorskip("rich")
    source = tmp_path / "source"
    save_adapter(adapter_for(Model(), NAMES), source)
    before = content(source)
    done = run("""
        import resource, signal
        from dora_kernels.cli import main
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        sys.exit(main(["convert", sys.argv[1], sys.argv[1], "--to", "peft", "--force"]))
    """, source)  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: [Errno 27] File too large: '{source / 'adapter_model.safetensors'}'\n"
    assert content(source) == before


@posix
def test_modes_without_the_umask(tmp_path, monkeypatch):
    """As of any new file, or of the file that is replaced; the umask is also that of other threads."""
    (tmp_path / "any").touch()
    any_new = stat.S_IMODE((tmp_path / "any").stat().st_mode)
    monkeypatch.setattr(os, "umask", lambda mask: pytest.fail("the umask was changed"))
    folder = tmp_path / "adapter"
    save_adapter(adapter_for(Model(), NAMES), folder)
    assert {stat.S_IMODE(file.stat().st_mode) for file in folder.iterdir()} == {any_new}
    modes = {"adapter_model.safetensors": 0o600, "adapter_config.json": 0o444}
    for name, mode in modes.items():
        (folder / name).chmod(mode)
    save_adapter(adapter_for(Model(), NAMES, seed=2), folder, force=True)
    assert {file.name: stat.S_IMODE(file.stat().st_mode) for file in folder.iterdir()} == modes


def test_a_link_is_replaced(tmp_path):
    other = tmp_path / "other.safetensors"
    other.write_bytes(b"mine")
    link = tmp_path / "link.safetensors"
    link.symlink_to(other)
    save_adapter(adapter_for(Model(), NAMES), link, format="lycoris", force=True)
    assert not link.is_symlink() and other.read_bytes() == b"mine"
    broken = tmp_path / "broken.safetensors"
    broken.symlink_to(tmp_path / "nowhere")
    with pytest.raises(FileExistsError):
        save_adapter(adapter_for(Model(), NAMES), broken, format="lycoris")
    assert broken.is_symlink()


@posix
def test_a_device_is_not_replaced(tmp_path):
    pipe = tmp_path / "pipe.safetensors"
    os.mkfifo(pipe)
    with pytest.raises(FileExistsError, match="pipe.safetensors: is not a regular file .* and is not replaced"):
        save_adapter(adapter_for(Model(), NAMES), pipe, format="lycoris", force=True)
    assert pipe.is_fifo() and len(list(tmp_path.iterdir())) == 1


def test_an_unreadable_file_is_not_called_truncated(tmp_path, monkeypatch):
    save_adapter(adapter_for(Model(), NAMES), tmp_path)
    file, real = tmp_path / "adapter_model.safetensors", os.open

    def refused(path, *args, **options):
        if Path(path) == file:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path, *args, **options)

    monkeypatch.setattr(os, "open", refused)
    with pytest.raises(PermissionError, match="Permission denied: .*adapter_model.safetensors"):
        read_adapter(tmp_path)


@posix
def test_names_of_any_bytes_and_length(tmp_path):
    adapter = adapter_for(Model(), NAMES)
    folder = tmp_path / os.fsdecode(b"\xff\xfe")
    save_adapter(adapter, folder)
    assert_same_function(Model(), read_adapter(folder), adapter)
    for length in (243, 255):
        name = "x" * (length - len(".safetensors")) + ".safetensors"
        for _ in range(2):
            save_adapter(adapter, tmp_path / name, format="kohya", force=True)
        read_adapter(tmp_path / name)
    wide = "中" * 81 + ".safetensors"
    assert len(os.fsencode(wide)) == 255
    save_adapter(adapter, tmp_path / wide, format="kohya")


def test_a_file_that_is_replaced_while_it_is_read(tmp_path, monkeypatch):
    """Header and values are of one file: the package safetensors opens it twice."""
    if not os.path.exists("/proc/self/fd") and not os.path.exists("/dev/fd"):
        pytest.skip("the system has no names for open files")
    import safetensors

    file, other = tmp_path / "file.safetensors", tmp_path / "other.safetensors"
    save_file({"a": torch.full((3,), 1.0)}, file, {"is": "one"})
    save_file({"a": torch.full((3,), 2.0)}, other, {"is": "other"})
    real = safetensors.safe_open

    def replaced(place, *args, **options):
        os.replace(other, file)
        return real(place, *args, **options)

    monkeypatch.setattr(safetensors, "safe_open", replaced)
    tensors, metadata = storage.read_all(file)
    assert metadata["is"] == "one" and torch.equal(tensors["a"], torch.full((3,), 1.0))
