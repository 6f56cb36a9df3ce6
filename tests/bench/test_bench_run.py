"""`python -m bench run`: suites at tiny shapes, providers, what is wrong or missing, bad input."""

from __future__ import annotations

import dataclasses
import importlib.util
import json

import pytest
import torch

from bench import layers, providers, record, show, suites, timing
from bench.__main__ import main
from bench.layers import KINDS, PROVIDERS
from bench.problem import LayerShape, adapter_gradients
from bench.providers import Missing, Subject
from bench.run import Options, Run
from bench.suites import fidelity
from bench.suites import layer as layer_suite
from bench.suites.layer import LayerCase, judged, least_of
from bench.timing import Candidate
from dora_kernels.testing import DTYPES, beyond, errors, make_problem, weight_norm

CPU = torch.device("cpu")
SHAPE = LayerShape(32, 4, 6, "fp32", CPU)
ELSEWHERE = {"ours_triton"} | (set() if importlib.util.find_spec("axolotl") else {"axolotl"})
EAGER = [name for name in PROVIDERS if not name.endswith("_compiled") and name not in ELSEWHERE]


def options(*names, **more):
    given = {"dtypes": ["fp32"], "hidden": [32], "ranks": [4], "tokens": [6], "rounds": 3, "sample_ms": 0.1} | more
    return Options(names, "cpu", **given)


@pytest.fixture(autouse=True)
def plain_memory(monkeypatch):
    """The libraries that are compared may read memory that they have not written, and torch's profiler counts fills."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)


@pytest.mark.parametrize("dtypes", ["fp32", "bf16", "bf16+fp32"])
@pytest.mark.parametrize("provider", EAGER)
def test_every_provider_computes_the_same_layer(provider, dtypes):
    """Output and gradients within the limits; those of LyCORIS and the tutorial include the norm's own."""
    case = LayerCase(dataclasses.replace(SHAPE, dtypes=dtypes), "layer", ("forward and backward",))
    if provider == "ours_merged" and dtypes != "fp32":
        with pytest.raises(Missing, match="'merged' is offered in float32"):
            case.subject(provider)
        return
    subject = case.subject(provider)
    assert not beyond(subject.errors, subject.limits)
    assert all(call() is not None for call in subject.parts["forward and backward"])


@pytest.mark.parametrize("provider", EAGER)
@pytest.mark.parametrize("part", ["step", "step of 4"])
def test_a_step_changes_the_adapter(provider, part):
    case = LayerCase(SHAPE, "layer", (part,))
    layer = layers.make_layer(provider, case.problems[0], SHAPE)
    before = [t.clone() for t in layer.leaves[1:]]
    layers.PARTS[part][0](layer)
    assert all(not torch.equal(was, now) for was, now in zip(before, layer.leaves[1:]))


def test_a_wrong_provider_fails_the_run_and_shows(monkeypatch, tmp_path):
    made = layers.make_layer

    def off(provider, problem, shape):
        layer = made(provider, problem, shape)
        if provider == "peft_lora":
            right = layer.forward
            layer.forward = lambda x: right(x) * 1.001
        return layer

    monkeypatch.setattr(layer_suite, "make_layer", off)
    run = Run(options("decode", providers=["peft_lora", "ours"], out=tmp_path / "a.json"))
    run.all()
    (failure,) = run.record["failures"]
    assert "PEFT LoRA: wrong result: y off by 1.0e-03" in failure["message"]
    assert {row["provider"] for row in run.record["rows"]} == {"peft_lora", "ours"}, "it is timed all the same"
    assert record.read(tmp_path / "a.json")["failures"] == run.record["failures"]


def test_a_norm_that_steps_made_stale_fails_the_run(monkeypatch):
    """It is right when the layer is made, and as fast as nobody else."""
    made = layers.make_layer

    def stale(provider, problem, shape):
        layer = made(provider, problem, shape)
        if provider == "ours_torch":
            norm = weight_norm(problem.weight, problem.lora_A, problem.lora_B, problem.scaling, "out")

            def forward(x):
                _, a, b, m = layer.leaves
                return (x @ problem.weight.T + problem.scaling * x @ a.T @ b.T) * (m / norm)

            layer.forward = forward
        return layer

    monkeypatch.setattr(layer_suite, "make_layer", stale)
    run = Run(options("layer", providers=["peft_dora", "ours_torch"]))
    run.all()
    (failure,) = run.record["failures"]
    assert "ours, torch: wrong result after what was timed: " in failure["message"]
    assert all(show.is_wrong(row) == (row["provider"] == "ours_torch") for row in run.record["rows"])


def test_memory_is_that_of_a_later_call():
    """The first of all makes what stays: a step's moments, and the norm of factors that nobody has moved yet."""
    calls = []

    class Memory(providers.Case):
        suite, label, dtypes, facts, providers = "memory", "a case", "fp32", {"dtypes": "fp32"}, ("ours",)
        timed = False

        def subject(self, provider):
            return Subject(provider, {"step": [lambda: calls.append(torch.ones(100))]})

    run = Run(options("memory"))
    run.measure(Memory())
    assert len(calls) == 2 and run.record["rows"][0]["peak_bytes"] == 400


def test_a_suite_whose_library_is_missing_leaves_the_others(monkeypatch):
    load = suites.load

    def without(name):
        if name == "model":
            raise ModuleNotFoundError("No module named 'transformers'")
        return load(name)

    monkeypatch.setattr(suites, "load", without)
    run = Run(options("model", "host", providers=["frozen"]))
    run.all()
    assert "No module named 'transformers'" in run.record["missing"]["model"]
    assert run.record["rows"] and not run.record["failures"]


def test_copies_exceed_the_cache():
    assert timing.copies_beyond(32, 8) == 6 and timing.copies_beyond(32, 100) == 2
    assert timing.copies_beyond(32, 1, most=12) == 12 and timing.copies_beyond(32, 1, most=1) == 1
    assert timing.cache_bytes(CPU) >= 2**19


def test_results_that_differ_are_told():
    one = torch.randn(8)
    assert not timing.differ([one, one], [one, one + 1e-4]) and timing.differ([one, one], [one, 2 * one])
    assert timing.differ(one, one * torch.nan)


def test_gradients_of_adapters():
    model = torch.nn.ModuleDict({"lora_A": torch.nn.Linear(2, 1), "lora_B": torch.nn.Linear(1, 2, bias=False)})
    model["lora_A"](torch.ones(2)).sum().backward()
    found = adapter_gradients(model)
    assert [t.tolist() for t in found["lora_A"]] == [[[1.0, 1.0]], [1.0]] and found["lora_B"][0].isnan().all()


def test_a_missing_library_is_named_as_missing(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torchtune.modules.peft", None)
    run = Run(options("decode", providers=["torchtune", "ours", "ours_triton"]))
    monkeypatch.setattr(layers, "triton_problem", lambda device: "no GPU")
    run.all()
    assert set(run.record["missing"]) == {"torchtune", "ours_triton"} and not run.record["failures"]
    assert "pip install" in run.record["missing"]["torchtune"]


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("compose", "block")]


@pytest.mark.parametrize("name", ["norm", "layer", "decode", "memory", "host", *SLOW])
def test_every_row_states_everything(name):
    quick = ["frozen", "peft_lora", "peft_dora", "ours", "ours_direct"]
    run = Run(options(name, providers=quick, hidden=None if name == "block" else [32], block=(32, 64, 2, 1)))
    run.all()
    assert not run.record["failures"] and run.record["rows"]
    for row in run.record["rows"]:
        assert row["suite"] == name and row["provider"] in quick and row["dtypes"] == "fp32" and row["shape"]
        assert row["errors"] and set(row["errors"]) == set(row["limits"])
        assert row["bytes"] > 0 and row["flops"] > 0 and row["peak_bytes"] is not None
        assert row["rounds"] == (0 if name == "memory" else 3)
        if name != "memory":
            assert row["us"] > 0 and row["floor_us"] > 0 and row["fraction"] > 0
            assert row["ratios"][row["provider"]] == 1.0 if row["provider"] in row["ratios"] else True


def test_ratios_are_those_of_neighbours():
    slow, fast = Candidate("slow", [], samples=[2.0, 8.0, 40.0]), Candidate("fast", [], samples=[1.0, 2.0, 20.0])
    assert slow.ratio(fast) == 2.0 and fast.ratio(slow) == 0.5
    run = Run(options("decode", providers=["frozen", "peft_lora"]))
    run.all()
    rows = {row["provider"]: row["ratios"] for row in run.record["rows"]}
    assert rows["frozen"]["frozen"] == rows["peft_lora"]["peft_lora"] == 1.0
    assert set(rows["frozen"]) == {"frozen", "peft_lora"}


def test_ceilings_are_the_best_that_was_seen(monkeypatch):
    """What a slow moment showed is raised later, for the rows before that too."""
    copies, products = iter([1e9, 4e9, 2e9]), iter([1e10, 8e10, 4e10])
    monkeypatch.setattr(timing, "copy_bandwidth", lambda *_: next(copies))
    monkeypatch.setattr(timing, "blas_rate", lambda *_: next(products))
    run = Run(options("decode"))
    row = {"dtypes": "fp32", "us": 1000.0, "bytes": 2_000_000, "flops": 4_000_000}
    run.record["rows"].append(row)
    for copy, product, floor in ((1e9, 1e10, 2000.0), (4e9, 8e10, 500.0), (4e9, 8e10, 500.0)):
        run.ceilings()
        run.hold_against_ceilings()
        assert run.record["ceilings"] == {"copy_bytes_per_s": copy, "flop_per_s.float32": product}
        assert row["floor_us"] == floor and row["fraction"] == floor / 1000.0
    row["flops"] = 80_000_000
    run.hold_against_ceilings()
    assert row["floor_us"] == 1000.0, "the products take longer than the copies"


def test_nothing_measured_is_a_failure():
    run = Run(options("norm", providers=["peft_lora"]))
    run.all()
    (failure,) = run.record["failures"]
    assert failure["message"] == "nothing was measured: none of peft_lora in norm"


def test_the_model_suite_is_missing_without_weights(monkeypatch):
    from bench import training

    def absent(*_):
        raise providers.Missing("no weights")

    monkeypatch.setattr(training, "packaged_file", absent)
    run = Run(options("model", folder=__import__("pathlib").Path("/nonexistent")))
    run.all()
    (failure,) = run.record["failures"]
    assert run.record["missing"] == {"model": "no weights"} and "nothing was measured" in failure["message"]


def test_an_interrupted_run_says_so(monkeypatch, tmp_path):
    """What has been measured is kept, and what is missing is no success."""
    run = Run(options("norm", "decode", providers=["ours", "peft_dora"], out=tmp_path / "a.json"))

    def interrupted(case):
        raise KeyboardInterrupt

    measure = {"norm": run.measure, "decode": interrupted}
    monkeypatch.setattr(run, "measure", lambda case: measure[case.suite](case))
    run.all()
    kept = record.read(tmp_path / "a.json")
    assert {row["suite"] for row in kept["rows"]} == {"norm"}
    (failure,) = kept["failures"]
    assert failure["stage"].startswith("decode") and "interrupted, 0 stages before the end" in failure["message"]


def test_a_stage_after_the_limit_is_skipped_by_name():
    run = Run(options("decode", "host", limit_s=1e-9))
    run.all()
    assert not run.record["rows"] and any("skipped" in failure["message"] for failure in run.record["failures"])


@pytest.mark.slow
def test_ours_is_as_near_as_peft_in_every_condition():
    run = Run(options("fidelity", dtypes=["bf16", "bf16+fp32"], hidden=[64], tokens=[64], ranks=[8]))
    run.all()
    assert not run.record["failures"]
    conditions = {row["condition"] for row in run.record["rows"]}
    assert conditions == set(fidelity.CONDITIONS)


def test_least_bytes_and_flops():
    m, n, k, r = 3, 5, 7, 2
    assert least_of((m, n, k, r), (4, 4), "frozen", 1, False, False) == (4 * (m * k + n * k + m * n), 2 * m * n * k)
    size, flops = least_of((m, n, k, r), (2, 4), "dora", 1, False, False)
    assert size == 2 * (m * k + n * k + m * n) + 4 * (r * (n + k) + n) and flops == 2 * m * (n * k + r * (n + k))
    once, four = (least_of((m, n, k, r), (4, 4), "lora", count, True, False) for count in (1, 4))
    assert four == (4 * once[0], 4 * once[1]) and once[1] == 2 * m * 2 * n * k + 6 * m * r * (n + k)
    step = least_of((m, n, k, r), (4, 4), "dora", 1, True, True)
    both = least_of((m, n, k, r), (4, 4), "dora", 1, True, False)
    assert step[1] - both[1] == 2 * n * k * r and step[0] - both[0] == 4 * (7 * (r * (n + k) + n) + n * k)


def test_gaps_between_seeds_and_between_implementations():
    def curve(provider, seed, *losses, held_out, accuracy):
        return {
            "suite": "finetune", "provider": provider, "rank": 4, "seed": seed, "losses": losses, "held_out": held_out,
            "accuracy": accuracy,
        }  # fmt: skip

    found = show.gaps([
        curve("peft_dora", 0, 3.0, 2.0, held_out=1.0, accuracy=0.50),
        curve("ours", 0, 3.0, 2.5, held_out=1.25, accuracy=0.50),
        curve("peft_dora", 1, 4.0, 2.0, held_out=1.5, accuracy=0.75),
        curve("ours", 1, 4.0, 2.25, held_out=1.5, accuracy=0.75),
        curve("peft_lora", 0, 9.0, 9.0, held_out=9.0, accuracy=0.0),
    ])  # fmt: skip
    ours = {"loss": 0.5, "last losses": 0.25, "held-out loss": 0.25, "held-out accuracy": 0.0}
    seeds = {"loss": 1.0, "last losses": 0.5, "held-out loss": 0.5, "held-out accuracy": 0.25}
    assert found == {
        **{f"{what}, ours to stock": value for what, value in ours.items()},
        **{f"{what}, seed to seed{most}": value for what, value in seeds.items() for most in ("", ", at most")},
    }


def test_kinds_are_told_apart():
    """What is right for one kind of layer is beyond the limits of the others."""
    kinds = [*dict.fromkeys(KINDS.values()), "dora"]
    wanted = {kind: judged(make_problem(), kind) for kind in kinds}
    for kind, (exact, allowed) in wanted.items():
        assert all(value.dtype == torch.float64 for value in exact.values())
        assert set(allowed) == set(errors(exact, exact))
        for other, (results, _) in wanted.items():
            same = {name: results.get(name, torch.zeros_like(value)) for name, value in exact.items()}
            assert bool(beyond(errors(same, exact), allowed)) == (kind != other), (kind, other)


def test_names_of_dtypes_are_those_of_the_cases():
    assert {name.replace("/", "+") for name in providers.DTYPES} <= set(DTYPES)


class Frozen:
    """Stands in for `dora_kernels.frozen_norms`: the layer's norm at that time, whatever happens to A and B."""

    def __init__(self, layer):
        self.layer, self.entered = layer, False

    def __enter__(self):
        self.entered = True
        return self

    def __exit__(self, *_):
        pass


def test_frozen_norms_take_part_in_inference_alone(monkeypatch):
    run = Run(options("host", providers=["peft_dora", "ours_frozen"]))
    monkeypatch.setattr(layers.dora_kernels, "frozen_norms", None, raising=False)
    run.all()
    assert "frozen_norms" in run.record["missing"]["ours_frozen"]
    made = []
    monkeypatch.setattr(layers.dora_kernels, "frozen_norms", lambda layer: made.append(Frozen(layer)) or made[-1])
    run = Run(options("host", providers=["peft_dora", "ours_frozen"]))
    run.all()
    assert not run.record["failures"] and made[0].entered and not made[0].layer.training
    parts = {(row["part"], row["provider"]) for row in run.record["rows"]}
    assert ("inference", "ours_frozen") in parts and ("forward and backward", "ours_frozen") not in parts
    row = next(row for row in run.record["rows"] if row["provider"] == "ours_frozen")
    assert set(row["errors"]) == set(row["limits"]) == {"inference"} and row["ratios"]["peft_dora"] > 0


def test_the_compiled_providers_take_part_in_the_layer_suites():
    for suite in ("layer", "decode", "memory", "host"):
        (case,) = Run(options(suite)).cases()
        assert {"peft_lora_compiled", "peft_dora_compiled", "ours_compiled"} <= set(case.providers)
        assert ("ours_frozen" in case.providers) == (suite in ("decode", "host"))


BAD = {
    "suite": (["--suite", "kernels"], "--suite: invalid choice: 'kernels'"),
    "provider": (["--providers", "ours", "nobody"], "--providers: invalid choice: 'nobody'"),
    "dtype": (["--dtype", "int8"], "--dtype: invalid choice: 'int8'"),
    "device": (["--device", "tpu"], "--device: expected cpu, cuda or cuda:N, got 'tpu'"),
    "rank": (["--rank", "0"], "expected a whole number of at least 1, got '0'"),
    "tokens": (["--tokens", "many"], "expected a whole number of at least 1, got 'many'"),
    "limit": (["--limit-s", "nan"], "expected a positive number, got 'nan'"),
    "block": (["--block", "4x4"], "expected four sizes"),
    "out": (["--out", "results.txt"], "expected a name that ends in .json"),
    "folder": (["--out", "nowhere/a.json"], "there is no folder nowhere"),
    "html": (["--html", "a.htm"], "expected a name that ends in .html"),
    "seeds": (["--seeds", "-1"], "expected a whole number of at least 0, got '-1'"),
    "heads": (["--block", "100x200x3x2"], "expected an even width for each head"),
    "option": (["--fast"], "unrecognized arguments: --fast"),
}


@pytest.mark.parametrize(("arguments", "message"), BAD.values(), ids=BAD)
def test_bad_input(capsys, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main(["run", *arguments])
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and message in said and said.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["run", "--device", "cuda"])
    assert stopped.value.code == 2 and "no GPU that torch can use" in capsys.readouterr().err


def test_no_command(capsys):
    for arguments in ([], ["measure"]):
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        assert stopped.value.code == 2 and capsys.readouterr().err.count("\n") == 1


def test_earlier_results_are_never_overwritten(capsys, tmp_path):
    for name, words in {"a.json": "--out a.json", "a.html": "--html a.html"}.items():
        option, given = words.split()
        path = tmp_path / name
        path.write_text("earlier")
        with pytest.raises(SystemExit) as stopped:
            main(["run", "--suite", "decode", option, str(tmp_path / given)])
        assert stopped.value.code == 2 and "never overwritten" in capsys.readouterr().err
        assert path.read_text() == "earlier"


def test_a_run_from_the_command_line(capsys, tmp_path):
    out, page = tmp_path / "a.json", tmp_path / "a.html"
    words = "run --suite decode norm --hidden 32 --tokens 2 --rank 2 4 --providers peft_lora ours peft_dora --rounds 3"
    assert main([*words.split(), "--device", "cpu", "--out", str(out), "--html", str(page)]) == 0
    said = capsys.readouterr().out
    assert "decode: inference, 32x32, rank 4, 2 tokens, fp32" in said and str(out) in said and "nothing failed" in said
    made = record.read(out)
    assert {row["provider"] for row in made["rows"]} == {"peft_lora", "ours", "peft_dora"}
    assert {row["rank"] for row in made["rows"]} == {2, 4}
    assert made["settings"]["rounds"] == 3 and made["ceilings"]["flop_per_s.float32"] > 0
    assert page.read_text().startswith("<!doctype html>")
    assert json.loads(out.read_text())["commit"]


def test_every_suite_has_its_module():
    modules = [suites.load(name) for name in suites.SUITES]
    assert all(module.__doc__ and hasattr(module, "cases") != hasattr(module, "stages") for module in modules)
    assert set(suites.DEFAULT) <= set(suites.SUITES)
