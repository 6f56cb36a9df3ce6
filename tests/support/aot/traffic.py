"""What each launch moves and multiplies, in closed form, from its sizes, its tile sizes and its grid.

Bytes are those of the elements that a program asks for: lanes that a mask leaves out move nothing, and what several
programs ask for counts several times, though the L2 cache serves all but the first. FLOPs are those of the tile
products, two for each multiplication and addition, of whole tiles as the matrix units execute them and for each of the
products that a float32 product is made of (`dora_kernels.kernels.dot`). `aot.counting` counts the same in the
interpreter, and tests/kernels/test_account.py holds the two equal.

What depends on the numbers is taken as it nearly always is: no row is computed again because digits were lost.

`least` is what a program must move and multiply that computes the same: where nothing has changed a kept norm needs
less.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from aot.launches import Call, Recorded
from aot.recording import Launch, size

LARGE = {
    "weight_norm": ("w",),
    "kept_norm": ("w",),
    "merge": ("w", "merged"),
    "compose": ("base", "y"),
    "product": ("left",),
    "one_pass": ("w",),
    "scale_reduce": ("grad", "other", "scaled"),
    "factor_grads": ("p", "b", "db"),
}
"""The operands of the size of W or of the activations."""
_FACTORS = {
    "weight_norm": ("b", "a"), "kept_norm": ("b", "a"), "merge": ("b", "a"),
    "compose": ("h", "b"), "product": ("left", "right"),
}  # fmt: skip
"""Whose product is the low-rank one; the rank is the first one's width."""


@dataclass
class Traffic:
    """Bytes by operand, without operands that are absent, and FLOPs of tile products."""

    loaded: dict[str, int] = field(default_factory=dict)
    stored: dict[str, int] = field(default_factory=dict)
    flops: int = 0

    @property
    def bytes(self) -> int:
        return sum(self.loaded.values()) + sum(self.stored.values())

    def of(self, operands: tuple[str, ...]) -> int:
        """Bytes of some of the operands."""
        return sum(side.get(name, 0) for side in (self.loaded, self.stored) for name in operands)

    def add(self, other: Traffic) -> None:
        for mine, more in ((self.loaded, other.loaded), (self.stored, other.stored)):
            for name, moved in more.items():
                mine[name] = mine.get(name, 0) + moved
        self.flops += other.flops


def compose(launch: Launch, unchanged: bool) -> Traffic:
    """Every row block asks for B, g, its divisor and bias, every column block for h.

    In groups of equally many tokens, which have row blocks of their own, every program looks for its group, but some do
    not have one.
    """
    M, N, R, groups = launch["M"], launch["N"], launch["R"], launch["groups"]
    blocks_n = _blocks(N, launch["BLOCK_N"])
    sizes = _group_sizes(M, groups)
    blocks_m = sum(_blocks(size, launch["BLOCK_M"]) for size in sizes)
    return Traffic(
        _bytes(
            launch, base=M * N, h=M * R * blocks_n, b=N * R * blocks_m,
            g=N * blocks_m, divisor=N * blocks_m, bias=N * blocks_m,
            ends=(2 * groups - 1) * launch.grid[0], rows=M * blocks_n, scalings=blocks_m * blocks_n,
        ),
        _bytes(launch, y=M * N),
        blocks_m
        * blocks_n
        * _blocks(R, launch["BLOCK_R"])
        * launch["PRODUCTS"]
        * _product(launch, "BLOCK_M", "BLOCK_N", "BLOCK_R"),
    )


def one_pass(launch: Launch, unchanged: bool) -> Traffic:
    """Every program asks for x, A and its rows of W and B; where K is split, it writes sums."""
    M, N, K, R = launch["M"], launch["N"], launch["K"], launch["R"]
    blocks, parts = launch.grid
    traffic = Traffic(
        _bytes(launch, x=M * K * blocks, w=N * K, a=R * K * blocks),
        _bytes(launch, base=M * N * parts, h=M * R * parts),
        blocks
        * _blocks(K, launch["BLOCK_K"])
        * (_product(launch, "BLOCK_M", "BLOCK_N", "BLOCK_K") + _product(launch, "BLOCK_M", "BLOCK_R", "BLOCK_K")),
    )
    if not launch["SPLIT"]:
        traffic.add(_finish(launch, blocks))
    return traffic


def finish(launch: Launch, unchanged: bool) -> Traffic:
    """Every program asks for all parts of h."""
    M, N, R, parts = launch["M"], launch["N"], launch["R"], launch["parts"]
    blocks = launch.grid[0]
    traffic = Traffic(
        _bytes(launch, base_parts=M * N * parts, h_parts=M * R * parts * blocks),
        _bytes(launch, base=M * N, h=M * R),
    )
    traffic.add(_finish(launch, blocks))
    return traffic


def _finish(launch: Launch, blocks: int) -> Traffic:
    """B, the vectors and y."""
    M, N, R = launch["M"], launch["N"], launch["R"]
    return Traffic(
        _bytes(launch, b=N * R, g=N, divisor=N, bias=N),
        _bytes(launch, y=M * N),
        blocks * _product(launch, "BLOCK_M", "BLOCK_N", "BLOCK_R"),
    )


def product(launch: Launch, unchanged: bool) -> Traffic:
    """Every block of columns asks for left, every block of rows for right, and every part of K writes a sum."""
    M, N, K, groups = launch["M"], launch["N"], launch["K"], launch["groups"]
    blocks_n = _blocks(N, launch["BLOCK_N"])
    blocks_m = sum(_blocks(size, launch["BLOCK_M"]) for size in _group_sizes(M, groups))
    tiles, parts = launch.grid
    return Traffic(
        _bytes(
            launch, left=M * K * blocks_n, right=K * N * blocks_m, rows=M * blocks_n * parts,
            ends=(2 * groups - 1) * tiles * parts,
        ),
        _bytes(launch, out=M * N * parts),
        blocks_m
        * blocks_n
        * _blocks(K, launch["BLOCK_K"])
        * launch["PRODUCTS"]
        * _product(launch, "BLOCK_M", "BLOCK_N", "BLOCK_K"),
    )


def scale_reduce(launch: Launch, unchanged: bool) -> Traffic:
    """Every strip asks for g if there is something to scale, and writes a row of partials.

    With a product every block of columns asks for h, and every strip writes a matrix of partials.
    """
    M, F, R = launch["M"], launch["F"], launch["R"]
    programs, strips = launch.grid
    groups = strips // launch["strips"] if launch["ends_ptr"] else 0
    columns, ranks = _blocks(F, launch["BLOCK_F"]), _blocks(R, launch["BLOCK_R"])
    steps = [_blocks(_blocks(size, launch["BLOCK_M"]), launch["strips"]) for size in _group_sizes(M, groups)]
    return Traffic(
        _bytes(
            launch,
            grad=M * F * ranks,
            other=M * F if launch["dot_ptr"] else 0,
            g=F * strips if launch["scaled_ptr"] else 0,
            h=M * R * columns,
            ends=programs * launch["strips"] * (2 * groups - 1),
        ),
        _bytes(launch, scaled=M * F, dot=F * strips, sum=F * strips, low=F * R * strips),
        programs
        * launch["strips"]
        * sum(steps)
        * launch["PRODUCTS"]
        * _product(launch, "BLOCK_M", "BLOCK_F", "BLOCK_R"),
    )


def factor_grads(launch: Launch, unchanged: bool) -> Traffic:
    """Everything once, B where there is a dm; no tile products."""
    N, R = launch["N"] * (launch.grid[1] if launch["GROUPED"] else 1), launch["R"]
    low = N * R if launch["dot_ptr"] else 0
    rows = _bytes(launch, dot=N * launch["strips"], g=N, divisor=N)
    return Traffic({**_bytes(launch, p=N * R * launch["parts"], b=low), **rows}, _bytes(launch, db=N * R, dm=N))


def weight_norm(launch: Launch, unchanged: bool) -> Traffic:
    """A sweep, and the norm of every part of K; to repair a norm there is nothing as a rule, and nothing is moved."""
    blocks, parts = (*launch.grid, 1)[:2]
    asked = Traffic(_bytes(launch, changed=blocks * parts * launch["shares"]))
    if launch["REPAIR"]:
        asked.add(Traffic(_bytes(launch, norm=launch["N"])))
    elif not unchanged:
        asked.add(_sweep(launch, blocks, _blocks(launch["K"], launch["span"])))
        asked.add(Traffic(stored=_bytes(launch, norm=launch["N"] * launch["GROUPS"] * parts)))
    return asked


def merge(launch: Launch, unchanged: bool) -> Traffic:
    """A sweep for the norms, where there is a magnitude, and one to write."""
    N, K = launch["N"] * launch["GROUPS"], launch["K"]
    total = Traffic(_bytes(launch, m=N), _bytes(launch, merged=N * K))
    for _ in range(2 if launch["m_ptr"] else 1):
        total.add(_sweep(launch, launch.grid[0], 1))
    return total


def _sweep(launch: Launch, blocks: int, parts: int) -> Traffic:
    """Every block of rows asks for A, and for B once per part of K or, where B is not held, once per step of K."""
    N, K, R = launch["N"] * launch["GROUPS"], launch["K"], launch["R"]
    steps = _blocks(K, launch["BLOCK_K"])
    products = blocks * steps * (1 if launch["HOLD_B"] else _blocks(R, launch["BLOCK_R"]))
    return Traffic(
        _bytes(launch, w=N * K, a=R * K * blocks, b=N * R * (parts if launch["HOLD_B"] else steps)),
        flops=products * launch["PRODUCTS"] * _product(launch, "BLOCK_N", "BLOCK_K", "BLOCK_R"),
    )


def combine(launch: Launch, unchanged: bool) -> Traffic:
    """The parts and the result."""
    size = launch["size"]
    return Traffic(_bytes(launch, parts=size * launch["parts"]), _bytes(launch, out=size))


def factored_norm(launch: Launch, unchanged: bool) -> Traffic:
    """Every chunk of the rank asks for all of B and for its own chunk again, every block of rows for G."""
    N, R = launch["N"], launch["R"]
    blocks, chunks = launch.grid[0], _blocks(R, launch["BLOCK_R"])
    return Traffic(
        _bytes(launch, u=N * R * launch["PIECES"], b=N * R * (chunks + 1), gram=R * (R + 1) * blocks, square=N),
        _bytes(launch, norm=N),
        blocks * chunks**2 * 3 * _product(launch, "BLOCK_N", "BLOCK_R", "BLOCK_R"),
    )


def fingerprint(launch: Launch, unchanged: bool) -> Traffic:
    """All that is looked at, and two numbers per program, written where they have changed, and a flag."""
    programs = launch.grid[0]
    sizes = {name: launch[f"size_{name}"] for name in "abw"}
    written = 0 if unchanged else programs
    return Traffic(_bytes(launch, **sizes, seen=2 * programs), _bytes(launch, seen=2 * written, changed=programs))


FORMULAS: dict[str, Callable[[Launch, bool], Traffic]] = {
    "weight_norm": weight_norm,
    "combine": combine,
    "factored_norm": factored_norm,
    "fingerprint": fingerprint,
    "merge": merge,
    "compose": compose,
    "product": product,
    "one_pass": one_pass,
    "finish": finish,
    "scale_reduce": scale_reduce,
    "factor_grads": factor_grads,
}
"""By kernel."""


def issued(call: Call, recorded: Recorded) -> Traffic:
    """What a call's launches, and the PyTorch operations beside them, move together."""
    total = Traffic()
    for launch in recorded.launches:
        total.add(FORMULAS[launch.kernel](launch, call.unchanged))
    for operation in recorded.operations:
        total.add(Traffic(operation.loaded, {operation.name: operation.stored}, operation.flops))
    return total


def least(call: Call, results: dict[str, Tensor]) -> Traffic:
    """Every input once, every result once, and two operations for each element of the low-rank product and rank."""
    there = {name: one for name, one in call.operands.items() if one is not None}
    flops = 0
    if call.primitive in _FACTORS:
        left, right = (there[name] for name in _FACTORS[call.primitive])
        flops = 2 * left.numel() * right.shape[-2 if call.primitive == "compose" else -1]
    return Traffic(
        {name: size(one) for name, one in there.items()}, {name: size(one) for name, one in results.items()}, flops
    )


def _group_sizes(rows: int, groups: int) -> list[int]:
    """Of `launches`' groups; all rows if there are none."""
    ends = [(group + 1) * rows // groups for group in range(groups)]
    return [end - start for start, end in zip([0, *ends], ends)] or [rows]


def _blocks(size: int, block: int) -> int:
    return -(-size // block)


def _bytes(launch: Launch, **elements: int) -> dict[str, int]:
    """Bytes of that many elements, for the operands that are there."""
    sizes = {name: count * launch[f"{name}_ptr"] for name, count in elements.items()}
    return {name: found for name, found in sizes.items() if found}


def _product(launch: Launch, *sides: str) -> int:
    """FLOPs of one product of tiles."""
    rows, columns, depth = (launch[side] for side in sides)
    return 2 * rows * columns * depth
