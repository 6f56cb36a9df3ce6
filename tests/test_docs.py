"""The documents: whole examples run in order, in one namespace, as a reader would; every name has its place."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import dora_kernels
from tests.frameworks import report

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


def test_every_public_name_is_in_the_reference():
    shown = [name for page in (DOCS / "api").glob("*.md") for name in re.findall(r"^::: (\S+)", page.read_text(), re.M)]
    public = {f"dora_kernels.{name}" for name in dora_kernels.__all__}
    assert public <= set(shown) and len(shown) == len(set(shown))


def test_the_table_of_frameworks_is_rendered():
    text = report.DOCUMENT.read_text()
    assert report.rendered(text) == text and report.table({}).count("\n") == 2


def test_every_document_is_a_page_of_the_site():
    named = set(re.findall(r": (\S+\.md)$", (DOCS.parent / "mkdocs.yml").read_text(), re.M))
    assert named == {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")}
