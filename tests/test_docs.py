"""The Python blocks of documents whose examples are whole: run in order, in one namespace, as a reader would."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import dora_kernels

DOCS = Path(dora_kernels.__file__).parent.parent / "docs"
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("name", ["variants"])
def test_examples_run(name, tmp_path, monkeypatch):
    pytest.importorskip("peft")
    monkeypatch.chdir(tmp_path)
    text = (DOCS / f"{name}.md").read_text(encoding="utf-8")
    blocks = list(BLOCK.finditer(text))
    assert blocks
    namespace = {"__name__": name}
    for block in blocks:
        first = text[: block.start(1)].count("\n")  # so that a traceback has the document's lines
        exec(compile("\n" * first + block[1], f"docs/{name}.md", "exec"), namespace)
