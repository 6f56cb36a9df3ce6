"""A run's report in one HTML file: its tables and pictures, nothing fetched from anywhere."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import jinja2

from bench import plots, show
from bench.providers import LABELS
from bench.record import Record, disturbed, machine_of, replace

_TEMPLATE = jinja2.Template(
    """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>dora_kernels benchmarks, {{ record.date }}</title>
<style>
body { font: 15px/1.45 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; color: #1a1a1a }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin: 2.2rem 0 .4rem }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: .4rem 0 }
th, td { padding: .2rem .7rem; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap }
th:first-child, td:first-child { text-align: left }
tr.ours { background: #eaf2fb } tr.wrong, .failed { color: #b00020; font-weight: 600 }
img { max-width: 100%; height: auto } .note { color: #555; font-size: .9rem } div.wide { overflow-x: auto }
</style>
</head>
<body>
<h1>dora_kernels benchmarks</h1>
<p>{{ machine }}; {{ record.date }}; commit
<code>{{ record.commit }}</code><br>
{% for name, version in record.versions.items() %}{{ name }} {{ version }}{{ ", " if not loop.last }}{% endfor %}<br>
Measured here: {{ ceilings }}.</p>
<p class="note">Providers took turns in one process. A ratio is the median, over rounds, of two times of one round; a
spread is half the distance between the quartiles. "ceiling" is the time that the fewest bytes or FLOPs would take at
the best rates that the run saw, over the time. Errors are relative to float64.</p>
{% if disturbed %}<p class="failed">BUSY {{ disturbed }}</p>{% endif %}
{% for failure in record.failures %}<p class="failed">FAILED {{ failure.stage }}: {{ failure.message }}</p>{% endfor %}
{% for name, reason in missing %}<p class="note">Missing: {{ name }}: {{ reason }}</p>{% endfor %}
{% for name, source in figures %}<p><img alt="{{ name }}" src="{{ source }}"></p>
{% endfor %}
{% for table in tables %}<h2>{{ table.title }}</h2>
<div class="wide"><table>
<tr>{% for cell in table.head %}<th>{{ cell }}</th>{% endfor %}</tr>
{% for kind, cells in table.rows %}<tr class="{{ kind }}">{% for cell in cells %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</table></div>
{% if table.note %}<p class="note">{{ table.note }}</p>{% endif %}
{% endfor %}
</body>
</html>
""",
    autoescape=True,
)


def write(record: Record, path: Path) -> None:
    """The report of a record, whole or not at all."""
    ceilings = ", ".join(show.ceiling(name, value) for name, value in record["ceilings"].items())
    missing = [(LABELS.get(name, name), reason) for name, reason in record["missing"].items()]
    text = _TEMPLATE.render(
        record=record, machine=machine_of(record["hardware"]), ceilings=ceilings, missing=missing,
        disturbed=disturbed(record), figures=_figures(record), tables=show.tables(record),
    )  # fmt: skip
    replace(path, text)


def _figures(record: Record) -> list[tuple[str, str]]:
    found = []
    for name, figure in plots.draw(record).items():
        buffer = io.BytesIO()
        plots.save(figure, buffer, "svg")
        found.append((name, "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()))
    return found
