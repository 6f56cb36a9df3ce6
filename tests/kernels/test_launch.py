"""Kept compiled kernels: which launches go directly, with what, and which go Triton's way."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from dora_kernels.kernels import config
from dora_kernels.kernels import launch as module
from dora_kernels.kernels.launch import Plan, launch

TILES = config.VectorConfig(256, 4, 1)


class Compiled:
    """A compiled kernel whose launcher writes down what it is given."""

    function, packed_metadata = "function", "metadata"

    def __init__(self, log):
        self.run = lambda *given: log.append(("direct", *given))


class Kernel:
    """A jitted kernel that writes down what it is launched with."""

    def __init__(self, log):
        self.log = log

    def __getitem__(self, grid):
        def ordinary(*given, **named):
            self.log.append(("ordinary", grid, *given, named))
            return Compiled(self.log)

        return ordinary

    run = __getitem__


@pytest.fixture
def stage(monkeypatch):
    """Triton replaced: `ways` tells how the launches since the last time went."""
    log: list = []
    hooks = SimpleNamespace(launch_enter_hook=None, launch_exit_hook=None)
    device = SimpleNamespace(now=0)
    active = SimpleNamespace(get_current_device=lambda: device.now, get_current_stream=lambda index: f"stream {index}")
    monkeypatch.setattr(module, "JITFunction", Kernel)
    monkeypatch.setattr(module, "CompiledKernel", Compiled)
    monkeypatch.setattr(module, "driver", SimpleNamespace(active=active))
    monkeypatch.setattr(module, "_direct", module._Triton(Kernel.run, hooks, True))

    def ways():
        found = [one[0] for one in log]
        log.clear()
        return found

    return SimpleNamespace(log=log, hooks=hooks, device=device, ways=ways, kernel=Kernel(log))


def test_what_a_direct_launch_is_given(stage):
    plan, x, y = Plan((7, 8), ("flag",), TILES), torch.zeros(4), torch.zeros(4)
    launch(stage.kernel, plan, (3,), (x, None, y), (5, 0.5))
    named = {"BLOCK": 256, "num_warps": 4, "num_stages": 1}
    assert stage.log == [("ordinary", (3,), x, None, y, 7, 8, 5, 0.5, "flag", named)]
    stage.log.clear()
    launch(stage.kernel, plan, (3, 2), (x, None, y), (6, 0.25))
    addresses = x.data_ptr(), 0, y.data_ptr()
    assert stage.log == [
        (
            "direct",
            3,
            2,
            1,
            "stream 0",
            "function",
            "metadata",
            None,
            None,
            None,
            *addresses,
            7,
            8,
            6,
            0.25,
            "flag",
            256,
        )
    ]


def test_before_3_3_constants_are_not_given(stage, monkeypatch):
    monkeypatch.setattr(module, "_direct", module._direct._replace(takes_constants=False))
    plan, x = Plan((7,), ("flag",), TILES), torch.zeros(4)
    for _ in range(2):
        launch(stage.kernel, plan, (3,), (x,), (5,))
    assert stage.log[-1][-3:] == (x.data_ptr(), 7, 5)


def test_one_compilation_serves_every_length_and_another_is_made_for_what_code_depends_on(stage):
    plan = Plan((7,), (), TILES)
    memory = torch.zeros(64, dtype=torch.bfloat16)

    def go(tensors=(memory,), free=(5,), plan=plan):
        launch(stage.kernel, plan, (1,), tensors, free)
        return stage.ways()

    assert go() == ["ordinary"]
    assert [way for tokens in (1, 16, 17, 4096, 2**31 - 1) for way in go(free=(tokens,))] == ["direct"] * 5
    assert go((memory[8:],)) == ["direct"]  # 16 bytes on
    others = {
        "an odd offset": dict(tensors=(memory[1:],)),
        "a dtype": dict(tensors=(memory.view(torch.float16),)),
        "an absent tensor": dict(tensors=(memory, None)),
        "another that is there": dict(tensors=(memory, memory)),
        "the second at an odd offset": dict(tensors=(memory, memory[3:])),
        "the first at an odd offset": dict(tensors=(memory[3:], memory)),
        "a number of more than 32 bits": dict(free=(2**31,)),
        "another plan": dict(plan=Plan((8,), (), TILES)),
    }
    for what, given in others.items():
        assert go(**given) == ["ordinary"], what
        assert go(**given) == ["direct"], what
    stage.device.now = 1
    assert go() == ["ordinary"] and go() == ["direct"]
    stage.device.now = 0
    assert go() == ["direct"]


class On:
    """A tensor that says on which GPU it is."""

    def __init__(self, index):
        self.index, self.device = index, torch.device("cuda", index)
        self.dtype, self.is_cuda = torch.float32, True

    def get_device(self):
        return self.index

    def data_ptr(self):
        return 1 << 20


def test_a_tensor_elsewhere_is_left_to_triton(stage):
    plan = Plan((7,), (), TILES)
    for _ in range(2):
        launch(stage.kernel, plan, (1,), (On(0), On(0)), (5,))
    assert stage.ways() == ["ordinary", "direct"]
    launch(stage.kernel, plan, (1,), (On(0), torch.zeros(4)), (5,))
    assert stage.ways() == ["ordinary"], "an address of the CPU's memory was launched on"


def test_on_the_first_tensors_device(stage, monkeypatch):
    class Entered:
        def __init__(self, device):
            self.device = device

        def __enter__(self):
            stage.before, stage.device.now = stage.device.now, self.device.index

        def __exit__(self, *_):
            stage.device.now = stage.before

    monkeypatch.setattr(torch.cuda, "device", Entered)
    plan = Plan((7,), (), TILES)
    for index in (1, 1, 0, 0, 1):
        launch(stage.kernel, plan, (1,), (On(index),), (5,))
    assert [one[4] for one in stage.log if one[0] == "direct"] == ["stream 1", "stream 0", "stream 1"]
    assert stage.device.now == 0


@pytest.mark.parametrize("name", ["launch_enter_hook", "launch_exit_hook"])
@pytest.mark.parametrize("chain", [False, True])
def test_a_profiler_hears_of_every_launch(stage, name, chain):
    """Up to Triton 3.4 a hook is a function or None, later a chain that may be empty."""
    plan, x = Plan((7,), (), TILES), (torch.zeros(4),)

    def go():
        launch(stage.kernel, plan, (1,), x, (5,))
        return stage.ways()

    if chain:
        setattr(stage.hooks, name, SimpleNamespace(calls=[]))
    assert go() == ["ordinary"] and go() == ["direct"]
    if chain:
        getattr(stage.hooks, name).calls.append(print)
    else:
        setattr(stage.hooks, name, print)
    assert go() == ["ordinary"] and go() == ["ordinary"]


def test_whoever_replaces_tritons_launch_sees_all(stage, monkeypatch):
    plan, x = Plan((7,), (), TILES), (torch.zeros(4),)
    for _ in range(2):
        launch(stage.kernel, plan, (1,), x, (5,))
    assert stage.ways() == ["ordinary", "direct"]
    monkeypatch.setattr(Kernel, "run", lambda *_: None)
    launch(stage.kernel, plan, (1,), x, (5,))
    assert stage.ways() == ["ordinary"]


def test_where_triton_launches_otherwise_its_own_way_is_taken_and_said_once(stage, monkeypatch):
    monkeypatch.setattr(module, "_direct", None)
    monkeypatch.setattr(module, "INTERPRETED", False)
    monkeypatch.setattr(module, "_found", "it has changed")
    module._say.cache_clear()
    plan, x = Plan((7,), (), TILES), (torch.zeros(4),)
    with pytest.warns(RuntimeWarning, match="it has changed") as seen:
        for _ in range(3):
            launch(stage.kernel, plan, (1,), x, (5,))
    assert len(seen) == 1 and stage.ways() == ["ordinary"] * 3


def test_the_installed_triton_launches_as_expected():
    """Its source has the call that a direct launch repeats."""
    found = module._triton()
    assert isinstance(found, module._Triton), found
    assert found.hooks.launch_enter_hook is None or found.hooks.launch_enter_hook.calls == []


FORMS = {
    "3.2": "self.CompiledKernel.launch_enter_hook, self.CompiledKernel.launch_exit_hook, *non_constexpr_vals)",
    "3.3": "self.CompiledKernel.launch_enter_hook, self.CompiledKernel.launch_exit_hook,\n  *bound_args.values())",
    "3.4": "knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook, *bound_args.values())",
    "one more argument": "knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook, 0, *bound_args.values())",
    "another hook": "knobs.runtime.launch_enter_hook, None, *bound_args.values())",
}


@pytest.mark.parametrize("name", FORMS)
def test_versions_are_told_apart_by_their_source(name, monkeypatch):
    start = "kernel.run(grid_0, grid_1, grid_2, stream, kernel.function, kernel.packed_metadata,\n launch_metadata, "
    monkeypatch.setattr(module.inspect, "getsource", lambda _: start + FORMS[name])
    found = module._triton()
    if not name.startswith("3."):
        assert "does not know" in found
        return
    assert found.takes_constants == (name != "3.2")
    assert found.hooks is (module.CompiledKernel if name < "3.4" else pytest.importorskip("triton.knobs").runtime)


def test_a_source_that_is_not_there_or_not_tritons(monkeypatch):
    def nothing(_):
        raise OSError("no source")

    with monkeypatch.context() as patch:
        patch.setattr(module.inspect, "getsource", nothing)
        assert "no source" in module._triton()
    monkeypatch.setattr(module.JITFunction, "run", lambda *_: None)
    assert "not Triton's own" in module._triton()
