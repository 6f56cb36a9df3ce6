"""Small calls of every launcher of the kernels, each with a float64 reference, wherever kernels run.

The interpreter and a GPU run them in test_kernel_cases.py; a tool that emulates compiled kernels can run them too. Only
torch and the package are imported, and a call may be made several times: it gives the same every time.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

BF, HF, F32 = torch.bfloat16, torch.float16, torch.float32
SHORT = {BF: "bf16", HF: "fp16", F32: "fp32"}
# A base layer's dtype and its adapter's.
PAIRS = ((BF, BF), (HF, HF), (BF, F32), (HF, F32), (F32, F32), (F32, BF))
SCALING = 0.5

Results = tuple[Tensor | None, ...]
Case = tuple[str, str, Callable[[], Results], Results]


def cases(device: str = "cpu", kernel: str | None = None) -> Iterator[Case]:
    """``(name, dtypes, call, reference)``: `call()` launches and gives tensors, or None for what is not asked for.

    Those of one kernel's launchers, if it is named.
    """
    for one in KERNELS if kernel is None else (kernel,):
        yield from KERNELS[one](_Make(device))


class _Make:
    """Random tensors of any layout."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.generator = torch.Generator().manual_seed(0)

    def __call__(self, *shape: int, dtype: torch.dtype = F32, layout: str = "") -> Tensor:
        """`layout`: "rows" leaves gaps between rows, "offset" starts at an odd element, "t" is stored transposed.

        "peft" has the first of three dimensions last, as PEFT stores B of experts.
        """
        values = torch.randn(shape, generator=self.generator, dtype=torch.float64).to(dtype)
        if layout == "rows":
            memory = torch.zeros(*shape[:-1], shape[-1] + 3, dtype=dtype, device=self.device)
            return memory[..., : shape[-1]].copy_(values)
        if layout == "offset":
            memory = torch.zeros(values.numel() + 1, dtype=dtype, device=self.device)
            return memory[1:].view(shape).copy_(values)
        if layout == "t":
            return torch.zeros(*shape[:-2], *shape[:-3:-1], dtype=dtype, device=self.device).mT.copy_(values)
        if layout == "peft" and len(shape) == 3:
            return values.permute(1, 2, 0).contiguous().to(self.device).permute(2, 0, 1)
        return values.to(self.device)

    def ends(self, counts: tuple[int, ...]) -> Tensor:
        return torch.tensor(list(itertools.accumulate(counts)), dtype=torch.int32, device=self.device)

    def groups(self, counts: tuple[int, ...], sentinels: int, F: int) -> tuple[int, int, Tensor, Tensor]:
        """How many rows the groups have, and with those behind them; g of each group, and where they end."""
        given = sum(counts)
        return given, given + sentinels, self(len(counts), F), self.ends(counts)

    def positive(self, *shape: int) -> Tensor:
        return self(*shape).abs_() + 0.5


def _words(*said: object) -> str:
    return " ".join(str(word) for word in said if word not in ("", None))


def _behind(sentinels: int) -> str:
    return f"sentinels {sentinels}" if sentinels else ""


def _labels(*dtypes: torch.dtype) -> str:
    return "+".join(dict.fromkeys(SHORT[dtype] for dtype in dtypes))


# --- scale_reduce ----------------------------------------------------------------------------------------------------


def _scale_reduces(make: _Make) -> Iterator[Case]:
    for dtype in (BF, HF, F32):
        yield _scale_reduce(make, dtype, dtype, 64, 128)
        yield _scale_reduce(make, dtype, dtype, 100, 131)
    yield _scale_reduce(make, BF, F32, 37, 100)
    yield _scale_reduce(make, BF, BF, 1, 128)
    yield _scale_reduce(make, BF, BF, 70, 60, layout="rows")
    yield _scale_reduce(make, BF, BF, 70, 64, layout="offset")
    yield _scale_reduce(make, F32, F32, 70, 64, layout="t")  # of the partner, which is copied
    for wanted in itertools.product((True, False), repeat=3):
        if any(wanted) and not all(wanted):
            yield _scale_reduce(make, BF, BF, 20, 128, *wanted)
    yield from _grouped_scale_reduces(make)
    for dtype, h_dtype in ((BF, BF), (HF, HF), (BF, F32), (HF, F32), (F32, F32)):
        yield _scale_reduce(make, dtype, dtype, 64, 128, h=(h_dtype, 16))
        yield _scale_reduce(make, dtype, dtype, 37, 131, total=False, h=(h_dtype, 40))
    yield _scale_reduce(make, BF, BF, 300, 70, total=False, layout="rows", h=(BF, 5))  # several strips
    yield _scale_reduce(make, BF, BF, 20, 64, scaled=False, layout="offset", h=(BF, 64))
    yield _scale_reduce(make, BF, F32, 20, 64, scaled=False, h=(F32, 70))  # of which the product is apart
    yield from _products_over_tokens(make)


def _scale_reduce(
    make: _Make,
    dtype: torch.dtype,
    other_dtype: torch.dtype,
    M: int,
    F: int,
    scaled: bool = True,
    dot: bool = True,
    total: bool = True,
    layout: str = "",
    h: tuple[torch.dtype, int] | None = None,
) -> Case:
    """`h`: the dtype and rank of the matrix in the product of the same pass."""
    from dora_kernels import kernels

    grad, other = make(M, F, dtype=dtype, layout=layout.strip("t")), make(M, F, dtype=other_dtype, layout=layout)
    g = make(F)
    right = None if h is None else make(M, h[1], dtype=h[0], layout=layout.strip("t"))

    def call() -> Results:
        given = grad, other if dot else None, g if scaled else None, scaled, total
        if right is None:
            return kernels.scale_reduce(*given)
        made, *sums, low = kernels.scale_partials(*given, None, right)
        return made, *(one if one is None else one.sum(0) for one in sums), low.sum(0)

    wide = grad.double()
    sums = (wide * other.double()).sum(0) if dot else None, wide.sum(0) if total else None
    absent = [f"no {name}" for name, there in (("scaled", scaled), ("dot", dot), ("sum", total)) if not there]
    name = _words("scale_reduce", f"{M}x{F}", "" if h is None else f"r{h[1]}", layout, *absent)
    reference = g.double() * wide if scaled else None, *sums
    if right is None:
        return name, _labels(dtype, other_dtype), call, reference
    return name, _labels(dtype, other_dtype, h[0]), call, (*reference, wide.t() @ right.double())


def _grouped_scale_reduces(make: _Make) -> Iterator[Case]:
    for dtype in (BF, HF, F32):
        yield _grouped_scale_reduce(make, dtype, (40, 0, 24), 128)
    yield _grouped_scale_reduce(make, BF, (5, 0, 137, 1), 131, sentinels=9)
    yield _grouped_scale_reduce(make, BF, (0, 0), 64, sentinels=3, scaled=False)
    yield _grouped_scale_reduce(make, BF, (17, 20), 64, "rows", scaled=False)
    yield _grouped_scale_reduce(make, BF, (17, 20), 64, "offset", dot=False)


def _grouped_scale_reduce(
    make: _Make,
    dtype: torch.dtype,
    counts: tuple[int, ...],
    F: int,
    layout: str = "",
    sentinels: int = 0,
    scaled: bool = True,
    dot: bool = True,
) -> Case:
    from dora_kernels import kernels

    given, M, g, ends = make.groups(counts, sentinels, F)
    grad, other = make(M, F, dtype=dtype, layout=layout), make(M, F, dtype=dtype, layout=layout)

    def call() -> Results:
        made, *sums = kernels.scale_reduce(grad, other if dot else None, g if scaled else None, scaled, True, ends)
        return (made if made is None else made[:given], *sums)

    wide = grad.double()
    parts = [(wide[start:stop], other[start:stop].double()) for start, stop in _spans(counts)]
    reference = (
        torch.cat([one * g[group].double() for group, (one, _) in enumerate(parts)]) if scaled else None,
        torch.stack([(one * two).sum(0) for one, two in parts]) if dot else None,
        torch.stack([one.sum(0) for one, _ in parts]),
    )
    absent = [f"no {name}" for name, there in (("scaled", scaled), ("dot", dot)) if not there]
    name = _words("scale_reduce in groups", "+".join(map(str, counts)), f"x{F}", layout, _behind(sentinels), *absent)
    return name, _labels(dtype), call, reference


def _products_over_tokens(make: _Make) -> Iterator[Case]:
    for left, right in ((BF, BF), (HF, HF), (BF, F32), (HF, F32), (F32, F32)):
        yield _product_over_tokens(make, left, right, right, (40, 0, 24), 64, 16)
    yield _product_over_tokens(make, BF, BF, F32, (5, 0, 137, 1), 131, 5, sentinels=9, turned=True)
    yield _product_over_tokens(make, BF, F32, BF, (17, 20), 64, 70, layout="rows", turned=True)
    yield _product_over_tokens(make, BF, BF, BF, (0, 300), 64, 16, layout="offset")  # several strips
    yield _product_over_tokens(make, BF, BF, F32, (40, 30), 128, 20, scaled=True)
    yield _product_over_tokens(make, BF, F32, F32, (0, 30), 64, 70, scaled=True)


def _product_over_tokens(
    make: _Make,
    left_dtype: torch.dtype,
    right_dtype: torch.dtype,
    dtype: torch.dtype,
    counts: tuple[int, ...],
    F: int,
    R: int,
    layout: str = "",
    sentinels: int = 0,
    turned: bool = False,
    scaled: bool = False,
) -> Case:
    """`scaled`: in the pass that scales left too."""
    from dora_kernels import kernels

    given, M, g, ends = make.groups(counts, sentinels, F)
    left, right = make(M, F, dtype=left_dtype, layout=layout), make(M, R, dtype=right_dtype, layout=layout)

    def call() -> Results:
        if not scaled:
            return (kernels.product_over_tokens(left, right, ends, dtype, turned),)
        made, _, _, low = kernels.scale_partials(left, None, g, True, False, ends, right)
        return made[:given], low.sum(0)

    low = torch.stack([left[start:stop].double().t() @ right[start:stop].double() for start, stop in _spans(counts)])
    reference: Results = (low.mT if turned else low,)
    if scaled:
        rows = [left[start:stop].double() * g[group].double() for group, (start, stop) in enumerate(_spans(counts))]
        reference = torch.cat(rows), low
    said = _behind(sentinels), "turned" if turned else "", "scaled" if scaled else ""
    name = _words("product_over_tokens", "+".join(map(str, counts)), f"x{F}", f"r{R}", layout, *said)
    return name, _labels(left_dtype, right_dtype, dtype), call, reference


# --- compose ---------------------------------------------------------------------------------------------------------


def _composes(make: _Make) -> Iterator[Case]:
    for base, adapter in PAIRS:
        for h in dict.fromkeys((base, F32 if base == F32 else adapter)):
            yield _compose(make, base, h, adapter, 64, 128, 16)
            yield _compose(make, base, h, adapter, 7, 67, 19, divisor=True)
    for M, N, R in ((1, 128, 64), (16, 64, 16), (17, 100, 150), (77, 131, 5), (130, 128, 64)):
        yield _compose(make, BF, BF, BF, M, N, R)
    for gain, bias, keep in ((False, False, True), (False, True, True), (True, False, False), (True, True, False)):
        yield _compose(make, BF, BF, BF, 20, 100, 8, gain=gain, bias=bias, keep=keep)
    for layout in ("rows", "offset", "t"):
        yield _compose(make, BF, BF, BF, 20, 64, 16, layout=layout)
    yield _compose(make, F32, F32, F32, 20, 64, 64, layout="offset")
    yield from _grouped_composes(make)


def _compose(
    make: _Make,
    base_dtype: torch.dtype,
    h_dtype: torch.dtype,
    b_dtype: torch.dtype,
    M: int,
    N: int,
    R: int,
    gain: bool = True,
    bias: bool = True,
    divisor: bool = False,
    keep: bool = True,
    layout: str = "",
) -> Case:
    """`layout`: of base and h, which stay row-major, and of B."""
    from dora_kernels import kernels

    base = make(M, N, dtype=base_dtype, layout=layout.strip("t"))
    h, B = make(M, R, dtype=h_dtype, layout=layout.strip("t")), make(N, R, dtype=b_dtype, layout=layout)
    g = make.positive(N) if gain else None
    n = make.positive(N) if divisor else None
    c = make(N, dtype=base_dtype) if bias else None

    def call() -> Results:
        given = base if keep else base.clone()
        y = kernels.compose(given, h, B, g, c, SCALING, keep, n)
        assert (y.data_ptr() == given.data_ptr()) != keep
        return (y,)

    reference = base.double() + SCALING * h.double() @ B.to(h_dtype).double().t()
    if g is not None:
        reference = reference * (g.double() if n is None else g.double() / n.double())
    if c is not None:
        reference = reference + c.double()
    said = "" if gain else "no g", "" if bias else "no bias", "div" if divisor else "", "" if keep else "inplace"
    name = _words("compose", f"{M}x{N}", f"r{R}", *said, "wide h" if h_dtype != base_dtype else "", layout)
    return name, _labels(base_dtype, h_dtype, b_dtype), call, (reference,)


def _grouped_composes(make: _Make) -> Iterator[Case]:
    for base, adapter in PAIRS:
        for h in dict.fromkeys((base, F32 if base == F32 else adapter)):
            yield _grouped_compose(make, base, h, adapter, (40, 0, 24), 64, 16)
    for counts in ((5, 0, 37, 1, 90), (0, 0, 0), (0, 70), (1,) * 9, (33, 0, 0)):
        yield _grouped_compose(make, BF, BF, BF, counts, 67, 19, rows=True, sentinels=5, biases=True)
    yield _grouped_compose(make, BF, BF, BF, (3, 0, 2, 64), 128, 64, layout="peft", rows=True)
    yield _grouped_compose(make, BF, F32, F32, (3, 0, 20), 64, 16, layout="peft", sentinels=2, divisor=True)
    yield _grouped_compose(make, BF, BF, BF, (60, 70), 128, 70, layout="offset", gain=False, keep=True)
    yield _grouped_compose(make, BF, BF, BF, (60, 70), 64, 8, layout="rows", rows=True, biases=True, keep=True)
    yield _grouped_compose(make, F32, F32, F32, (4, 5, 0), 70, 5, divisor=True, number=True, biases=True)


def _grouped_compose(
    make: _Make,
    base_dtype: torch.dtype,
    h_dtype: torch.dtype,
    b_dtype: torch.dtype,
    counts: tuple[int, ...],
    N: int,
    R: int,
    rows: bool = False,
    sentinels: int = 0,
    gain: bool = True,
    divisor: bool = False,
    biases: bool = False,
    number: bool = False,
    keep: bool = False,
    layout: str = "",
) -> Case:
    """Groups of those sizes, and `sentinels` rows after them that belong to none.

    `rows`: they lie in another order. `biases`: one for each group. `number`: one scaling for all.
    """
    from dora_kernels import kernels

    G, M = len(counts), sum(counts) + sentinels
    base, h = make(M, N, dtype=base_dtype, layout=layout), make(M, R, dtype=h_dtype, layout=layout)
    B = make(G, N, R, dtype=b_dtype, layout=layout)
    g = make.positive(G, N) if gain else None
    n = make.positive(G, N) if divisor else None
    c = make(G, N, dtype=base_dtype) if biases else make(N, dtype=base_dtype)
    scalings = make(G)
    order = torch.randperm(M, generator=make.generator) if rows else torch.arange(M)
    ends = make.ends(counts)
    given_rows = order.to(make.device) if rows else None

    def call() -> Results:
        given = base if keep else base.clone()
        scaling = SCALING if number else scalings
        return (kernels.compose(given, h, B, g, c, scaling, keep, n, ends, given_rows),)

    reference = base.double()
    for group, (start, stop) in enumerate(_spans(counts)):
        mine = order[start:stop].to(make.device)
        y = base[mine].double() + (SCALING if number else scalings[group].double()) * (
            h[mine].double() @ B[group].to(h_dtype).double().t()
        )
        if g is not None:
            y = y * (g[group].double() if n is None else g[group].double() / n[group].double())
        reference[mine] = y + (c[group] if biases else c).double()
    said = "" if gain else "no g", "div" if divisor else "", "wide h" if h_dtype != base_dtype else "", layout
    also = "rows" if rows else "", _behind(sentinels)
    name = _words("compose in groups", "+".join(map(str, counts)), f"x{N}", f"r{R}", *also, *said)
    return name, _labels(base_dtype, h_dtype, b_dtype), call, (reference,)


def _spans(counts: tuple[int, ...]) -> list[tuple[int, int]]:
    """Where each group's rows start and stop."""
    ends = list(itertools.accumulate(counts))
    return list(zip([0, *ends], ends))


# --- product ---------------------------------------------------------------------------------------------------------


def _products(make: _Make) -> Iterator[Case]:
    for left, right in ((BF, BF), (HF, HF), (BF, F32), (HF, F32), (F32, F32)):
        yield _product(make, left, right, right, 64, 128, 16)
        yield _product(make, left, right, right, 17, 131, 70, layout="t")
    yield _product(make, BF, BF, F32, 128, 64, 16, layout="t")  # as dYᵀ H
    yield _product(make, BF, BF, BF, 16, 2100, 20)  # K in parts
    yield _product(make, BF, F32, BF, 1, 200, 5, layout="rows")
    yield _product(make, BF, F32, F32, 40, 100, 30)
    yield _product(make, BF, BF, F32, 20, 64, 16, layout="offset")
    yield _product(make, BF, BF, F32, 5, 0, 7)
    yield _product(make, BF, BF, BF, 0, 128, 16, counts=(20, 0, 12), sentinels=3)
    yield _product(make, BF, BF, F32, 0, 70, 19, counts=(1, 70, 0, 4), rows=True)
    yield _product(make, BF, F32, F32, 0, 600, 5, counts=(3, 4), layout="t", rows=True, sentinels=2)


def _product(
    make: _Make,
    left_dtype: torch.dtype,
    right_dtype: torch.dtype,
    dtype: torch.dtype,
    M: int,
    K: int,
    N: int,
    layout: str = "",
    counts: tuple[int, ...] | None = None,
    rows: bool = False,
    sentinels: int = 0,
) -> Case:
    """In groups of those sizes, if any, with `sentinels` rows after them, and with `rows` in another order."""
    from dora_kernels import kernels

    M, stack = (M, ()) if counts is None else (sum(counts) + sentinels, (len(counts),))
    left = make(M, K, dtype=left_dtype, layout=layout)
    right = make(*stack, K, N, dtype=right_dtype, layout=layout)
    order = torch.randperm(M, generator=make.generator) if rows else torch.arange(M)
    used = order[: M - sentinels].to(make.device)
    given = (None, None) if counts is None else (make.ends(counts), order.to(make.device) if rows else None)

    def call() -> Results:
        return (kernels.product(left, right, dtype, SCALING, *given)[used],)

    wide, spans = right.to(left_dtype if right_dtype != F32 else F32).double(), _spans(counts or (M,))
    parts = [left[order[a:b].to(make.device)].double() @ (wide[i] if stack else wide) for i, (a, b) in enumerate(spans)]
    said = "" if counts is None else "in groups " + "+".join(map(str, counts)), "rows" if rows else "", layout
    name = _words("product", f"{M}x{K}x{N}", *said)
    return name, _labels(left_dtype, right_dtype, dtype), call, (SCALING * torch.cat(parts),)


# --- one_pass --------------------------------------------------------------------------------------------------------


def _one_passes(make: _Make) -> Iterator[Case]:
    for dtype, adapter in ((BF, BF), (HF, HF), (BF, F32), (HF, F32)):
        yield _one_pass(make, dtype, adapter, 16, 64, 128, 16)
        yield _one_pass(make, dtype, adapter, 3, 67, 131, 5, keep=True)
    yield _one_pass(make, BF, BF, 1, 32, 640, 16, keep=True, given="divisor")
    yield _one_pass(make, BF, BF, 64, 64, 128, 64, given="divisor")
    yield _one_pass(make, BF, BF, 33, 40, 70, 20, given="nothing", bias=False)
    yield _one_pass(make, BF, BF, 4, 4128, 64, 16, given="divisor")  # not split
    yield _one_pass(make, BF, BF, 17, 67, 300, 19, given="divisor", keep=True)
    yield _one_pass(make, HF, HF, 2, 64, 128, 16, way="offset")
    for way in ("conv1d", "rows"):
        yield _one_pass(make, BF, BF, 5, 64, 200, 16, way=way, given="divisor")


def _one_pass(
    make: _Make,
    dtype: torch.dtype,
    a_dtype: torch.dtype,
    M: int,
    N: int,
    K: int,
    R: int,
    given: str = "g",
    bias: bool = True,
    keep: bool = False,
    way: str = "",
) -> Case:
    """`given`: g, a magnitude and its divisor, or nothing."""
    from dora_kernels import kernels

    W, A, B = _problem(make, dtype, a_dtype, N, K, R, way)
    x = make(M, K, dtype=dtype, layout=way.replace("conv1d", ""))
    g, n = make.positive(N), make.positive(N)
    n[1] = torch.inf
    c = make(N, dtype=dtype) if bias else None

    def call() -> Results:
        magnitude, of = None if given == "nothing" else g, n if given == "divisor" else None
        return kernels.one_pass(x, W, A, B, magnitude, c, SCALING, keep, of)

    h = (x.double() @ A.to(dtype).double().t()).to(dtype).double()
    base = x.double() @ W.double().t()
    y = base + SCALING * h @ B.to(dtype).double().t()
    y = y if given == "nothing" else y * g.double() / (n.double() if given == "divisor" else 1.0)
    y = y if c is None else y + c.double()
    reference = y, h, base if keep else None
    name = _words("one_pass", f"{M}x{N}x{K}", f"r{R}", given, "keep" if keep else "", "" if bias else "no bias", way)
    return name, _labels(dtype, a_dtype), call, reference


# --- weight_norm, merge, KeptNorm ------------------------------------------------------------------------------------

# A weight, and where it and its factors lie: "conv1d" is a weight stored transposed, "in" the transposed problem.
_WAYS = ("", "conv1d", "in", "conv1d in", "rows", "offset")


def _problem(
    make: _Make,
    w_dtype: torch.dtype,
    a_dtype: torch.dtype,
    N: int,
    K: int,
    R: int,
    way: str = "",
    cancels: bool = False,
    groups: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """W, A and B; `cancels`: half of the rows are nearly ``-s B A``; stacks of `groups`, if there are any."""
    layout = way if way in ("rows", "offset", "peft") else ""
    stack = (groups,) if groups else ()
    W = make(*stack, N, K, dtype=w_dtype, layout="t" if "conv1d" in way else layout.replace("peft", ""))
    A, B = make(*stack, R, K, dtype=a_dtype, layout=layout), make(*stack, N, R, dtype=a_dtype, layout=layout)
    if cancels:
        W[..., : N // 2, :] = (-SCALING * (B.double() @ A.double()))[..., : N // 2, :].to(w_dtype)
    return (W.mT, B.mT, A.mT) if "in" in way else (W, A, B)


def _sum(W: Tensor, A: Tensor, B: Tensor) -> Tensor:
    return W.double() + SCALING * B.double() @ A.double()


def _norms(make: _Make) -> Iterator[Case]:
    for w_dtype, a_dtype in PAIRS:
        yield _norm(make, w_dtype, a_dtype, 64, 128, 16)
        yield _norm(make, w_dtype, a_dtype, 70, 131, 5)
    for way in _WAYS[1:]:
        yield _norm(make, BF, BF, 70, 130, 16, way=way)
    yield _norm(make, BF, F32, 70, 130, 40, way="offset")
    yield _norm(make, BF, F32, 64, 128, 16, cancels=True)  # a second sweep
    yield _norm(make, BF, BF, 128, 384, 16)  # K split, combined
    yield _norm(make, BF, BF, 64, 128, 200, direct=True)  # the rank in chunks
    yield _norm(make, F32, F32, 66, 70, 33)
    yield _norm(make, BF, BF, 20, 7, 3)  # few features
    for a_dtype in (BF, F32):
        yield _norm(make, BF, a_dtype, 70, 130, 144, direct=False)
        yield _norm(make, BF, a_dtype, 40, 130, 144, direct=False, cancels=True)  # rows computed directly
    for w_dtype, a_dtype in PAIRS:
        yield _norm(make, w_dtype, a_dtype, 64, 128, 16, groups=2, way="peft")
    yield _norm(make, BF, BF, 70, 131, 5, groups=3, way="conv1d")
    yield _norm(make, BF, F32, 70, 131, 5, groups=3, way="peft", cancels=True)
    yield _norm(make, BF, BF, 20, 384, 16, groups=2, way="in")
    yield _norm(make, BF, BF, 20, 70, 200, groups=2, way="offset")
    yield _norm(make, BF, BF, 70, 70, 9, groups=1, way="rows")


def _norm(
    make: _Make,
    w_dtype: torch.dtype,
    a_dtype: torch.dtype,
    N: int,
    K: int,
    R: int,
    way: str = "",
    cancels: bool = False,
    direct: bool | None = None,
    groups: int = 0,
) -> Case:
    from dora_kernels.kernels import norm

    W, A, B = _problem(make, w_dtype, a_dtype, N, K, R, way, cancels, groups)
    form = {None: norm.weight_norm, True: norm.direct_norm, False: norm.factored_norm}[direct]
    said = {None: "", True: "direct", False: "factored"}[direct]
    stack = f"{groups}x" if groups else ""
    name = _words("weight_norm", f"{stack}{N}x{K}", f"r{R}", way, "cancels" if cancels else "", said)
    return name, _labels(w_dtype, a_dtype), lambda: (form(W, A, B, SCALING),), (_sum(W, A, B).norm(dim=-1),)


def _merges(make: _Make) -> Iterator[Case]:
    for w_dtype, a_dtype in PAIRS:
        yield _merge(make, w_dtype, a_dtype, 64, 128, 16)
    for way in _WAYS[1:]:
        yield _merge(make, BF, F32, 70, 61, 5, way=way)
    yield _merge(make, BF, BF, 66, 70, 70)
    yield _merge(make, BF, BF, 66, 70, 7, magnitude=False)
    yield _merge(make, BF, BF, 64, 128, 16, seed=1 << 40)
    yield _merge(make, HF, HF, 66, 70, 7, seed=12345, way="in")
    yield _merge(make, BF, BF, 70, 66, 7, groups=3, way="peft")
    yield _merge(make, BF, F32, 70, 66, 7, groups=2, way="conv1d", magnitude=False)
    yield _merge(make, F32, F32, 30, 66, 70, groups=2, way="offset")
    yield _merge(make, BF, BF, 40, 61, 7, groups=2, seed=1 << 40)
    yield _merge(make, BF, BF, 40, 61, 7, groups=2, seed=3, way="in")


def _merge(
    make: _Make,
    w_dtype: torch.dtype,
    a_dtype: torch.dtype,
    N: int,
    K: int,
    R: int,
    way: str = "",
    magnitude: bool = True,
    seed: int | None = None,
    groups: int = 0,
) -> Case:
    from dora_kernels import kernels

    W, A, B = _problem(make, w_dtype, a_dtype, N, K, R, way, groups=groups)
    W[..., 1, :], B[..., 1, :] = 0, 0  # stays a row of zeros
    m = make(*W.shape[:-1]) if magnitude else None
    V = _sum(W, A, B)
    norm = V.norm(dim=-1)
    reference = V if m is None else torch.where(norm == 0, 0, m.double() / norm.clamp_min(1e-300))[..., None] * V
    said = way, "" if magnitude else "no m", "" if seed is None else "stochastic"
    name = _words("merge", f"{groups}x{N}x{K}" if groups else f"{N}x{K}", f"r{R}", *said)
    return (
        name,
        _labels(w_dtype, a_dtype),
        lambda: (kernels.merge(W, A, B, m, SCALING, seed, "in" in way),),
        (reference,),
    )


def _kept_norms(make: _Make) -> Iterator[Case]:
    yield _kept_norm(make, BF, BF, 64, 384, 16)
    yield _kept_norm(make, BF, F32, 70, 300, 5, way="conv1d in")
    yield _kept_norm(make, F32, F32, 70, 100, 5)
    yield _kept_norm(make, HF, HF, 40, 100, 7, way="offset")
    yield _kept_norm(make, BF, BF, 40, 300, 140)
    yield _kept_norm(make, BF, F32, 40, 100, 5, "peft", groups=3)
    yield _kept_norm(make, BF, BF, 40, 100, 5, "rows", groups=2)


def _kept_norm(
    make: _Make, w_dtype: torch.dtype, a_dtype: torch.dtype, N: int, K: int, R: int, way: str = "", groups: int = 0
) -> Case:
    from dora_kernels import kernels
    from dora_kernels.engine.fingerprints import sample
    from dora_kernels.kernels import norm

    W, A, B = _problem(make, w_dtype, a_dtype, N, K, R, way, groups=groups)
    first = A.clone(), _sum(W, A, B).norm(dim=-1)
    A[..., -1, -1] += 1
    second = A.clone(), _sum(W, A, B).norm(dim=-1)
    untouched = torch.full_like(second[1], 7.0)

    def call() -> Results:
        kept = kernels.KeptNorm(W.shape[:-1], SCALING, W.device)

        def ask() -> Tensor:
            return kept.divisor(W, sample(W), A, B).clone()

        A.copy_(first[0])
        computed = ask()
        kept._divisor.fill_(7.0)
        unchanged = ask()
        A.copy_(second[0])
        again = ask()
        # The bits are those of a norm that is not kept, where K is split among programs.
        return computed, unchanged, again, again - norm.direct_norm(W, A, B, SCALING)

    name = _words("kept_norm", f"{groups}x{N}x{K}" if groups else f"{N}x{K}", f"r{R}", way)
    return name, _labels(w_dtype, a_dtype), call, (first[1], untouched, second[1], torch.zeros_like(second[1]))


# --- factor_grads ----------------------------------------------------------------------------------------------------


def _factor_grads(make: _Make) -> Iterator[Case]:
    for b_dtype, dtype in ((BF, BF), (HF, HF), (F32, F32), (BF, F32)):
        yield _factor_grad(make, b_dtype, dtype, 128, 16, 3)
    yield _factor_grad(make, F32, F32, 35, 70, 1)
    yield _factor_grad(make, BF, None, 35, 5, 2)
    yield _factor_grad(make, BF, BF, 35, 5, 33)
    for layout in ("rows", "offset", "t"):
        yield _factor_grad(make, BF, BF, 40, 16, 2, layout=layout)
    yield _factor_grad(make, BF, BF, 40, 16, 2, layout="peft", groups=3)
    yield _factor_grad(make, F32, F32, 35, 70, 1, layout="rows", groups=2)
    yield _factor_grad(make, BF, None, 35, 5, 3, layout="peft", groups=2)
    yield _factor_grad(make, BF, BF, 35, 70, 7, parts=7)
    yield _factor_grad(make, BF, F32, 35, 5, 2, groups=2, parts=2)
    yield _factor_grad(make, BF, F32, 35, 5, 0, groups=2)
    yield _factor_grad(make, BF, BF, 40, 16, 0, parts=3)


def _factor_grad(
    make: _Make,
    b_dtype: torch.dtype,
    dtype: torch.dtype | None,
    N: int,
    R: int,
    strips: int,
    layout: str = "",
    groups: int = 0,
    parts: int = 1,
) -> Case:
    """Without strips there is no dm."""
    from dora_kernels import kernels

    stack = (groups,) if groups else ()
    made, B, dot = make(parts, *stack, N, R), make(*stack, N, R, dtype=b_dtype, layout=layout), make(*stack, strips, N)
    g, n = make(*stack, N), make.positive(*stack, N)
    n[..., 3] = torch.inf  # a row of zeros
    P = made.double().sum(0)
    db = None if dtype is None else SCALING * g.double()[..., None] * P
    dm = (dot.double().sum(-2) + SCALING * (B.double() * P).sum(-1)) / n.double()
    rows = f"{groups}x{N}" if groups else f"{N}"
    name = _words("factor_grads", rows, f"r{R}", f"strips {strips}", f"parts {parts}", layout, "" if dtype else "no dB")
    labels = _labels(b_dtype, *([] if dtype is None else [dtype]))
    return name, labels, lambda: kernels.factor_grads(made, B, dot if strips else None, g, n, SCALING, dtype), (
        db,
        dm if strips else None,
    )


# --- Watch -----------------------------------------------------------------------------------------------------------


def _watches(make: _Make) -> Iterator[Case]:
    for dtype in (BF, HF, F32):
        yield _watch(make, dtype)


def _watch(make: _Make, dtype: torch.dtype) -> Case:
    """The flags of groups at a first call, at one after nothing, and after an element of every other group."""
    from dora_kernels import kernels

    # The table lies beside what it has the addresses of: a tool that checks addresses knows the memory of arguments.
    block = torch.zeros(4096 + 4 * 4200, dtype=torch.uint8, device=make.device)
    memory = block[4096:].view(dtype)[:4200].copy_(make(4200, dtype=dtype))
    parts = (
        memory[:2048], memory[2049:2150], memory[2200:2233], memory[2300:2700].view(20, 20)[:, 3:10],
        memory[2800:2900].view(5, 20).t(), memory[3000:4000:17],
    )  # fmt: skip

    def call() -> Results:
        watch = kernels.Watch([[part] for part in parts])
        watch._table = block[: 8 * watch._table.numel()].view(torch.int64).view_as(watch._table).copy_(watch._table)
        found = [watch.changed(), watch.changed()]
        for part in parts[::2]:
            part[(-1,) * part.dim()] *= -1
        found.append(watch.changed())
        flags = torch.zeros(len(found), len(parts))
        for row, groups in zip(flags, found):
            row[groups] = 1
        return (flags,)

    reference = torch.zeros(3, len(parts), dtype=torch.float64)
    reference[0], reference[2, ::2] = 1, 1
    return "watch", SHORT[dtype], call, (reference,)


KERNELS = {
    "scale_reduce": _scale_reduces,
    "compose": _composes,
    "product": _products,
    "one_pass": _one_passes,
    "weight_norm": _norms,
    "factor_grads": _factor_grads,
    "merge": _merges,
    "kept_norm": _kept_norms,
    "watch": _watches,
}
