"""Records of benchmarks, their tables and pictures."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

import dora_kernels
from bench import html, machine, plots, record, report, show
from bench.__main__ import main
from bench.providers import LABELS


def row(suite="layer", part="step of 4", provider="ours", hidden=64, rank=4, tokens=32, us=1000.0, **more):
    return {
        "suite": suite, "case": f"{hidden}x{hidden}, rank {rank}, {tokens} tokens, fp32", "part": part,
        "provider": provider, "shape": [hidden, hidden], "rank": rank, "tokens": tokens, "dtypes": "fp32", "us": us,
        "spread": 0.1, "peak_bytes": 1 << 20, "bytes": 4096, "flops": 8192, "floor_us": 10.0, "fraction": 0.01,
        "ratios": {"peft_lora": 1.5}, "errors": {"y": 1e-7}, "limits": {"y": 1e-6}, **more,
    }  # fmt: skip


def a_record(rows=(), curves=(), **more):
    return {
        "schema": record.SCHEMA, "commit": "0123456789abcdef", "date": "2026-01-02",
        "hardware": {"device": "a CPU", "threads": 2, "cores": 2}, "settings": {},
        "versions": {"python": "3", "torch": "2", "peft": "0"}, "missing": {},
        "ceilings": {"copy_bytes_per_s": 1e10, "flop_per_s.float32": 1e11},
        "seconds": {"a": 1.0}, "rows": list(rows), "curves": list(curves), "failures": [], **more,
    }  # fmt: skip


def curve(suite="finetune", provider="ours", seed=0, rank=16, off=0.0):
    return {
        "suite": suite, "provider": provider, "seed": seed, "rank": rank, "tokens": 8, "dtypes": "fp32",
        "losses": [3.0 - 0.1 * step + off + 0.01 * seed for step in range(12)], "held_out": 2.0 + off + 0.02 * seed,
        "accuracy": 0.5 + 0.01 * seed, "examples": 9,
    }  # fmt: skip


def full():
    """Something for every figure."""
    rows = [
        row(provider=name, hidden=h, rank=r, tokens=t, us=3000.0 + 200 * t + 5 * r)
        for name in ("ours", "peft_dora", "peft_lora")
        for h, r, t in [(64, 4, 32), (64, 4, 64), (64, 4, 128), (64, 8, 32), (64, 16, 32), (128, 4, 32)]
    ]
    rows += [row("norm", "refresh"), row("compose", "compose"), row("memory", "step", us=None, spread=None)]
    rows += [row("model", part, shape="a model") for part in ("step", "token")]
    curves = [curve(provider=name, seed=seed) for name in ("ours", "peft_dora", "peft_lora") for seed in (0, 1)]
    curves += [curve("classify", name, rank=rank) for name in ("ours", "peft_lora") for rank in (4, 8)]
    return a_record(rows, curves)


def test_the_table_of_the_merged_forward():
    """From several records; its distance from stock beside the least and the largest between two seeds."""
    offs = {"peft_dora": 0.0, "ours_merged": 0.005}
    records = [a_record(curves=[curve(provider=n, seed=s, off=off) for n, off in offs.items()]) for s in (0, 1, 3)]
    table = report.merged_table(records)
    for what in ("loss of a step", "mean of the last 50 losses"):
        assert f"| {what} | +5.0e-03 | 5.0e-03 | 1.0e-02 – 3.0e-02 |" in table
    assert "| held-out loss | +5.0e-03 | 5.0e-03 | 2.0e-02 – 6.0e-02 |" in table
    assert "| held-out accuracy | +0.0e+00 | 0.0e+00 | 1.0e-02 – 3.0e-02 |" in table
    assert "ours, merged | 16 | 3 | 2.0317" in table and "fp32, 12 steps of 8 tokens" in table


def test_a_record_is_read_as_it_was_written(tmp_path):
    path = tmp_path / "a.json"
    record.write(full(), path)
    assert record.read(path) == full()
    assert [found.name for found in tmp_path.iterdir()] == ["a.json"]


BAD = {
    "truncated": ('{"schema": 3, "rows": [', "truncated, or not JSON"),
    "a list": ("[]", "not a record"),
    "another": ("{}", "not a record"),
    "an older schema": ('{"schema": 2, "kernels": []}', "a record of schema 2, expected 3"),
    "without rows": (json.dumps({k: v for k, v in a_record().items() if k != "rows"}), "a record without 'rows'"),
    "rows of another kind": (json.dumps(a_record(rows=[1])), "'rows' is not a list of objects"),
    "rows without a time": (json.dumps(a_record(rows=[{"suite": "layer"}])), "a row without 'case', 'part', 'prov"),
    "an unknown provider": (json.dumps(a_record(rows=[row(provider="nobody")])), "a row of 'nobody', no provider"),
    "not text": (b"\xff\xfe\x00", "not UTF-8 text"),
}


@pytest.mark.parametrize(("content", "message"), BAD.values(), ids=BAD)
def test_a_bad_record(tmp_path, capsys, content, message):
    path = tmp_path / "bad.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    (tmp_path / "growth.svg").write_text("as it was")
    with pytest.raises(SystemExit) as stopped:
        main(["plot", str(path), "--out", str(tmp_path)])
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and message in said and str(path) in said and said.count("\n") == 1
    assert sorted(found.name for found in tmp_path.iterdir()) == ["bad.json", "growth.svg"]
    assert (tmp_path / "growth.svg").read_text() == "as it was"


def test_no_record(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["plot", str(tmp_path / "no.json")])
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and "no.json: No such file or directory" in said and said.count("\n") == 1


def test_a_row_of_rubbish(tmp_path, capsys):
    rows = [row(shape="a string")]
    path = tmp_path / "a.json"
    record.write(a_record(rows), path)
    with pytest.raises(SystemExit) as stopped:
        main(["plot", str(path), "--out", str(tmp_path)])
    assert stopped.value.code == 2 and "nothing to draw" in capsys.readouterr().err


def test_every_provider_has_a_color():
    assert set(plots.COLORS) == set(LABELS)


def test_pictures(tmp_path, capsys):
    path = tmp_path / "a.json"
    record.write(full(), path)
    assert main(["plot", str(path), "--out", str(tmp_path / "out")]) == 0
    names = sorted(found.name for found in (tmp_path / "out").iterdir())
    assert names == sorted(f"{name}.svg" for name in plots.FIGURES)
    growth = (tmp_path / "out" / "growth.svg").read_text()
    assert all(words in growth for words in ("tokens in a step", "rank", "hidden size", "PEFT LoRA", "R² = 1.0000"))
    for name in names:
        text = (tmp_path / "out" / name).read_text()
        assert "0123456" in text and "a CPU" in text and "2026-01-02" in text
    main(["plot", str(path), "--out", str(tmp_path / "again")])
    assert all((tmp_path / "again" / name).read_text() == (tmp_path / "out" / name).read_text() for name in names)


def test_pictures_of_several_records_name_them_all():
    first, second = full(), full()
    second["hardware"] = {**second["hardware"], "device": "another CPU", "others": 1.5}
    second["commit"], second["date"] = "f" * 16, "2026-02-03"
    titles = {figure.get_suptitle() for figure in plots.draw(plots.merged([first, second])).values()}
    assert all("a CPU" in title and "0123456, 2026-01-02" in title for title in titles)
    assert all("another CPU" in title and "fffffff, 2026-02-03, on a busy machine" in title for title in titles)
    assert all("another" not in figure.get_suptitle() for figure in plots.draw(plots.merged([first, first])).values())


def test_series_keep_all_else_equal():
    rows = [row(tokens=t, rank=r, us=t + 1000 * r) for r, t in [(4, 32), (4, 64), (4, 128), (8, 32)]]
    assert plots._series(rows, "tokens") == (
        "fp32, 64x64, rank 4", {"ours": {32: 4.032, 64: 4.064, 128: 4.128}},
    )  # fmt: skip
    assert plots._series(rows, "rank")[1] == {"ours": {4: 4.032, 8: 8.032}}


def test_the_straight_line():
    assert plots.straight({1: 5.0, 2: 7.0, 4: 11.0}) == pytest.approx((3.0, 2.0, 1.0))
    assert plots.straight({1: 1.0, 2: 4.0, 3: 1.0})[2] == pytest.approx(0.0)


def test_a_running_mean_starts_where_it_is_full():
    """The mean of the first few losses alone would be a jump that no training made."""
    assert plots.running_mean([8.0, 4.0, 3.0, 2.0], width=2) == {2: 6.0, 3: 3.5, 4: 2.5}
    assert plots.running_mean([8.0], width=2) == {}


def test_a_wrong_row_shows():
    rows = [row(), row(provider="peft_dora", errors={"y": 1e-7, "x": 2e-3}, limits={"y": 1e-6, "x": 1e-3})]
    sheet = show.comparison(rows)
    assert [kind for kind, _ in sheet.rows] == ["ours", "wrong"]
    assert sheet.rows[1][1][-1] == "WRONG 2e-03" and sheet.rows[0][1][-1] == "1e-07"
    assert show.is_wrong(row(errors={"y": None})), "not a number"
    assert not show.is_wrong(row(errors={"g": 1.0})), "nothing is asked of g here"


def test_tables_fit_a_terminal(capsys):
    screen = show.Console(width=80, highlight=False)
    rows = [row(provider=name, us=123456.7, peak_bytes=4 << 30, errors={"y": 1e-3}) for name in LABELS]
    show.show(a_record(rows), screen)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert not any("…" in line for line in lines), "nothing is cut off"
    assert all(any(line.strip().startswith(label) for line in lines) for label in LABELS.values())


def test_fidelity_names_the_largest_quotient():
    def cell(provider, rank, y):
        case = f"trained, rank {rank}"
        return row("fidelity", "results", provider, rank=rank, errors={"y": y}, limits={}) | {
            "case": case, "condition": "trained",
        }  # fmt: skip

    rows = [cell("peft_dora", 1, 1e-3), cell("ours", 1, 5e-4), cell("peft_dora", 4, 1e-3), cell("ours", 4, 2e-3)]
    (sheet,) = show.fidelity(rows)
    assert sheet.rows == [("", ["fp32", "trained", "2.00"])]
    assert sheet.note == "at most PEFT's: fp32 in 1 of 2 cells, at most 2.00 times it"


def test_html_is_one_file_that_asks_for_nothing(tmp_path):
    made = full() | {"missing": {"<b>": "it's absent"}}
    made["failures"] = [{"stage": "layer: <script>", "message": "a & b"}]
    path = tmp_path / "report.html"
    html.write(made, path)
    text = path.read_text()
    assert "&lt;script&gt;" in text and "<script" not in text and "a &amp; b" in text and "<b>" not in text
    assert text.count("data:image/svg+xml;base64,") == len(plots.FIGURES)
    assert "http://" not in text and "https://" not in text and "src=\"/" not in text and "@import" not in text
    assert [found.name for found in tmp_path.iterdir()] == ["report.html"]


@pytest.fixture
def browser():
    """Chromium without a window and without a network: what it writes for a file and an option."""
    command = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if command is None:
        pytest.skip("there is no Chromium")

    def ask(path, *options):
        with tempfile.TemporaryDirectory() as profile:
            done = subprocess.run(
                [
                    command, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync",
                    "--disable-background-networking", "--disable-component-update",
                    "--host-resolver-rules=MAP * 0.0.0.0", f"--user-data-dir={profile}", *options, path.as_uri(),
                ],
                capture_output=True, text=True, timeout=120,
            )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    return ask


def test_html_in_a_browser(tmp_path, browser):
    path = tmp_path / "report.html"
    html.write(full(), path)
    page = browser(path, "--dump-dom")
    assert page.count("<img") == len(plots.FIGURES) and "dora_kernels benchmarks" in page
    shot = tmp_path / "shot.png"
    browser(path, f"--screenshot={shot}", "--window-size=1200,4000")
    assert shot.stat().st_size > 20000, "an empty page takes less"


def test_newest_records_by_machine(tmp_path, monkeypatch):
    """Of each machine the newest day's, all of that; one machine's do not hide another's."""
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    for name in ("2026-01-01-growth-rank-cpu", "2026-01-02-growth-rank-cpu", "2026-01-02-growth-tokens-cpu",
                 "2026-01-01-growth-rank-h200", "2026-01-03-run-cpu"):  # fmt: skip
        record.write(full() | {"commit": name}, tmp_path / f"{name}.json")
    found = {machine: [one["commit"] for one in records] for machine, records in report.newest("growth").items()}
    assert found == {
        "cpu": ["2026-01-02-growth-rank-cpu", "2026-01-02-growth-tokens-cpu"], "h200": ["2026-01-01-growth-rank-h200"],
    }  # fmt: skip


def test_a_damaged_record_leaves_the_documents(tmp_path, monkeypatch, capsys):
    documents = [tmp_path / name for name in ("README.md", "docs/benchmarks.md")]
    (tmp_path / "docs").mkdir()
    for path in documents:
        shutil.copy(report.REPOSITORY / path.relative_to(tmp_path), path)
    before = [path.read_bytes() for path in documents]
    for name, value in {"REPOSITORY": tmp_path, "RESULTS": tmp_path, "FIGURES": tmp_path}.items():
        monkeypatch.setattr(report, name, value)
    record.write(full(), tmp_path / "2026-01-01-run-cpu.json")
    whole = (tmp_path / "2026-01-01-run-cpu.json").read_text()
    for text in (whole[:-200], whole.replace('"schema": 3', '"schema": 2'), whole.replace('"threads"', '"thread"')):
        (tmp_path / "2026-01-01-run-cpu.json").write_text(text)
        with pytest.raises(SystemExit) as stopped:
            main(["report"])
        assert stopped.value.code == 2 and capsys.readouterr().err.count("\n") == 1
    assert [path.read_bytes() for path in documents] == before


def test_documents_show_the_newest_results():
    command = [sys.executable, "-m", "bench", "report", "--check"]
    root = Path(dora_kernels.__file__).parents[1]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_busy_machine_is_said_so(capsys, tmp_path):
    quiet, busy = a_record([row()]), a_record([row()])
    busy["hardware"]["others"], quiet["hardware"]["others"] = 1.06, 0.1
    for one, said in ((busy, True), (quiet, False), (a_record([row()]), False)):
        show.show(one, show.console())
        assert ("1.06 of 2 cores" in " ".join(capsys.readouterr().out.split())) == said
        assert ("1.06 of 2 cores" in report.place([one])) == said
        html.write(one, tmp_path / f"{id(one)}.html")
        assert ("1.06 of 2 cores" in (tmp_path / f"{id(one)}.html").read_text()) == said
    without_times = {**busy, "rows": []}
    assert "busy" not in report.place([without_times])


def test_others_are_not_this_process(monkeypatch):
    """1000 s of CPU in the machine's account, 30 of them ours and our children's, within 500 s: 1.94 cores."""
    stat = "cpu {} 1000 2000 987654321 4321 100 200 0 0 0\ncpu0 1 2 3 4\n"
    now = {"clock": 100.0, "user": 5000, "own": 7.0}
    monkeypatch.setattr(machine.Path, "read_text", lambda *_: stat.format(now["user"]))
    monkeypatch.setattr(machine.time, "monotonic", lambda: now["clock"])
    monkeypatch.setattr(machine.os, "times", lambda: (now["own"], 1.0, 2.0, 3.0, 1e9))
    others = machine.Others()
    now.update(clock=600.0, user=5000 + 1000 * os.sysconf("SC_CLK_TCK"), own=37.0)
    assert others.cores() == 1.94
    monkeypatch.setattr(machine.Path, "read_text", lambda *_: "no such account")
    assert others.cores() is None and machine.Others().cores() is None
