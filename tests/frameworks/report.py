"""Render what ran, `record.json`, as the table of docs/integration.md.

    python -m tests.frameworks.report
"""

from __future__ import annotations

import json
import re
from pathlib import Path

HERE = Path(__file__).parent
DOCUMENT = HERE.parents[1] / "docs" / "integration.md"
BETWEEN = re.compile(r"(<!-- frameworks: [^>]* -->\n).*?(<!-- frameworks: end -->)", re.DOTALL)


def table(record: dict[str, dict]) -> str:
    """The table, in Markdown."""
    heads = "framework", "versions", "started with", "layers", "whole calls", "by modules", "losses", "difference"
    lines = [f"| {' | '.join(heads)} |", "| --- | --- | --- | ---: | ---: | ---: | --- | ---: |"]
    for one in record.values():
        versions = ", ".join(f"{name} {version}" for name, version in one["versions"].items())
        losses = one["losses"]["patched"]
        lines.append(
            f"| {one['framework']} | {versions} | `{one['command']}` | {one['layers']} | {one['fused']} "
            f"| {one['by modules']} | {losses[0]:.4f}, {losses[-1]:.4f} | {one['off']:.0e} |".replace("0e+00", "0")
        )
    return "\n".join(lines) + "\n"


def rendered(text: str) -> str:
    """The document with the table of the committed record."""
    record = json.loads((HERE / "record.json").read_text())
    return BETWEEN.sub(lambda found: f"{found[1]}{table(record)}{found[2]}", text)


if __name__ == "__main__":
    DOCUMENT.write_text(rendered(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")
