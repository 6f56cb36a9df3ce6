"""`dora-kernels merge` and the folders around it: what it replaces, and what it copies from the base model's."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("typer")
pytest.importorskip("rich")
pytest.importorskip("safetensors")
pytest.importorskip("transformers")

from cli_models import adapter_file, llama, snapshot

import dora_kernels
from dora_kernels.checkpoints.checkpoint import Checkpoint
from dora_kernels.checkpoints.merge import merge_checkpoint
from dora_kernels.files import replacing


@pytest.fixture
def places(tmp_path):
    """The base model, an adapter, and where a model is merged already."""
    base, out = tmp_path / "base", tmp_path / "out"
    llama().save_pretrained(base)
    source, _ = adapter_file(tmp_path, llama())
    merge_checkpoint(Checkpoint(base), source, out)
    return base, source, out


@pytest.fixture(params=["at once", "by renaming"])
def way(request, monkeypatch):
    if request.param != "at once":
        monkeypatch.setattr(replacing, "_exchanged_at_once", lambda one, other: False)
    elif not sys.platform.startswith("linux"):
        pytest.skip("only Linux exchanges folders in one step")


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_an_interruption_leaves_the_old_model(places, monkeypatch, way, error, late):
    """Ctrl-C or an error before or after each step in which the folders are exchanged."""
    base, source, out = places
    before = snapshot(out.parent)
    steps = [(os, "replace"), (os, "rename"), (replacing, "exchange"), (replacing, "_exchanged_at_once")]
    for number in range(10):
        left = [number]

        def wrapped(real, left=left):
            def call(*args, **options):
                left[0] -= 1
                now = left[0] == -1
                if now and not late:
                    raise error()
                result = real(*args, **options)
                if now:
                    raise error()
                return result

            return call

        with monkeypatch.context() as patch:
            for module, name in steps:
                patch.setattr(module, name, wrapped(getattr(module, name)))
            try:
                merge_checkpoint(Checkpoint(base), source, out, force=True, strength=0.5)
            except (KeyboardInterrupt, OSError):
                assert snapshot(out.parent) == before, number
                continue
        break
    assert number >= 2 and left[0] >= 0
    assert snapshot(out) != before and not list(out.parent.glob(".*"))


def test_what_cannot_be_put_back_is_said(places, call, monkeypatch):
    """The old model is not deleted, and both this run and the next say where it lies."""
    base, source, out = places
    old, real, renamed = snapshot(out), os.replace, []

    def once(one, other):
        if renamed:
            raise OSError(5, "Input/output error")
        renamed.append(other)
        real(one, other)

    with monkeypatch.context() as patch:
        patch.setattr(replacing, "_exchanged_at_once", lambda one, other: False)
        patch.setattr(os, "replace", once)
        status, stdout, stderr = call("merge", base, source, out, "--force", "--strength", "0.5")
    spare = renamed[0]
    assert (status, stdout, stderr.count("\n")) == (2, "", 1)
    assert f"{out}: could not be restored" in stderr and f"its former content is in {spare}" in stderr
    assert snapshot(spare) == old and list(out.parent.glob(".*")) == [spare] and not out.exists()
    status, stdout, _ = call("merge", base, source, out)
    assert status == 0 and f"note: {spare}: left by a killed process, unless one is running: it may be the" in stdout
    status, stdout, _ = call("merge", base, source, out, "--force")
    assert status == 0 and f"note: {spare}: left by" in stdout and "it may be removed" in stdout
    shutil.rmtree(spare)
    assert "left by" not in call("merge", base, source, out, "--force")[1]


def test_a_folder_that_came_in_between(places, tmp_path):
    """Without force nothing is replaced, also what was not there at the start."""
    base, source, _ = places
    other = tmp_path / "other"

    def advance(name, total):
        other.mkdir(exist_ok=True)
        (other / "mine").write_text("mine")

    with pytest.raises(FileExistsError, match="other: exists already"):
        merge_checkpoint(Checkpoint(base), source, other, advance=advance)
    assert snapshot(other) == {"mine": b"mine"} and not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("held", ["adapter_config.json", "adapter_model.safetensors"])
def test_an_adapters_folder_is_not_replaced(places, tmp_path, held):
    """Its files have a model's suffixes, and may be all that is left of a training."""
    base, source, _ = places
    other = tmp_path / "other"
    other.mkdir()
    for name in ("model.safetensors", held):
        (other / name).write_text("trained")
    with pytest.raises(FileExistsError, match=f"other: not replaced: it contains {held}, so it is an adapter's folder"):
        merge_checkpoint(Checkpoint(base), source, other, force=True)
    assert (other / held).read_text() == "trained"


def test_a_link_to_a_folder_is_replaced(places, tmp_path):
    base, source, out = places
    link = tmp_path / "link"
    link.symlink_to(out)
    before = snapshot(out)
    merge_checkpoint(Checkpoint(base), source, link, force=True, strength=0.5)
    assert not link.is_symlink() and snapshot(out) == before != snapshot(link)
    assert not list(tmp_path.glob(".*"))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="POSIX's limits")
@pytest.mark.parametrize("limit", [500, 5000, 20_000])
def test_a_full_disk(places, tmp_path, limit):
    """In what is copied and in what is merged: one line that names a file of OUT, which is as it was."""
    base, source, out = places
    (base / "a.txt").write_bytes(bytes(2000))
    before = snapshot(tmp_path)
    done = subprocess.run([sys.executable, "-c", f"""
import resource, signal, sys
sys.path.insert(0, {str(Path(dora_kernels.__file__).parent.parent)!r})
from dora_kernels.cli import main
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
sys.exit(main(["merge", *sys.argv[1:], "--force"]))
""", base, source, out], capture_output=True, text=True, timeout=300)  # fmt: skip
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert done.stderr.startswith("error: [Errno 27] File too large: ") and done.stderr.count("\n") == 1
    assert f"{out}/" in done.stderr and ".tmp" not in done.stderr
    assert snapshot(tmp_path) == before


# what is copied


def mode(file):
    return stat.S_IMODE(file.stat().st_mode)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="POSIX's files")
def test_links_and_what_is_no_file(call, places, tmp_path):
    base, source, _ = places
    outside = tmp_path / "private"
    outside.mkdir()
    (outside / "key.pem").write_text("secret")
    (outside / "key.pem").chmod(0o600)
    (base / "notes.txt").symlink_to(outside / "key.pem")
    (base / "inside.json").symlink_to("config.json")
    (base / "folder").symlink_to(outside)
    (base / "itself").symlink_to(base)
    (base / "nowhere").symlink_to(tmp_path / "nothing")
    (base / "zero.json").symlink_to("/dev/zero")
    os.mkfifo(base / "pipe.json")
    (base / "sub").mkdir(0o700)
    (base / "sub" / "config.json").write_text("{}")
    (base / "sub" / "other.json").symlink_to(outside / "key.pem")
    (base / "\x1b[31mred.txt").write_text("")
    status, stdout, stderr = call("merge", base, source, tmp_path / "new")
    assert (status, stderr) == (0, "")
    new, notes = tmp_path / "new", stdout.splitlines()
    assert (new / "notes.txt").read_text() == "secret" and mode(new / "notes.txt") == 0o600
    assert (new / "inside.json").read_bytes() == (base / "config.json").read_bytes()
    assert not any(file.is_symlink() for file in new.rglob("*"))
    assert mode(new / "sub") == 0o700
    for name in ("notes.txt", "sub/other.json"):
        assert f"note: {base / name}: a link; copied from {outside / 'key.pem'}, outside the folder" in notes
    for name in ("folder", "itself", "nowhere", "zero.json", "pipe.json"):
        assert f"note: {base / name}: left out, because it is neither a file nor a link to one" in notes
        assert not (new / name).exists()
    assert not any("inside.json" in note for note in notes) and "\x1b" not in stdout


def test_the_cache_of_hugging_face(call, places, tmp_path):
    """Links to blobs beside the snapshots, in a private folder."""
    base, source, out = places
    cache = tmp_path / "models--a--b"
    snapshots = cache / "snapshots" / "0123abcd"
    (cache / "blobs").mkdir(parents=True)
    snapshots.mkdir(parents=True)
    for number, file in enumerate(sorted(base.iterdir())):
        shutil.copyfile(file, cache / "blobs" / str(number))
        (snapshots / file.name).symlink_to(f"../../blobs/{number}")
    snapshots.chmod(0o700)
    status, stdout, stderr = call("merge", snapshots, source, tmp_path / "new")
    assert (status, stderr, stdout.count("note:")) == (0, "", 0)
    assert snapshot(tmp_path / "new") == snapshot(out)
    assert mode(tmp_path / "new") == 0o700


def test_a_shard_that_is_a_link(call, places, tmp_path):
    base, source, out = places
    shutil.move(base / "model.safetensors", tmp_path / "elsewhere.safetensors")
    (base / "model.safetensors").symlink_to(tmp_path / "elsewhere.safetensors")
    status, stdout, _ = call("merge", base, source, tmp_path / "new")
    assert status == 0 and snapshot(tmp_path / "new") == snapshot(out)
    assert f"model.safetensors: a link; copied from {tmp_path / 'elsewhere.safetensors'}" in stdout


# what is printed


def test_nothing_that_a_terminal_obeys(call, tmp_path):
    """Names of folders and files, and what configurations say, are printed without control characters, and cut."""
    folder = tmp_path / "\x1b[31mred\n\x07"
    adapter_file(tmp_path, llama())[0].rename(folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "\x1b[2J": 1_000_000 * "\x1b[2J"}))
    for command in (["inspect", folder], ["convert", folder, tmp_path / "\x1b[32mgreen", "--to", "peft"]):
        status, stdout, stderr = call(*command)
        assert (status, stderr) == (0, "") and "red" in stdout and len(stdout) < 10_000
        assert all(line.isprintable() for line in stdout.splitlines())
    (folder / "adapter_model.safetensors").write_bytes(b"")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "\x1b[31m.bin").write_bytes(b"")
    for source in (folder, tmp_path / "empty", tmp_path / "\x1b[31mnowhere"):
        status, stdout, stderr = call("inspect", source)
        assert (status, stdout, stderr.count("\n")) == (2, "", 1) and stderr.rstrip("\n").isprintable()


def test_notes_without_end(call, tmp_path, monkeypatch):
    """A file may have any number of what is worth a note."""
    source, _ = adapter_file(tmp_path, llama())
    config = json.loads((source / "adapter_config.json").read_text())
    (source / "adapter_config.json").write_text(json.dumps({**config, **{f"new_{i}": 1 for i in range(5000)}}))
    status, stdout, _ = call("inspect", source)
    assert status == 0 and stdout.count("note: ") == 201 and "note: and 4800 more\n" in stdout
