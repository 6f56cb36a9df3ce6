"""A run's report in one HTML file: what the terminal shows, and its pictures; nothing is fetched from anywhere."""

from __future__ import annotations

import base64
import io
from pathlib import Path

from rich.console import Console

from bench import plots, show
from bench.record import Record, replace

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>dora_kernels benchmarks, {date}</title>
<style>{{stylesheet}} body {{{{ font-family: sans-serif; margin: 2rem }}}} img {{{{ max-width: 100% }}}}</style>
</head>
<body>
<h1>dora_kernels benchmarks</h1>
{pictures}
<pre style="overflow-x: auto; font-family: monospace">{{code}}</pre>
</body>
</html>
"""


def write(record: Record, path: Path) -> None:
    """The report of a record, whole or not at all."""
    pictures = []
    for name, figure in plots.draw(record).items():
        buffer = io.BytesIO()
        plots.save(figure, buffer, "svg")
        source = base64.b64encode(buffer.getvalue()).decode()
        pictures.append(f'<p><img alt="{name}" src="data:image/svg+xml;base64,{source}"></p>')
    screen = Console(file=io.StringIO(), record=True, width=120, highlight=False)
    show.show(record, screen)
    page = _PAGE.format(date=str(record["date"]), pictures="\n".join(pictures))
    replace(path, screen.export_html(code_format=page, inline_styles=False))
