"""Which groups of tensors have changed: one bit anywhere is seen, and nothing else is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import LANES, bf16, f16, f32, usable

import dora_kernels

pytest.importorskip("triton")

from aot.resources import TARGETS


@pytest.fixture(scope="module", params=[lane for lane in LANES if lane.id.startswith("triton")])
def lane(request):
    return usable(request.param)


@pytest.fixture
def kernels(lane):
    from dora_kernels import kernels

    return kernels


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of few elements, so that small tensors have several, and blocks that are not whole."""
    from dora_kernels.kernels import config, watch

    monkeypatch.setattr(watch, "watch_config", lambda: config.WatchConfig(64, 16, 4, 2))
    watch._plan.cache_clear()
    yield
    watch._plan.cache_clear()


def random(lane, *shape, dtype=f32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape))).to(lane.device, dtype)


def layouts(lane, dtype):
    """A tensor of each way to lie in memory, by name."""
    flat = random(lane, 4000, dtype=dtype)
    return {
        "whole chunks": flat[:128],
        "a part of a block": flat[:13],
        "several chunks and a part": flat[:203],
        "one element": flat[:1],
        "an odd count": flat[16:95],
        "at one element's offset": flat[1:200],
        "at two elements' offset": flat[2:201],
        "a vector with gaps": flat[5::37],
        "a matrix": flat[:360].view(24, 15),
        "a transposed matrix": flat[:360].view(24, 15).t(),
        "rows with gaps": flat[:1000].view(20, 50)[:, 3:40],
        "columns with gaps": flat[:1000].view(20, 50)[::3, ::2],
        "four dimensions": flat[:240].view(4, 5, 3, 4),
        "channels last": flat[:240].view(4, 5, 3, 4).permute(0, 3, 1, 2),
        "a number": flat[7],
        "nothing": flat[:0],
    }


def bits(tensor):
    return tensor.view(torch.int32 if tensor.dtype == f32 else torch.int16)


def flip(tensor, element, bit):
    """One bit of one element of a tensor of any layout."""
    index = [int(i) for i in torch.unravel_index(torch.tensor(element), tensor.shape)]
    one = tensor[tuple(index)] if index else tensor
    width = 32 if tensor.dtype == f32 else 16
    bits(one).bitwise_xor_(-(1 << bit) if bit == width - 1 else 1 << bit)


@pytest.mark.parametrize("dtype", [f32, bf16, f16], ids=str)
def test_one_bit_of_any_tensor_is_seen(lane, kernels, small_chunks, dtype):
    width = 32 if dtype == f32 else 16
    groups = []
    for name, view in layouts(lane, dtype).items():
        # As the view lies, in memory of its own.
        memory = torch.zeros(4001, dtype=dtype, device=lane.device)
        tensor = memory.as_strided(view.shape, view.stride(), view.storage_offset()).copy_(view)
        watch = kernels.Watch([[], [tensor]])
        assert watch.changed() == [0, 1] and watch.changed() == [], name
        last = tensor.numel() - 1
        for element, bit in ((0, 0), (last // 2, width // 2), (last, width - 1)) if last >= 0 else ():
            flip(tensor, element, bit)
            assert watch.changed() == [1], f"{name}: bit {bit} of element {element}"
        assert watch.changed() == [], name
        groups.append([tensor])

    watch = kernels.Watch(groups)
    watch.changed()
    for index in (4, 9):
        flip(groups[index][0], 7, 3)
    assert watch.changed() == [4, 9] and watch.changed() == []


def test_every_element_is_watched_and_what_lies_between_is_not(lane, kernels, small_chunks):
    memory = random(lane, 120, dtype=bf16)
    inside = torch.zeros(120, dtype=torch.bool)
    for one in (memory, inside):
        one[3:117].view(6, 19)[:, 2:16] = 1
    watch = kernels.Watch([[memory[3:117].view(6, 19)[:, 2:16]]])
    watch.changed()
    for element in range(120):
        flip(memory, element, element % 16)
        assert watch.changed() == ([0] if inside[element] else []), element


def test_what_is_exchanged_or_undone_is_seen(lane, kernels):
    """Changes that a plain sum or a plain xor of the elements would miss."""
    matrix, vector = random(lane, 8, 300), random(lane, 64)
    watch = kernels.Watch([[vector], [matrix]])
    watch.changed()
    matrix[[0, 1]] = matrix[[1, 0]]
    assert watch.changed() == [1]
    matrix[:, [5, 9]] = matrix[:, [9, 5]]
    assert watch.changed() == [1]
    matrix.neg_()
    assert watch.changed() == [1]
    matrix[0, 3], matrix[0, 4] = matrix[0, 3] + 1, matrix[0, 4] - 1
    assert watch.changed() == [1]
    vector[4] = 0.0
    assert watch.changed() == [0]
    vector[4] = -0.0
    assert watch.changed() == [0]
    vector[4] = torch.nan
    assert watch.changed() == [0] and watch.changed() == []
    vector.copy_(vector.clone())
    assert watch.changed() == [], "written, and no bit is another"


@pytest.mark.parametrize("start", [0, 1], ids=["aligned", "at an offset"])
def test_elements_of_two_blocks_exchanged(lane, kernels, small_chunks, start):
    """The same lanes of a program, one after the other, whole blocks or not."""
    vector = random(lane, 41)[start : start + 40]
    watch = kernels.Watch([[vector]])
    watch.changed()
    for one, other in ((1, 17), (17, 33), (1, 33)):
        vector[[one, other]] = vector[[other, one]]
        assert watch.changed() == [0], (one, other)


def test_both_halves_of_a_fingerprint_count(lane, kernels):
    watch = kernels.Watch([[random(lane, 41)]])
    watch.changed()
    for half in (0, 1):
        watch._seen[0, half] ^= 1
        assert watch.changed() == [0] and watch.changed() == []


def test_several_tensors_and_groups(lane, kernels):
    groups = [[random(lane, 40, 8), random(lane, 8, 300, dtype=bf16), random(lane, 40, dtype=f16)] for _ in range(5)]
    groups.insert(2, [])
    watch = kernels.Watch(groups)
    assert watch.changed() == [0, 1, 2, 3, 4, 5]
    groups[1][2][39] += 1
    groups[4][0][0, 0] += 1
    groups[4][1][7, 299] += 1
    assert watch.changed() == [1, 4] and watch.changed() == []
    assert kernels.Watch([]).changed() == [] and kernels.Watch([[], []]).changed() == [0, 1]


def test_holds_until_a_tensor_is_another(lane, kernels):
    first, second = random(lane, 40, 8), random(lane, 64)
    watch = kernels.Watch([[first], [second]])
    assert watch.holds([[first], [second]]) and watch.holds([[first.detach()], [second[:]]])
    others = (
        [[first]], [[first, second]], [[second], [first]], [[first.clone()], [second]], [[first], [second[1:]]],
        [[first], [second[:63]]], [[first.t()], [second]], [[first.view(8, 40)], [second]],
        [[first], [second.view(torch.int32)]],
    )  # fmt: skip
    for other in others:
        assert not watch.holds(other)
    parameter = torch.nn.Parameter(first)
    watch = kernels.Watch([[parameter]])
    parameter.data = first.clone()
    assert not watch.holds([[parameter]])
    watch.changed()
    assert watch.changed() == [], "the memory that it was made for is gone"


def test_a_question_that_fails_is_asked_again_of_all(lane, kernels, monkeypatch):
    from dora_kernels.kernels import watch as module

    tensor = random(lane, 64)
    watch = kernels.Watch([[tensor], [tensor]])
    watch.changed()

    def fails(*_):
        raise torch.OutOfMemoryError

    with monkeypatch.context() as patch:
        patch.setattr(module, "launch", fails)
        with pytest.raises(torch.OutOfMemoryError):
            watch.changed()
    assert watch.changed() == [0, 1] and watch.changed() == []


def test_the_number_of_a_call_starts_again(lane, kernels):
    tensor = random(lane, 64)
    watch = kernels.Watch([[tensor]])
    watch.changed()
    watch._call = 0x7FFFFFFE
    for _ in range(3):
        tensor[0] += 1
        assert watch.changed() == [0] and watch.changed() == []


def test_what_cannot_be_watched(lane, kernels):
    with pytest.raises(ValueError, match=r"groups\[1\]: expected float32, bfloat16 or float16, got torch.int8"):
        kernels.Watch([[random(lane, 3)], [torch.zeros(3, dtype=torch.int8, device=lane.device)]])
    with pytest.raises(ValueError, match=r"groups\[0\]: expected at most two dimensions .* shape \(2, 3, 2\)"):
        kernels.Watch([[random(lane, 2, 3, 4)[..., ::2]]])
    with pytest.raises(ValueError, match=r"groups\[0\]: expected all tensors on .*, got one on meta"):
        kernels.Watch([[random(lane, 3), torch.zeros(3, device="meta")]])


_COMPILE = """
import json, re
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from aot.machine_code import read
from aot.resources import TARGETS, Compiled, problems
from dora_kernels.kernels import watch

tiles = watch.watch_config()._asdict()
options = {name: tiles.pop(name) for name in ("num_warps", "num_stages")}
found = {}
for target in TARGETS.values():
    gpu = GPUTarget(target.backend, target.arch, target.warp_size)
    pointers = {"table_ptr": "*i64", "seen_ptr": "*i32", "flags_ptr": "*i32"}
    source = ASTSource(
        fn=watch.compare_chunks,
        signature={**pointers, "call": "i32", **dict.fromkeys(tiles, "constexpr")},
        constexprs={(4 + at,): value for at, value in enumerate(tiles.values())},
        attrs={(at,): make_backend(gpu).parse_attr("DS") for at in range(3)},
    )
    one = Compiled(target.name, "watch", "", "", {**tiles, **options})
    code = triton.compile(source, target=gpu, options=options)
    read([(one, code)])
    text = code.asm.get("ptx") or code.asm["amdgcn"]
    wide = re.search("ld.global.v4.b32|_load_dwordx4|_load_b128", text) is not None
    found[target.name] = problems(one), wide, one.registers, one.shared
print(json.dumps(found))
"""


@pytest.mark.slow
def test_compiles_for_every_target():
    """It fits, spills nothing, and reads aligned tensors 16 bytes at once. In a process that does not interpret."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    root = Path(dora_kernels.__file__).parents[1]
    path = os.pathsep.join((str(root), str(Path(__file__).parents[1] / "support")))
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _COMPILE],
        cwd=root, env={**environment, "PYTHONPATH": path}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert set(found) == set(TARGETS)
    for target, (failures, wide, *_) in found.items():
        assert not failures, f"{target}: {failures}"
        assert wide, f"{target}: no loads of 16 bytes"
