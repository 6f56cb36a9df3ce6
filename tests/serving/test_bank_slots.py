"""Slots and tiers of `AdapterBank`: who makes room, what is counted, and threads."""

from __future__ import annotations

import threading

import pytest
import torch
from bank_models import expected, small
from torch import nn

from dora_kernels import AdapterBank
from dora_kernels.serving.batch import around


def stack():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4))


@pytest.fixture
def made():
    model = stack()
    adapters = {name: small(1 + i, seed=i, dora=i % 2 == 0) for i, name in enumerate("abcde")}
    return model, adapters


def check(bank, model, adapters, names):
    x = torch.randn(len(names), 5)
    with bank.rows(names):
        y = model(x)
    for i, name in enumerate(names):
        wanted = expected(model[0].weight, model[0].bias, x[i], adapters.get(name))
        torch.testing.assert_close(y[i].double(), wanted, rtol=1e-4, atol=1e-5)


def test_the_least_recently_used_makes_room(made):
    model, adapters = made
    bank = AdapterBank(model, slots=2)
    for name in "abc":
        bank.load(name, adapters[name])
    assert bank.names == ["a", "b", "c"] and bank.resident == {"a": 0, "b": 1}
    check(bank, model, adapters, ["b", "a"])
    check(bank, model, adapters, ["c"])
    assert bank.resident == {"a": 0, "c": 1}, "b was asked for before a"
    check(bank, model, adapters, ["a", "b"])
    assert bank.resident == {"a": 0, "b": 1}
    check(bank, model, adapters, ["c", "b", None])
    assert bank.resident == {"b": 1, "c": 0}


def test_pins(made):
    model, adapters = made
    bank = AdapterBank(model, slots=2)
    for name in "abc":
        bank.load(name, adapters[name])
    bank.pin("a")
    check(bank, model, adapters, ["b"])
    for name in "cbc":
        check(bank, model, adapters, [name])
        assert "a" in bank.resident
    with (
        pytest.raises(ValueError, match=r"2 adapters need a slot, and 2 slots hold 'a' \(pinned\)"),
        bank.rows(["b", "c"]),
    ):
        pass
    bank.pin("c")
    with pytest.raises(ValueError, match="'a' .*pinned.*'c'"):
        bank.pin("b")
    bank.pin("a", False)
    check(bank, model, adapters, ["b", "c"])
    assert set(bank.resident) == {"b", "c"}


def tensors_of(bank):
    """Every tensor that it holds, by tier."""
    slots = [t for layer in bank._layers.values() for t in (layer.stacks or ()) if isinstance(t, torch.Tensor)]
    host = [t for e in bank._entries.values() for part in (e.host or {}).values() for t in part if t is not None]
    return slots, host


def test_memory(made):
    """Bytes by tier are the tensors' sum; what comes back is what went, to the bit."""
    model, adapters = made
    bank = AdapterBank(model, slots=2)
    assert bank.memory() == {"slots": 0, "host": 0}
    for name in "abcde":
        bank.load(name, adapters[name])
        for tier, tensors in zip(("slots", "host"), tensors_of(bank), strict=True):
            assert bank.memory()[tier] == sum(t.nbytes for t in tensors)
            assert all(t.untyped_storage().nbytes() == t.nbytes for t in tensors), "views would hold more"
    x, before = torch.randn(1, 5), {}
    for _ in range(2):
        for name in "abcde":
            with bank.rows([name]):
                y = model(x)
            assert before.setdefault(name, y).equal(y)
            slots, host = (sum(t.nbytes for t in tensors) for tensors in tensors_of(bank))
            assert bank.memory() == {"slots": slots, "host": host}
    for name in "abcde":
        bank.unload(name)
    assert bank.memory()["host"] == 0 and bank.names == [] and bank.resident == {}
    bank.close()
    assert bank.memory() == {"slots": 0, "host": 0} and "forward" not in vars(model[0]) and not model._forward_pre_hooks


def test_the_host_s_limit(made):
    """It holds for every choice of adapters that may be without a slot."""
    model, adapters = made
    size = AdapterBank(stack(), slots=1)
    size.load("e", adapters["e"])
    size.load("d", adapters["d"])
    limit = size.memory()["host"]
    bank = AdapterBank(model, slots=1, host_limit=limit)
    bank.load("e", adapters["e"])
    with pytest.raises(ValueError, match=f"2 adapters in 1 slots could need .* above host_limit={limit}"):
        bank.load("d", adapters["d"])
    assert bank.names == ["e"] and bank.memory()["host"] == 0
    bank.unload("e")
    for name in "ab":
        bank.load(name, adapters[name])
    for name in "abab":
        check(bank, model, adapters, [name])
        assert bank.memory()["host"] <= limit
    none = AdapterBank(stack(), slots=1, host_limit=0)
    none.load("a", adapters["a"])
    with pytest.raises(ValueError, match="host_limit=0"):
        none.load("b", adapters["b"])


def test_a_slot_s_former_content_is_gone(made):
    """A smaller rank, no magnitude, fewer layers: nothing of the one before is left."""
    model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 4))
    bank = AdapterBank(model, slots=1)
    large = small(5, names=("0",), seed=1)
    large.layers |= small(5, (4, 4), names=("1",), seed=2).layers
    bank.load("large", large)
    bank.load("little", little := small(1, dora=False, seed=3))
    x = torch.randn(3, 5)
    for _ in range(2):
        with bank.rows(["little"] * 3):
            y = model(x)
        first = expected(model[0].weight, model[0].bias, x, little)
        torch.testing.assert_close(
            y.double(), expected(model[1].weight, model[1].bias, first, None), rtol=1e-5, atol=1e-5
        )
        with bank.rows(["large"] * 3):
            y = model(x)
        first = expected(model[0].weight, model[0].bias, x, large)
        wanted = expected(model[1].weight, model[1].bias, first, large, "1")
        torch.testing.assert_close(y.double(), wanted, rtol=1e-4, atol=1e-4)


def test_replaced_while_in_use(made):
    """A running batch ends with the old one; the next has the new one, and pins stay."""
    model, adapters = made
    bank = AdapterBank(model, slots=2)
    bank.load("a", adapters["a"])
    bank.pin("a")
    x = torch.randn(1, 5)
    with bank.rows(["a"]):
        before = model(x)
        bank.replace("a", adapters["c"])
        assert model(x).equal(before)
        with pytest.raises(ValueError, match="'a' .*in use"), bank.rows(["a"]):
            bank.unload("a")
    check(bank, model, {"a": adapters["c"]}, ["a"])
    assert list(bank.resident) == ["a"]
    bank.load("b", adapters["b"])
    assert set(bank.resident) == {"a", "b"}, "the old one has left its slot"


def test_a_pinned_one_is_replaced_while_in_use(made):
    """Another thread waits for the slot that the old one leaves, and the new one is in it before it is asked for."""
    model, adapters = made
    bank = AdapterBank(model, slots=1)
    bank.load("a", adapters["a"])
    bank.pin("a")
    with bank.rows(["a"]):
        bank.replace("a", adapters["c"])
        waiter = threading.Thread(target=lambda: check(bank, model, {"a": adapters["c"]}, ["a"]))
        waiter.start()
        waiter.join(0.1)
        assert waiter.is_alive(), "it was refused"
    waiter.join(30)
    assert bank.resident == {"a": 0}
    with bank.rows(["a"]):
        bank.replace("a", adapters["b"])
    assert bank.resident == {"a": 0}


def test_blocks_within_blocks_do_not_wait_for_each_other(made):
    """Each thread holds one of two slots and wants another: one is told, and the other then gets it."""
    model, adapters = made
    bank, both, told = AdapterBank(model, slots=2), threading.Barrier(2), []
    for name in "abcd":
        bank.load(name, adapters[name])

    def run(first, second):
        with bank.rows([first]):
            both.wait(30)
            try:
                check(bank, model, adapters, [second])
            except ValueError as error:
                told.append(str(error))

    threads = [threading.Thread(target=run, args=names, daemon=True) for names in ("ac", "bd")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not any(thread.is_alive() for thread in threads)
    assert len(told) == 1 and "got none of 2 slots" in told[0]
    check(bank, model, adapters, ["c", "d"])


def test_inference_mode(made):
    """What is loaded in it can make room outside of it, and the other way round."""
    model, adapters = made
    bank = AdapterBank(model, slots=1)
    with torch.inference_mode():
        for name in "ab":
            bank.load(name, adapters[name])
        check(bank, model, adapters, ["b"])
    bank.load("c", adapters["c"])
    for name in "acb":
        check(bank, model, adapters, [name])
        with torch.inference_mode():
            check(bank, model, adapters, ["c"])


def test_a_wider_output(made):
    """The factors are widened once, not in every forward of a batch, which would keep them all."""

    class Wide(nn.Linear):
        def forward(self, x):
            return super().forward(x.to(self.weight.dtype)).float()

    model = nn.Sequential(Wide(5, 4).bfloat16())
    bank = AdapterBank(model, slots=2)
    bank.load("a", made[1]["a"])
    x, (layer,) = torch.randn(1, 5), bank._layers.values()
    with bank.rows(["a"]):
        before = [model(x), layer._wide[1]]
        assert torch.equal(model(x), before[0]) and layer._wide[1] is before[1]
        bank.load("b", made[1]["b"])
        (plan,) = next(iter(next(around(bank))._routes.values()))._plans.values()
        model(x)
        kept = len(plan._kept)
        for _ in range(3):
            model(x)
        assert len(plan._kept) == kept
    assert bank.memory()["slots"] == sum(t.nbytes for t in (*layer.stacks[:4], *layer._wide[1][:2]))


def test_threads():
    """Eight threads run, load, replace and unload; each row is one of the versions its name has had, whole."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 16))
    versions = [small(2 + i % 3, (24, 16), seed=i) for i in range(4)]
    bank = AdapterBank(model, slots=3)
    for i in range(5):
        bank.load(f"n{i}", versions[0])
    x = torch.randn(4, 24)
    right = [expected(model[0].weight, model[0].bias, x, one) for one in versions]
    plain, wrong, stop = model(x).detach(), [], threading.Event()

    def run(seed):
        draw = torch.Generator().manual_seed(seed)
        try:
            while not stop.is_set():
                names = [f"n{int(i)}" for i in torch.randint(5, (2,), generator=draw)] + [None, "n0"]
                with bank.rows(names):
                    y = model(x)
                    if not torch.equal(model(x), y):
                        wrong.append("two forwards of a batch differ")
                if not torch.allclose(y[2], plain[2]):
                    wrong.append("a base row moved")
                for i in (0, 1, 3):
                    if not any(torch.allclose(y[i].double(), one[i], rtol=1e-3, atol=1e-4) for one in right):
                        wrong.append(f"row {i} is of no version")
        except Exception as error:
            wrong.append(repr(error))

    def write(seed):
        try:
            for i in range(40):
                bank.replace(f"n{(seed + i) % 5}", versions[(seed + i) % 4])
                bank.load(f"extra {seed}", versions[i % 4])
                bank.unload(f"extra {seed}")
        except Exception as error:
            wrong.append(repr(error))

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(5)]
    writers = [threading.Thread(target=write, args=(seed,)) for seed in range(3)]
    for thread in threads + writers:
        thread.start()
    for writer in writers:
        writer.join(60)
    stop.set()
    for thread in threads:
        thread.join(60)
    assert not wrong, wrong[:3]
    assert not any(thread.is_alive() for thread in threads + writers)
    assert all(entry is None or not entry.users for entry in bank._residents.slots)


def test_waiting_for_a_slot(made):
    """A batch that finds all slots in use by another thread waits until that is done."""
    model, adapters = made
    bank = AdapterBank(model, slots=1)
    for name in "ab":
        bank.load(name, adapters[name])
    entered, leave, order = threading.Event(), threading.Event(), []

    def hold():
        with bank.rows(["a"]):
            entered.set()
            leave.wait(30)
            order.append("a")

    holder = threading.Thread(target=hold)
    holder.start()
    entered.wait(30)
    waiter = threading.Thread(target=lambda: (check(bank, model, adapters, ["b"]), order.append("b")))
    waiter.start()
    waiter.join(0.1)
    assert waiter.is_alive()
    leave.set()
    waiter.join(30)
    holder.join(30)
    assert order == ["a", "b"]
    with bank.rows(["a"]), pytest.raises(ValueError, match=r"'a' \(in use around this\)"), bank.rows(["b"]):
        pass
