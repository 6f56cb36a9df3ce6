"""What is released: the sdist is a whole checkout, the wheel the package alone, the README has absolute links."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

import dora_kernels

ROOT = Path(dora_kernels.__file__).parent.parent
NOT_RELEASED = {".github", ".git", ".gitignore"}


def loaded(path):
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def for_release():
    return loaded(".ci/for_release.py")


def test_links_of_a_release():
    text = for_release().absolute((ROOT / "README.md").read_text(), "https://host/owner/name", "v1.2.3")
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    assert links and all(link.startswith(("https://", "#")) for link in links)
    assert "![CI](https://host/owner/name/actions/workflows/ci.yml/badge.svg)" in text
    files = [link.split("/v1.2.3/")[1] for link in links if "/v1.2.3/" in link]
    assert "docs/figures/model-cpu.svg" in files and all((ROOT / file).is_file() for file in files)


def test_urls_of_a_release():
    text = for_release().with_urls((ROOT / "pyproject.toml").read_text(), "https://host/owner/name", "v1.2.3")
    assert text.count('Issues = "https://host/owner/name/issues"') == 1
    assert "[project.urls]" not in (ROOT / "pyproject.toml").read_text()


def test_the_hub_s_kernel_stands_alone(tmp_path, monkeypatch):
    """What looks for modules by name finds the kernel's own, also what reads a table of `tune`."""
    for path, text in loaded("hub/build.py").sources("hub_kernel_ops", "1.2.3").items():
        (tmp_path / "hub_kernel" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "hub_kernel" / path).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    choices = importlib.import_module("hub_kernel.engine.choices")
    versions = dora_kernels.engine.choices.versions(torch.device("cuda"))
    assert choices.versions(torch.device("cuda")) == {**versions, "dora-kernels": "1.2.3"}
    pytest.importorskip("triton")
    tiles, compose = (importlib.import_module(f"hub_kernel.{name}") for name in ("engine.tiles", "kernels.compose"))
    asked = compose.compose_config
    with tiles.replaced({}):
        assert compose.compose_config is not asked


def tracked():
    """The files of the checkout; of an unpacked sdist, all files but what building it added."""
    if (ROOT / ".git").exists():
        listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        return [name for name in listed.split() if (ROOT / name).is_file()]
    names = (path.relative_to(ROOT) for path in ROOT.rglob("*") if path.is_file() and path.suffix != ".pyc")
    added = {"PKG-INFO", "setup.cfg", "dora_kernels.egg-info", ".pytest_cache", "venv"}
    return [str(name) for name in names if name.parts[0] not in added]


@pytest.mark.slow
def test_the_sdist_and_the_wheel(tmp_path):
    source, dist = tmp_path / "source", tmp_path / "dist"
    files = tracked()
    for name in files:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, source / name)
    dist.mkdir()
    for kind in ("sdist", "wheel"):
        build = f"from setuptools import build_meta; build_meta.build_{kind}({str(dist)!r})"
        subprocess.run([sys.executable, "-c", build], cwd=source, check=True, capture_output=True)
    with tarfile.open(next(dist.glob("*.tar.gz"))) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    missing = [name for name in files if Path(name).parts[0] not in NOT_RELEASED and not (unpacked / name).exists()]
    assert not missing and not list(unpacked.rglob("*.pyc"))
    with zipfile.ZipFile(next(dist.glob("*.whl"))) as wheel:
        inside = set(wheel.namelist())
    package = {name for name in files if name.startswith("dora_kernels/")}
    assert package == {name for name in inside if ".dist-info/" not in name}
    assert {"dora_kernels/py.typed", "dora_kernels/startup/sitecustomize.py"} <= package
    assert any(name.startswith("dora_kernels/tuning/tables/") for name in package)
    environment = {**os.environ, "PYTHONPATH": str(unpacked)}
    tests = ["tests/test_flags.py", "tests/test_docs.py", "tests/test_packaging.py"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-m", "not slow", "-k", "not variants", *tests]
    result = subprocess.run(command, cwd=unpacked, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-2000:]
