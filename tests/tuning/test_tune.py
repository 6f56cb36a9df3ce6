"""`tune`: what it measures, checks and writes, on this CPU for real; what counts afterwards, and what is ignored."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import dora_kernels
from dora_kernels.cli import app
from dora_kernels.engine import blocked, choices, cost, dispatch, tiles
from dora_kernels.tuning import candidates, measure, tune
from dora_kernels.tuning import tiles as measured_tiles
from dora_kernels.tuning.shapes import shapes_of
from dora_kernels.tuning.timing import in_turns

CPU, F32 = torch.device("cpu"), torch.float32


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("DORA_KERNELS_CACHE", str(tmp_path / "cache"))
    choices.forget()
    yield tmp_path / "cache"
    choices.forget()


def invoke(*arguments):
    """The command, with what it prints."""
    runner = pytest.importorskip("typer.testing")
    return runner.CliRunner().invoke(app.build_app(), list(arguments))


def tuned(shapes=((24, 40, 4),), **options):
    return tune(list(shapes), **{"tokens": [1, 8], "seconds": 0.01, "progress": False, **options})


def form_of(shape):
    weight, a, b = torch.zeros(shape[:2]), torch.zeros(shape[2], shape[1]), torch.zeros(shape[0], shape[2])
    return "factored" if blocked.is_factored(weight, a, b) else "direct"


def test_a_table(folder):
    found = tuned([(24, 40, 4), (40, 24, 4), (24, 40, 4)])
    assert found.path.parent == folder and not found.wrong and not list(folder.glob("*.tmp*"))
    table = json.loads(found.path.read_text())
    assert table == found.table and list(table["layers"]) == ["24x40 r4", "40x24 r4"]
    assert table["dtype"] == "float32" and table["versions"]["torch"] == torch.__version__
    layer = table["layers"]["24x40 r4"]
    assert layer["norm"] in ("direct", "factored") and layer["merged_from_tokens"] in (1, 8, None)
    assert set(layer["microseconds"]) == {"norm", "once per step", "training, 1 tokens", "training, 8 tokens"}
    assert set(layer["microseconds"]["training, 8 tokens"]) == {"formula", "merged"}
    assert all(value > 0 for times in layer["microseconds"].values() for value in times.values())
    assert "24x40 r4: norm" in str(found)


@pytest.mark.parametrize("form", ["direct", "factored"])
def test_it_counts(folder, form):
    """For its shape, dtype and versions, and for nothing else."""
    found = tuned()
    for layer in found.table["layers"].values():
        layer["norm"] = form
    found.path.write_text(json.dumps(found.table))
    choices.forget()
    assert form_of((24, 40, 4)) == form and form_of((24, 40, 8)) == "direct"
    layer = dora_kernels.DoRALinear(40, 24, rank=4)
    nn.init.normal_(layer.lora_B.weight)
    norm = dora_kernels.dora_weight_norm(layer.weight, layer.lora_A.weight, layer.lora_B.weight)
    wanted = (layer.weight + layer.lora_B.weight @ layer.lora_A.weight).norm(dim=1)
    torch.testing.assert_close(norm, wanted)


@pytest.mark.parametrize(
    "damage, reason",
    [
        (lambda table: table["versions"].update(torch="1.0"), "measured with torch 1.0; run dora-kernels tune again"),
        (lambda table: table.update(format=0), "no table of format 1"),
        (lambda table: table.pop("layers"), "no table of format 1"),
        (lambda table: table.update(tiles=[]), "no table of format 1"),
    ],
)
def test_ignored(damage, reason):
    """And said so."""
    found = tuned()
    found.table["layers"]["24x40 r4"]["norm"] = "factored"
    damage(found.table)
    found.path.write_text(json.dumps(found.table))
    choices.forget()
    with pytest.warns(RuntimeWarning, match=f"is ignored: .*{reason}"):
        assert form_of((24, 40, 4)) == "direct"


def test_other_shapes_stay(folder):
    """In the table of the same versions."""
    tuned([(24, 40, 4)])
    assert list(tuned([(40, 24, 4)]).table["layers"]) == ["24x40 r4", "40x24 r4"]


def test_versions_are_those_before_an_import(monkeypatch):
    """A table is read before triton is imported, and written after it. A CPU's has nothing to do with it."""
    monkeypatch.delitem(sys.modules, "triton", raising=False)
    gpu = torch.device("cuda")
    before = choices.versions(gpu)
    pytest.importorskip("triton")
    assert choices.versions(gpu) == before and "triton" in before and "triton" not in choices.versions(CPU)


def test_a_shipped_table(tmp_path, monkeypatch, recwarn):
    """It counts where the user's table says nothing of a layer; one of other versions is silently ignored."""
    monkeypatch.setattr(choices, "SHIPPED", tmp_path)
    path = choices.shipped_path(CPU, F32)
    table = tuned([(24, 40, 4), (40, 24, 4)]).table
    for layer in table["layers"].values():
        layer["norm"] = "factored"
    choices.table_path(CPU, F32).rename(path)

    def ship(**changed):
        path.write_text(json.dumps({**table, **changed}))
        choices.forget()

    ship()
    assert form_of((24, 40, 4)) == form_of((40, 24, 4)) == "factored"
    shown = json.loads(invoke("doctor", "--json").output)["devices"][0]["tuned"]
    assert shown["float32"] == f"shipped, 2 shapes, measured {table['measured']}: {path}"
    own = tuned([(24, 40, 4)])
    own.table["layers"]["24x40 r4"]["norm"] = "direct"
    own.path.write_text(json.dumps(own.table))
    ship()
    assert form_of((24, 40, 4)) == "direct" and form_of((40, 24, 4)) == "factored"
    ship(versions={"torch": "1.0"})
    assert form_of((40, 24, 4)) == "direct" and not recwarn
    assert "shipped, ignored, " in json.loads(invoke("doctor", "--json").output)["devices"][0]["tuned"]["float32"]


def test_every_shipped_table_counts():
    """In this version, on such a machine; its names are those that are looked for."""
    for path in choices.SHIPPED.glob("*.json"):
        table = json.loads(path.read_text())
        assert table["format"] == choices.FORMAT and table["layers"]
        assert table["versions"]["dora-kernels"] == dora_kernels.__version__, "measure it again, or remove it"
        for name, layer in table["layers"].items():
            out, rest = name.split("x")
            assert choices.key_of(int(out), *map(int, rest.split(" r"))) == name and layer["microseconds"]


def test_a_user_without_a_home(folder, monkeypatch):
    """Layers run, and `tune` says what to set."""
    monkeypatch.delenv("DORA_KERNELS_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(choices.Path, "home", lambda: Path("~nobody-of-this-name").expanduser())
    assert form_of((24, 40, 4)) == "direct"
    with pytest.raises(FileNotFoundError, match="DORA_KERNELS_CACHE"):
        tuned()
    assert "DORA_KERNELS_CACHE" in json.loads(invoke("doctor", "--json").output)["devices"][0]["tuned"]["any dtype"]


def test_a_candidate_that_cannot_be_compiled(monkeypatch):
    def broken(*_):
        raise TypeError("no code for this shape")

    monkeypatch.setattr(candidates.merged, "_make", broken)
    found = tuned()
    assert found.wrong == {"24x40 r4, merged": "TypeError: no code for this shape"}


def test_without_a_table(folder, recwarn):
    assert form_of((24, 40, 4)) == "direct" and form_of((4096, 4096, 16)) == "factored"
    assert not folder.exists() and not recwarn


def test_a_damaged_file():
    path = tuned().path
    path.write_text("{")
    choices.forget()
    with pytest.warns(RuntimeWarning, match="cannot be read"):
        form_of((24, 40, 4))


def test_a_wrong_candidate_is_left_out(monkeypatch):
    merge, norm = blocked.merge, blocked.factored_norm
    monkeypatch.setattr(candidates.merged.blocked, "merge", lambda *args, **options: merge(*args, **options) * 1.01)
    monkeypatch.setattr(blocked, "factored_norm", lambda *args: norm(*args) * 1.01)
    found = tuned()
    assert set(found.wrong) == {"24x40 r4, factored norm", "24x40 r4, merged"}
    layer = found.table["layers"]["24x40 r4"]
    assert "merged_from_tokens" not in layer and "norm" not in layer
    assert "left out: 24x40 r4, merged: " in str(found)


def test_the_fastest():
    """By hand-made times: from which number of tokens on, with what a step does once, or up to which."""
    from dora_kernels.tuning.measure import _first, _last

    times = {1: {"a": 1.0, "b": 9.0}, 8: {"a": 5.0, "b": 4.0}, 64: {"a": 50.0, "b": 30.0}}
    assert _first(times, "b", ["a"], {}) == 8
    assert _first(times, "b", ["a"], {"b": 2.0}) == 64
    assert _first(times, "b", ["a"], {"b": 40.0}) is None
    assert _first(times, "a", ["b"], {}) is None
    assert _last(times, "a", "b") == 1 and _last(times, "b", "a") == 0
    assert _last({8: {"a": 1.0, "b": 2.0}, 65: {"b": 2.0}}, "a", "b") == 8


def test_in_turns():
    calls = []
    found = in_turns({name: lambda name=name: calls.append(name) for name in "ab"}, CPU, 0.0)
    assert set(found) == {"a", "b"} and {"a", "b"} == set(calls)


def test_a_models_shapes():
    model = nn.Sequential(nn.Linear(40, 24), nn.Linear(24, 40), nn.Embedding(3, 4))
    assert shapes_of(model, 2) == ([(24, 40, 2), (40, 24, 2)], CPU, F32)
    dora_kernels.apply_dora(model, ["1", "2"], rank=4)
    assert shapes_of(model, 2)[0] == [(40, 24, 4)]
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(
        nn.Sequential(nn.Linear(40, 24)).double(), peft.LoraConfig(r=3, target_modules=["0"], use_dora=True)
    )
    assert shapes_of(model, 2) == ([(24, 40, 3)], CPU, torch.float64)


@pytest.mark.parametrize("adapted", [False, True])
def test_a_quantised_model(adapted, monkeypatch):
    """Its own layers are measured, in the dtype in which they multiply, under names of their own."""
    bnb, peft = pytest.importorskip("bitsandbytes"), pytest.importorskip("peft")
    layer = bnb.nn.Linear4bit(64, 128, bias=False, compute_dtype=F32)
    layer.load_state_dict(nn.Linear(64, 128, bias=False).state_dict())
    model = nn.Sequential(layer.to("cpu"))
    if adapted:
        model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["0"], use_dora=True))
    assert shapes_of(model, 4) == ([(128, 64, 4)], CPU, F32)
    found = tune(model, rank=4, tokens=[2, 8], seconds=0.01, progress=False)
    assert not found.wrong and list(found.table["layers"]) == ["128x64 r4 Linear4bit"]
    times = found.table["layers"]["128x64 r4 Linear4bit"]["microseconds"]
    assert set(times) == {"once per step", "training, 2 tokens", "training, 8 tokens"}
    assert all(set(each) == {"composed", "merged"} for each in times.values())
    assert form_of((128, 64, 4)) == "direct"
    make = candidates.merged._make
    monkeypatch.setattr(
        candidates.merged, "_make", lambda *args: (one := make(*args))._replace(weight=one.weight * 1.01)
    )
    assert list(tune(model, rank=4, tokens=[2], seconds=0.01, progress=False).wrong) == ["128x64 r4 Linear4bit, merged"]


@pytest.mark.parametrize(
    "given, options, message",
    [
        (nn.Embedding(3, 4), {}, "the model has no linear layers"),
        ([], {}, "no shapes given"),
        ([(3, 4)], {}, r"expected a model, or \(out_features, in_features, rank\), got \(3, 4\)"),
        ([(3, 0, 2)], {}, "rank"),
        ([(3, 4, 2)], {"tokens": []}, "tokens: expected at least one number"),
        ([(3, 4, 2)], {"tokens": [0]}, "tokens: expected at least 1, got 0"),
        ([(3, 4, 2)], {"tokens": [1.0]}, "tokens: expected ints, got float"),
        ([(3, 4.0, 2)], {}, "model_or_shapes: expected ints"),
        ([(3, 4, 2)], {"device": "meta"}, "device: expected cpu or cuda, got 'meta'"),
        ([(3, 4, 2)], {"device": "tpu"}, "device: expected cpu or cuda, got 'tpu'"),
        ([(3, 4, 2)], {"device": "cuda:99"}, "device: there is no cuda:99"),
        ([(3, 4, 2)], {"dtype": torch.int8}, "dtype: expected float32"),
    ],
)
def test_refused(folder, given, options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        tune(given, progress=False, **options)
    assert not folder.exists()


def test_the_command(folder):
    done = invoke("tune", "24x40", "--rank", "4", "--tokens", "1", "--seconds", "1", "--device", "cpu")
    assert done.exit_code == 0 and "24x40 r4: norm" in done.output and "1/3 24x40 r4" in done.output
    shown = json.loads(invoke("doctor", "--json").output)
    assert shown["devices"][0]["tuned"]["float32"].startswith("1 shapes, measured ")
    found = json.loads(next(folder.iterdir()).read_text())
    next(folder.iterdir()).write_text(json.dumps({**found, "versions": {"torch": "1.0"}}))
    choices.forget()
    assert "ignored" in json.loads(invoke("doctor", "--json").output)["devices"][0]["tuned"]["float32"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["24y40"], "LAYERS: expected OUTxIN or OUTxINxRANK, each at least 1, or a model's folder, got '24y40'"),
        (["24x0"], "LAYERS: expected OUTxIN or OUTxINxRANK, each at least 1, or a model's folder, got '24x0'"),
        (["24x40", "--dtype", "int8"], "--dtype: expected float32, bfloat16, float16, float64, got 'int8'"),
        (
            ["24x40", "--tokens", "a"],
            "--tokens: expected whole numbers of at least 1 with commas between them, got 'a'",
        ),
        (
            ["24x40", "--tokens", "0,1"],
            "--tokens: expected whole numbers of at least 1 with commas between them, got '0,1'",
        ),
        (["24x40", "--device", "tpu"], "--device: expected cpu or cuda, got 'tpu'"),
        (["24x40", "--rank", "0"], "--rank: expected a whole number of at least 1, got '0'"),
        (["24x40", "--rank", "1.5"], "--rank: expected a whole number of at least 1, got '1.5'"),
        (["24x40", "--seconds", "soon"], "--seconds: expected a finite number of at least 1, got 'soon'"),
        (["24x40", "--seconds", "inf"], "--seconds: expected a finite number of at least 1, got 'inf'"),
        (["24x40", "--seconds", "0"], "--seconds: expected a finite number of at least 1, got '0'"),
    ],
)
def test_the_command_refuses(arguments, message):
    done = invoke("tune", *arguments)
    assert done.exit_code == 2 and done.output == f"error: {message}\n"


def test_the_model_of_costs():
    """It decides for the kernels with more work, never with less, and the numbers are those of its statement."""
    for gradients in (True, False):
        firsts = [cost.first_tokens("fused", "formula", gradients, size, size, 16) for size in (1024, 2048, 4096)]
        assert firsts == sorted(firsts, reverse=True) and firsts[-1] > 256
    path = cost.PATHS["fused", True]
    moved = 2 * (8192 * 4096 * (path.passes_out + path.passes_in) + 2 * 4096 * 4096)
    flops = 2 * 8192 * (2 * 4096 * 4096 + path.low_rank * 16 * 4096)
    wanted = path.launches * cost.GAP + flops / cost.RATE + moved / cost.BANDWIDTH
    assert cost.seconds("fused", True, 8192, 4096, 4096, 16) == pytest.approx(wanted)
    assert cost.seconds("fused", True, 1, 64, 64, 16) == path.host


def test_a_measured_threshold(monkeypatch):
    """Of tokens, where the model of costs would say otherwise."""
    call = dispatch.Call("cuda", frozenset({torch.bfloat16}), 64, 4096, 4096, 16, True)
    x = weight = torch.empty(1, dtype=torch.bfloat16, device="meta")
    for first, wanted in ((64, True), (65, False), (None, False)):
        measured = {"fused_from_tokens": {"training": first}}
        monkeypatch.setattr(choices, "measured", lambda *_, measured=measured: measured)
        assert dispatch._chosen(call, x, weight) is wanted
    monkeypatch.setattr(choices, "measured", lambda *_: {})
    assert dispatch._chosen(call, x, weight) is dispatch.prefers_fused(call) is False


def test_the_printed_choices():
    """They are the rule's own."""
    from aot import choices as printed

    for row in printed.rows():
        out, inside = map(int, row["layer"].split("x"))
        call = dispatch.Call("cuda", frozenset({torch.bfloat16}), row["tokens"], out, inside, row["rank"], True)
        few = row["default"] == "one pass"
        fused = dispatch.prefers_fused(call._replace(gradients=row["part"] == "training", one_pass=few))
        assert row["default"] == ("one pass" if few else "fused" if fused else "formula") and fused >= few
    header, cells = printed.table()
    assert len(header) == len(cells[0]) and "measured on a GPU" in printed.STATEMENT


@pytest.fixture
def kernels(monkeypatch):
    """The kernels in the interpreter, as a candidate."""
    if dispatch.triton_problem(CPU):
        pytest.skip("triton is not installed, or its interpreter is off")
    monkeypatch.setattr(candidates.Layer, "ways", lambda layer: iter(("formula", "fused")))


def test_tiles(kernels, monkeypatch):
    """Other tiles are taken, give the same, and are put back; those that give something else are left out."""
    layer = candidates.Layer((40, 48, 4), F32, CPU)
    wanted = {"compose_config(True, 4, 6)": [16, 32, 16, 4, 1]}
    seen, call = {}, layer.calls(["fused"], 9, False)["fused"]
    exact = call()
    with tiles.replaced(wanted, seen.__setitem__):
        torch.testing.assert_close(call(), exact)
    key = next(key for key in seen if key.startswith("compose_config"))
    with tiles.replaced({key: (16, 32, 16, 4, 1)}, seen.__setitem__):
        torch.testing.assert_close(call(), exact)
    assert tuple(seen[key]) == (16, 32, 16, 4, 1)
    after = {}
    with tiles.replaced({}, after.__setitem__):
        call()
    assert tuple(after[key]) != (16, 32, 16, 4, 1)
    assert not measured_tiles._is_right(call, {key: (0, 32, 16, 4, 1)}, [exact])
    assert not measured_tiles._is_right(call, {}, [exact * 1.01])


def test_tiles_in_a_table(kernels, monkeypatch):
    """What is faster goes into the table, by the kernels' question."""
    monkeypatch.setattr(measured_tiles, "neighbours", lambda config: [config._replace(num_warps=2)])
    monkeypatch.setattr(
        measured_tiles, "in_turns",
        lambda calls, *_: {name: 2.0 - (", 2, " in name) for name, call in calls.items() if [call()]},
    )  # fmt: skip
    found = tuned([(16, 24, 4)], tokens=[3])
    asked = set(tiles.ASKED) - {"one_pass_config", "product_config"}  # in 16 bits, and on a GPU
    assert {key.partition("(")[0] for key in found.table["tiles"]} == asked
    assert all(2 in config for config in found.table["tiles"].values())
    layer = found.table["layers"]["16x24 r4"]
    assert set(layer["fused_from_tokens"]) == {"training", "evaluation"} and "tiles" not in layer
    assert set(found.table["tiles"]) <= set(layer["microseconds"])
    assert choices.tiles(CPU) == found.table["tiles"]


def test_one_pass_or_the_blas(kernels, monkeypatch):
    """Up to how many tokens one launch was faster than the products; the norm's form, and what counts of it."""
    ways = "formula", "fused", "one pass"
    monkeypatch.setattr(candidates.Layer, "ways", lambda layer: iter(ways))
    monkeypatch.setattr(candidates.Layer, "norms", candidates.Layer.kernel_norms)
    monkeypatch.setattr(measured_tiles, "tuned", lambda *_: iter(()))
    kinds = []

    def timed(calls, *_):
        kinds.append(tuple(calls))
        tokens = next((len(y) for y in (call() for call in calls.values()) if isinstance(y, torch.Tensor)), 0)
        fast = {"factored", *(("one pass",) if tokens <= 3 else ())}
        return {name: 1.0 if name in fast else 2.0 for name in calls}

    monkeypatch.setattr(measure, "in_turns", timed)
    found = tuned([(16, 24, 4)], tokens=[1, 3, 8, 65], dtype=torch.bfloat16)
    layer = found.table["layers"]["16x24 r4"]
    assert not found.wrong and layer["one_pass_to_tokens"] == 3 and layer["norm"] == "factored"
    assert ("formula", "fused", "one pass") in kinds and kinds[-1] == ("formula", "fused")
    assert choices.factored_norms(CPU) == {(16, 24, 4): True} and "in one pass up to 3 tokens" in str(found)


def test_what_was_measured_of_one_pass_counts(monkeypatch):
    from dora_kernels.core.problem import Weights

    x, factor = torch.zeros(4, 16, dtype=torch.bfloat16), torch.zeros(16, 16, dtype=torch.bfloat16)
    weights = Weights(factor, factor, factor)
    assert dispatch.takes_one_pass(x, weights)
    for last, wanted in ((4, True), (3, False), (0, False)):
        monkeypatch.setattr(choices, "measured", lambda *_, last=last: {"one_pass_to_tokens": last})
        assert dispatch.takes_one_pass(x, weights) is wanted
    with dispatch.one_pass(True):
        assert dispatch.takes_one_pass(x, weights)
        with dispatch.one_pass(False):
            assert not dispatch.takes_one_pass(x, weights)


def test_a_measured_form_of_a_gpus_norm(kernels, monkeypatch):
    from dora_kernels.kernels import factored

    weight, a, b = (torch.ones(shape, dtype=torch.bfloat16) for shape in ((16, 24), (4, 24), (16, 4)))
    for measured, wanted in (({}, False), ({(16, 24, 4): True}, True), ({(16, 24, 8): True}, False)):
        monkeypatch.setattr(factored, "FACTORED", measured)
        assert factored.is_factored(weight, a, b) is wanted
        assert not factored.is_factored(weight.float(), a, b)


def test_neighbours():
    from dora_kernels.kernels.config import compose_config

    shipped = compose_config(False, 16, 1)
    found = list(measured_tiles.neighbours(shipped))
    assert shipped not in found and len(set(found)) == len(found) > 6
    assert all(sum(a != b for a, b in zip(one, shipped)) == 1 for one in found)


def test_a_string_is_no_list_of_shapes():
    with pytest.raises(TypeError, match="expected a model, or a list of shapes, got the string 'llama'"):
        tune("llama")


def test_the_command_prints_lines():
    printed = invoke("tune", "24x40x4", "--tokens", "1", "--device", "cpu", "--seconds", "1").stdout
    assert "\\n" not in printed and "\n  24x40" in printed
