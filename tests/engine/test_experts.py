"""DoRA on stacks of experts: values and gradients against the dense formula, and what is formed and kept."""

from __future__ import annotations

import pytest
import torch
from allocations import Allocations
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dora_kernels.core import precision
from dora_kernels.core.problem import Form, Weights
from dora_kernels.engine import expert_loop, experts
from dora_kernels.engine.experts import Adapter, Experts, _Base
from dora_kernels.engine.layer import layer_scale
from dora_kernels.engine.norm_cache import NormCache
from dora_kernels.testing import error

E, N, K, R, SCALING = 5, 24, 40, 3, 0.7
ENDS = [3, 3, 11, 12, 20]  # expert 1 has no rows; the last two rows belong to no expert
ROWS = 22

f64, f32, bf16, f16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
DTYPES = {"fp64": (f64, f64), "fp32": (f32, f32), "bf16": (bf16, bf16), "bf16+fp32": (bf16, f32), "fp16": (f16, f16)}


@pytest.fixture(params=["own products", "float32 products"])
def products(request, monkeypatch):
    """16 bits as on a CPU that multiplies them, and as on one that does not."""
    own = request.param == "own products"
    for module in (expert_loop, experts):
        monkeypatch.setattr(module, "product_dtype", lambda dtype: dtype if own or dtype.itemsize > 2 else f32)
    return own


class Problem:
    """Leaves, with B as PEFT stores it, and an upstream gradient."""

    def __init__(self, dtype: torch.dtype, adapter: torch.dtype, dora: bool = True) -> None:
        torch.manual_seed(0)
        self.x = torch.randn(ROWS, K, dtype=f64).to(dtype).requires_grad_()
        self.weight = torch.randn(E, N, K, dtype=f64).to(dtype)
        self.a = torch.randn(E, R, K, dtype=f64).to(adapter).requires_grad_()
        self.b = (0.3 * torch.randn(N, R * E, dtype=f64)).to(adapter).requires_grad_()
        self.m = (5 + torch.rand(E, N, dtype=f64)).to(adapter).requires_grad_() if dora else None
        self.up = torch.randn(ROWS, N, dtype=f64).to(dtype)

    @property
    def leaves(self) -> list[Tensor]:
        return [t for t in (self.x, self.a, self.b, self.m) if t is not None]

    def weights(self) -> Weights:
        return Weights(self.weight, self.a, self.b.view(N, R, E).permute(2, 0, 1), self.m)

    def experts(self, cache: NormCache | None = None, backend: str = "auto") -> Experts:
        weights, g = self.weights(), None
        if self.m is not None:
            g = layer_scale(weights, Form(SCALING), cache or NormCache(), True, backend)
            g = g.to(torch.promote_types(self.weight.dtype, f32))
        return Experts(self.weight, [Adapter(weights.lora_A, weights.lora_B, g, SCALING)], backend)

    def solve(self, backend: str = "auto") -> list[Tensor]:
        y = self.experts(backend=backend).grouped(self.x, torch.tensor(ENDS, dtype=torch.int32))
        return [y.detach(), *torch.autograd.grad(y, self.leaves, self.up)]


def dense(problem: Problem, dtype: torch.dtype) -> list[Tensor]:
    """The formula with V formed, in plain operations of one dtype."""
    leaves = [t.detach().to(dtype).requires_grad_() for t in problem.leaves]
    x, a, b, *m = leaves
    v = problem.weight.to(dtype) + SCALING * (b.view(N, R, E).permute(2, 0, 1) @ a)
    if m:
        v = (m[0] / torch.linalg.vector_norm(v, dim=2).detach()).unsqueeze(2) * v
    bounds = [0, *ENDS]
    parts = [x[start:end] @ v[e].t() for e, (start, end) in enumerate(zip(bounds, ENDS))]
    y = torch.cat([*parts, x.new_zeros(ROWS - ENDS[-1], N)])
    return [y.detach(), *torch.autograd.grad(y, leaves, problem.up.to(dtype))]


@pytest.mark.parametrize("dora", [True, False], ids=["dora", "lora"])
@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=list(DTYPES))
def test_like_the_dense_formula(dtypes, dora, products):
    """No further from float64 than twice the formula in the compute dtype."""
    problem = Problem(*dtypes, dora)
    exact, eager, ours = dense(problem, f64), dense(problem, dtypes[0]), problem.solve()
    for name, truth, plain, result in zip(("y", "x", "a", "b", "m"), exact, eager, ours):
        floor = 4 * torch.finfo(dtypes[0]).eps
        assert error(result, truth) <= max(2 * error(plain, truth), floor), name
    assert ours[0][ENDS[-1] :].eq(0).all() and ours[1][ENDS[-1] :].eq(0).all()


@pytest.mark.parametrize("dora", [True, False], ids=["dora", "lora"])
@pytest.mark.parametrize("dtypes", [(f32, f32), (bf16, bf16), (bf16, f32)], ids=["fp32", "bf16", "bf16+fp32"])
def test_the_kernels(dtypes, dora):
    """In Triton's interpreter, which has no bfloat16 products of its own."""
    pytest.importorskip("triton")
    problem = Problem(*dtypes, dora)
    exact, eager, ours = dense(problem, f64), dense(problem, dtypes[0]), problem.solve("triton")
    for name, truth, plain, result in zip(("y", "x", "a", "b", "m"), exact, eager, ours):
        rows = slice(ENDS[-1] if name in ("y", "x") else None)  # the rest is uninitialized
        floor = 4 * torch.finfo(dtypes[0]).eps
        assert error(result[rows], truth[rows]) <= max(2 * error(plain[rows], truth[rows]), floor), name
    assert ours[3].stride() == problem.b.stride()


def test_sums_over_tokens_are_not_rounded_to_16_bits():
    """dA and dB of float32 adapters under autocast, whose H and D are rounded."""
    pytest.importorskip("triton")
    problem = Problem(bf16, f32)
    with torch.autocast("cpu", bf16):
        y = problem.experts(backend="triton").grouped(problem.x, torch.tensor(ENDS, dtype=torch.int32))
    for grad in torch.autograd.grad(y, [problem.a, problem.b], problem.up):
        assert grad.dtype is f32 and (grad.to(bf16) != grad).float().mean() > 0.5


class Products(TorchDispatchMode):
    """Notes the dtypes of all matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[torch.dtype] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if "mm" in function.__name__:
            self.seen |= {t.dtype for t in args if isinstance(t, Tensor)}
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("adapter", [bf16, f32], ids=["bf16", "bf16+fp32"])
def test_on_a_cpu_without_products_of_16_bits(adapter, monkeypatch):
    """All are float32's: of all experts, of one, and in the backward. One row in evaluation reads W as it is."""
    for module in (expert_loop, experts):
        monkeypatch.setattr(module, "product_dtype", lambda dtype: f32)
    problem = Problem(bf16, adapter)
    of_problem = problem.experts()
    with Products() as products:
        for y in (of_problem.grouped(problem.x, ENDS), of_problem.linear(problem.x[:9], 2)):
            assert y.dtype is bf16
            torch.autograd.grad(y, problem.leaves, torch.ones_like(y), retain_graph=True)
    assert products.seen == {f32}
    with torch.no_grad(), Products() as products:
        of_problem.grouped(problem.x[:1], [1] * E)
    assert bf16 in products.seen


def test_the_dtype_of_products():
    """float32 for 16 bits that the CPU does not multiply, as PyTorch says itself; nothing else changes."""
    for dtype, supported in ((bf16, "_is_mkldnn_bf16_supported"), (f16, "_is_mkldnn_fp16_supported")):
        own = getattr(torch.ops.mkldnn, supported)()
        assert precision.product_dtype(dtype) is (dtype if own else f32)
    assert precision.product_dtype(f32) is f32 and precision.product_dtype(f64) is f64


def test_experts_without_rows_get_zero_gradients():
    _, _, of_a, of_b, of_m = Problem(f32, f32).solve()
    for gradient in (of_a, of_b.view(N, R, E).permute(2, 0, 1), of_m):
        assert gradient[1].eq(0).all() and gradient[0].ne(0).any()


@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=list(DTYPES))
def test_what_experts_without_rows_hold_touches_nothing(dtypes, products):
    """A magnitude that is not finite there changes no gradient."""
    expected = Problem(*dtypes).solve()
    problem = Problem(*dtypes)
    with torch.no_grad():
        problem.m[1] = torch.inf
    for one, other in zip(problem.solve(), expected, strict=True):
        assert torch.equal(one, other)


def test_without_any_rows_every_parameter_has_a_gradient():
    """Else DistributedDataParallel would wait for it."""
    problem = Problem(f32, f32)
    y = problem.experts().grouped(problem.x[:0], [0] * E)
    grads = torch.autograd.grad(y.sum(), problem.leaves[1:])
    assert y.shape == (0, N) and all(grad.eq(0).all() for grad in grads)


def test_second_derivatives():
    problem = Problem(f64, f64)

    def layer(x: Tensor, a: Tensor, m: Tensor) -> Tensor:
        g = m / problem.m.detach()
        return Experts(problem.weight, [Adapter(a, problem.weights().lora_B.detach(), g, SCALING)]).grouped(x, ENDS)

    y = layer(problem.x, problem.a, problem.m)
    (first,) = torch.autograd.grad(y.square().sum(), problem.a, create_graph=True)
    assert torch.autograd.grad(first.sum(), problem.x)[0].abs().max() > 0


def test_rows_in_any_order_and_one_expert_at_a_time():
    problem = Problem(f64, f64)
    experts, v = problem.experts(), problem.experts().formed()
    ids = torch.tensor([3, 0, 4, 0, 2])
    x = problem.x[:5]
    torch.testing.assert_close(experts.selected(x, ids), torch.einsum("snk,sk->sn", v[ids], x), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(experts.linear(x, 3), x @ v[3].t(), rtol=1e-12, atol=1e-12)


def test_several_adapters_apply_one_after_another():
    one, two = Problem(f64, f64), Problem(f64, f64, dora=False)
    first, second = one.experts().adapters[0], two.experts().adapters[0]._replace(strength=0.5)
    for order in ([first, second], [second, first]):
        experts = Experts(one.weight, order)
        y, v = experts.grouped(one.x, ENDS), experts.formed()
        torch.testing.assert_close(y[:3], one.x[:3] @ v[0].t(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("weight", [f32, bf16], ids=str)
def test_nothing_of_the_stacks_size_is_formed_or_kept(weight):
    """Also where W is not in the compute dtype: its matrices are then cast one by one, again in the backward."""
    problem = Problem(f32, f32)
    problem.weight = problem.weight.to(weight)
    stack, kept = E * N * K, []

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() != problem.weight.untyped_storage().data_ptr():
            kept.append(tensor)
        return tensor

    with Allocations() as made, torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = problem.experts().grouped(problem.x, ENDS)
        y.backward(problem.up)
    assert made.largest <= max(N * K, ROWS * K)
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() // 4 for t in kept}
    assert sum(storages.values()) < stack, {tuple(t.shape) for t in kept}


def test_a_backward_under_autocast():
    """Has the bits of one outside: grouped products are left alone by autocast, and so are their gradients."""
    problem, dy = Problem(bf16, f32), torch.randn(ROWS, N)
    y = problem.experts().grouped(problem.x, ENDS)
    base = _Base.apply(problem.x.float(), problem.weight, 2)
    for result, leaves, up in ((y, problem.leaves, problem.up), (base, [problem.x], dy)):
        outside = torch.autograd.grad(result, leaves, up, retain_graph=True)
        with torch.autocast("cpu", bf16):
            inside = torch.autograd.grad(result, leaves, up)
        assert all(map(torch.equal, inside, outside))


def test_with_float32_adapters_16_bits_are_kept():
    """Of x and the base product no float32 copy is kept."""
    problem, wide = Problem(bf16, f32), []

    def pack(tensor: Tensor) -> Tensor:
        if tensor.dtype == f32 and tensor.shape[-1] in (K, N) and tensor.dim() == 2 and tensor.shape[0] != R:
            wide.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        problem.experts().grouped(problem.x, ENDS)
    rows = {end - start for start, end in zip([0, *ENDS], ENDS)}
    assert not [shape for shape in wide if shape[0] in rows and shape != (E, N)]


def test_in_float32_y_is_not_kept_beside_the_result():
    """The backward reads the memory that the result has, unless somebody writes to that."""
    torch.manual_seed(0)
    rows, outputs = 256, 128  # above the size from which y is read
    weight = torch.randn(2, outputs, 8)
    a, b = torch.randn(2, 3, 8, requires_grad=True), torch.randn(2, outputs, 3, requires_grad=True)
    g, x, kept = (1 + torch.rand(2, outputs)).requires_grad_(), torch.randn(rows, 8), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = Experts(weight, [Adapter(a, b, g, SCALING)]).grouped(x, [100, rows])
    (same,) = [t for t in kept if t.shape == y.shape]
    assert torch._C._data_address(same) == torch._C._data_address(y)
    up, before = torch.randn_like(y), y.detach().clone()
    wanted = torch.stack([(up[part] * before[part]).sum(0) for part in (slice(100), slice(100, rows))]) / g
    y.detach().zero_()  # as rotary embeddings and biases write to what they are given
    (found,) = torch.autograd.grad(y, g, up)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("contiguous", [True, False])
def test_a_row_for_each_expert_in_evaluation(contiguous, products):
    """Also under autocast, and with rows of no expert."""
    for dtypes, autocast in [(each, False) for each in DTYPES.values()] + [((bf16, f32), True)]:
        problem = Problem(*dtypes)
        adapter = problem.experts().adapters[0]
        adapter = adapter._replace(lora_B=adapter.lora_B.contiguous()) if contiguous else adapter
        ends = [1, 1, 3, 4, 5]
        with torch.no_grad(), torch.autocast("cpu", bf16, enabled=autocast):
            y = Experts(problem.weight, [adapter]).grouped(problem.x[:6], ends)
        v = Experts(problem.weight.double(), [adapter._replace(g=adapter.g.double())]).formed()
        ids, x = torch.tensor([0, 2, 2, 3, 4]), problem.x[:5].double()
        wanted = torch.einsum("snk,sk->sn", v[ids], x)
        assert error(y[:5], wanted) <= 4 * torch.finfo(dtypes[0]).eps and y[5].eq(0).all()


def test_no_rows_in_evaluation():
    """An empty batch, as an expert-parallel process may get."""
    for dtypes in DTYPES.values():
        problem = Problem(*dtypes)
        with torch.no_grad():
            y = problem.experts().grouped(problem.x[:0], [0] * E)
            one = problem.experts().linear(problem.x[:0], 2)
        assert y.shape == one.shape == (0, N) and y.dtype == one.dtype == dtypes[0]


def test_the_copy_of_b_follows_b():
    """Made once while the norm holds, anew after a write that moves no version."""
    problem, cache = Problem(f32, f32), NormCache()

    def copy() -> Tensor:
        with torch.no_grad():
            problem.experts(cache)
            return cache.contiguous_b(problem.weights().lora_B)

    first = copy()
    assert first.is_contiguous() and copy() is first
    problem.b.data[3, 7] += 1
    assert torch.equal(copy(), problem.weights().lora_B) and copy() is not first
    other = Problem(f32, f32).weights().lora_B
    assert cache.contiguous_b(other) is other


def test_second_derivatives_of_mixed_dtypes():
    problem = Problem(bf16, f32)
    y = problem.experts().grouped(problem.x, ENDS)
    (first,) = torch.autograd.grad(y.float().square().sum(), problem.a, create_graph=True)
    assert torch.autograd.grad(first.sum(), problem.x)[0].abs().max() > 0


def test_the_norm_is_kept_as_that_of_a_dense_layer():
    problem, cache = Problem(f32, f32), NormCache()
    for _ in range(3):
        problem.experts(cache)
    assert (cache.computed, cache.reused) == (1, 2)
    with torch.no_grad():
        problem.b[3, 7] += 1
    problem.experts(cache)
    assert cache.computed == 2


def test_a_fresh_magnitude_gives_the_base_to_the_bit():
    problem = Problem(f32, f32)
    with torch.no_grad():
        problem.b.zero_()
        problem.m.copy_(torch.linalg.vector_norm(problem.weight, dim=2))
    y = problem.experts().grouped(problem.x, ENDS)
    assert torch.equal(y[:3], torch.nn.functional.linear(problem.x[:3], problem.weight[0]))


@pytest.mark.parametrize("dtype", [f32, bf16], ids=str)
def test_one_experts_product_compiles_whole(dtype):
    """As experts run one by one need it, and a router's matrix."""
    problem = Problem(dtype, dtype)
    with torch.no_grad():
        of_problem = problem.experts()
        wanted = of_problem.linear(problem.x, 2)
        found = torch.compile(lambda x: of_problem.linear(x, 2), backend="eager", fullgraph=True)(problem.x)
    assert error(found, wanted) <= 4 * torch.finfo(dtype).eps
