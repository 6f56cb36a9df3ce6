"""`python -m bench plot`."""

from __future__ import annotations

import json

import pytest

from bench.__main__ import main
from bench.layer.providers import MICRO_BATCHES
from bench.plot import curves, straight


def record(ranks=(4, 8, 16), tokens=(32, 64, 128)):
    """Steps that cost 3 ms, 2 ms a token and 5 ms a rank."""
    rows = [
        {
            "hidden": 64, "rank": rank, "tokens": count, "dtypes": "fp32", "provider": name,
            "step": {"ms": 3.0 + 2.0 * count + 5.0 * rank},
        }
        for rank in ranks for count in tokens for name in ("peft_lora", "peft_dora", "ours_patched")
    ]  # fmt: skip
    return {
        "layers": rows, "commit": "0123456789", "hardware": {"device": "a CPU", "threads": 2},
        "versions": {"torch": "2", "peft": "0"},
    }  # fmt: skip


def test_the_curves_are_those_of_the_record():
    over_tokens, over_rank = curves(record())
    assert over_tokens["ours_patched"] == {MICRO_BATCHES * n: 3.0 + 2.0 * n + 20.0 for n in (32, 64, 128)}
    assert over_rank["peft_lora"] == {r: 259.0 + 5.0 * r for r in (4, 8, 16)}


def test_the_straight_line():
    start, slope, explained = straight({1: 5.0, 2: 7.0, 4: 11.0})
    assert (start, slope, explained) == pytest.approx((3.0, 2.0, 1.0))
    assert straight({1: 1.0, 2: 4.0, 3: 1.0})[2] == pytest.approx(0.0)


@pytest.mark.parametrize("suffix", ["svg", "png"])
def test_draws(tmp_path, capsys, suffix):
    (tmp_path / "record.json").write_text(json.dumps(record()))
    out = tmp_path / f"out.{suffix}"
    assert main(["plot", str(tmp_path / "record.json"), "--out", str(out)]) == 0
    assert str(out) in capsys.readouterr().out
    if suffix == "svg":
        text = out.read_text()
        assert all(words in text for words in ("tokens in a step", "PEFT LoRA", "R² = 1.0000", "0123456"))
        main(["plot", str(tmp_path / "record.json"), "--out", str(out)])
        assert out.read_text() == text, "the same record draws the same file"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not a record of optimizer steps"),
        ("{}", "not a record of `python -m bench.layer`"),
        ("[]", "not a record of `python -m bench.layer`"),
        (json.dumps(record(ranks=(4, 8))), "expected steps at three token counts and three ranks"),
    ],
    ids=["truncated", "another", "a list", "too few"],
)
def test_a_bad_record(tmp_path, capsys, content, message):
    (tmp_path / "record.json").write_text(content)
    out = tmp_path / "out.svg"
    out.write_text("as it was")
    with pytest.raises(SystemExit) as stopped:
        main(["plot", str(tmp_path / "record.json"), "--out", str(out)])
    assert stopped.value.code == 2 and message in capsys.readouterr().err
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["out.svg", "record.json"]
    assert out.read_text() == "as it was"


def test_no_record(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["plot", str(tmp_path / "record.json")])
    assert stopped.value.code == 2 and "record.json: No such file or directory" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("out", "message"),
    [("nowhere/out.svg", "out.svg: No such file or directory"), ("out.gif", "expected a name that ends in one of")],
)
def test_a_bad_file(tmp_path, capsys, out, message):
    (tmp_path / "record.json").write_text(json.dumps(record()))
    with pytest.raises(SystemExit) as stopped:
        main(["plot", str(tmp_path / "record.json"), "--out", str(tmp_path / out)])
    assert stopped.value.code == 2 and message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["record.json"]
