"""`DoRAEmbedding`: against the adapted table written out, its options, its memory, merging, PEFT's layer."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import bf16, f32, f64
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from dora_kernels import DoRAEmbedding

axes = pytest.mark.parametrize("magnitude_axis", ["out", "in"])
detachments = pytest.mark.parametrize("detach_norm", [True, False], ids=["detached", "full"])


def random_layer(rows=23, dim=9, *, rank=3, alpha=2, dtype=f64, **options):
    """An adapter that is far from its start."""
    torch.manual_seed(0)
    layer = DoRAEmbedding(rows, dim, rank=rank, alpha=alpha, dtype=dtype, **options)
    with torch.no_grad():
        layer.lora_embedding_A.normal_()
        layer.magnitude.mul_(torch.rand_like(layer.magnitude) + 0.5)
    return layer


def table(layer, eps=0.0):
    """The adapted table, ``[V, D]``, as a function of the adapter."""
    direction = layer.base_layer.weight + layer.scaling * (layer.lora_embedding_B @ layer.lora_embedding_A).T
    norm = torch.linalg.vector_norm(direction, dim=0 if layer.magnitude_axis == "out" else 1, keepdim=True)
    norm = norm.detach() if layer.detach_norm else norm
    return layer.magnitude.view(norm.shape) / (norm + eps) * direction


def adapter(layer):
    return [*layer.factors, layer.lora_magnitude_vector]


@axes
@detachments
@pytest.mark.parametrize("eps", [0.0, 0.3])
@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("training", [True, False])
def test_formula(magnitude_axis, detach_norm, eps, backend, training):
    layer = random_layer(magnitude_axis=magnitude_axis, detach_norm=detach_norm, eps=eps, backend=backend)
    layer.train(training)
    for _ in range(2):  # the second time with the kept norm
        x = torch.randint(0, 23, (4, 5))
        y, wanted = layer(x), table(layer, eps)[x]
        dy = torch.randn_like(y)
        torch.testing.assert_close(y, wanted)
        torch.testing.assert_close(*(torch.autograd.grad(one, adapter(layer), dy) for one in (y, wanted)))


@axes
def test_kernels(lane, magnitude_axis):
    """In float32 and with a bfloat16 table, to a few roundings of the dtype of the output."""
    for dtype in (f32, bf16):
        layer = random_layer(magnitude_axis=magnitude_axis, dtype=dtype, backend=lane.backend).to(lane.device)
        x = torch.randint(0, 23, (4, 5), device=lane.device)
        y = layer(x)
        assert y.dtype == dtype
        exact = copy.deepcopy(layer).to(f64)
        wanted = table(exact)[x]
        step = torch.finfo(dtype).eps
        torch.testing.assert_close(y.to(f64), wanted, rtol=4 * step, atol=4 * step)
        grads = torch.autograd.grad(y.sum(), adapter(layer))
        for grad, exactly in zip(grads, torch.autograd.grad(wanted.sum(), adapter(exact)), strict=True):
            assert (grad - exactly).norm() < 4 * step * exactly.norm()


@axes
@detachments
def test_a_new_layer_is_its_base_layer(magnitude_axis, detach_norm):
    base = nn.Embedding(23, 9, padding_idx=1)
    layer = DoRAEmbedding.from_base(base, rank=3, magnitude_axis=magnitude_axis, detach_norm=detach_norm)
    assert layer.base_layer is base and not base.weight.requires_grad
    x = torch.randint(0, 23, (50,))
    torch.testing.assert_close(layer(x), base(x))
    assert layer.lora_magnitude_vector.shape == ((9,) if magnitude_axis == "out" else (23,))
    assert [tuple(t.shape) for t in layer.factors] == [(3, 23), (9, 3)]
    layer.reset_adapter()
    torch.testing.assert_close(layer(x), base(x))


@axes
def test_padding_has_no_gradient(magnitude_axis):
    """As in the table itself; along "out" the magnitude of a dimension still sees the padding's row."""
    layer = random_layer(magnitude_axis=magnitude_axis, padding_idx=3)
    x = torch.tensor([3, 3, 4])
    layer(x).sum().backward()
    columns = layer.lora_embedding_A.grad.abs().sum(0)
    assert columns[3] == 0 and columns[4] > 0
    if magnitude_axis == "in":
        assert layer.magnitude.grad[3] == 0 and layer.magnitude.grad[4] != 0


@axes
def test_gradients_by_frequency(magnitude_axis):
    """`scale_grad_by_freq` divides what a row gets by how often it was looked up."""
    layers = [random_layer(magnitude_axis=magnitude_axis, scale_grad_by_freq=scaled) for scaled in (False, True)]
    for layer in layers:
        layer(torch.tensor([4, 4, 7])).sum().backward()
    one, scaled = (layer.lora_embedding_A.grad for layer in layers)
    torch.testing.assert_close(scaled[:, 4], one[:, 4] / 2)
    torch.testing.assert_close(scaled[:, 7], one[:, 7])


def test_a_sparse_embedding_has_dense_gradients():
    layer = random_layer(sparse=True)
    layer(torch.tensor([4])).sum().backward()
    assert all(p.grad.layout == torch.strided for p in adapter(layer))


class Sizes(TorchDispatchMode):
    """The largest tensor that any operation makes, views and parameters aside."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        known = {t.untyped_storage().data_ptr() for t in args if isinstance(t, torch.Tensor)}
        for t in result if isinstance(result, (list, tuple)) else (result,):
            if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in known:
                self.largest = max(self.largest, t.numel())
        return result


@axes
@detachments
def test_nothing_of_the_tables_size(magnitude_axis, detach_norm, monkeypatch):
    """Forward and backward; blocks of the norm's computation, which are of a fixed size, are made small here."""
    monkeypatch.setattr("dora_kernels.core.products.BLOCK_ELEMENTS", 2000)
    monkeypatch.setattr("dora_kernels.engine.blocked._FACTORED_ELEMENTS", 0)
    rows, dim, rank = 2000, 64, 1
    layer = random_layer(
        rows, dim, rank=rank, dtype=f32, magnitude_axis=magnitude_axis, detach_norm=detach_norm, backend="torch"
    )
    with Sizes() as sizes:
        layer(torch.randint(0, rows, (3,))).sum().backward()
    assert 0 < sizes.largest <= rows * dim / 8


@axes
@pytest.mark.parametrize("dtype", [f32, bf16])
@pytest.mark.parametrize("eps", [0.0, 0.3])
def test_merge_and_unmerge(magnitude_axis, dtype, eps):
    layer = random_layer(magnitude_axis=magnitude_axis, dtype=dtype, eps=eps)
    x = torch.randint(0, 23, (4, 5))
    original, before = layer.base_layer.weight.clone(), layer(x).detach()
    wanted = table(copy.deepcopy(layer).to(f64), eps)
    layer.merge()
    step = torch.finfo(dtype).eps
    torch.testing.assert_close(layer.base_layer.weight.to(f64), wanted, rtol=4 * step, atol=1e-6)
    assert torch.equal(layer(x), layer.base_layer.weight[x])
    layer.unmerge()
    assert torch.equal(layer.base_layer.weight, original) and torch.equal(layer(x), before)


def test_one_norm_for_many_calls():
    layer = random_layer()
    for _ in range(3):
        layer(torch.tensor([1, 2])).sum().backward()
    assert (layer._norm_cache.computed, layer._norm_cache.reused) == (1, 2)
    with torch.no_grad():
        layer.lora_embedding_A.mul_(2.0)
    torch.testing.assert_close(layer(torch.tensor([3])), table(layer)[[3]])


@pytest.mark.parametrize("style", ["file", "model"])
def test_names_with_an_adapters_name_load(style):
    source = random_layer()
    state = source.state_dict()
    names = ["lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector"]
    assert sorted(state) == ["base_layer.weight", *names]
    if style == "model":
        state = {
            name.replace("embedding_A", "embedding_A.mine").replace("embedding_B", "embedding_B.mine")
            .replace("magnitude_vector", "magnitude_vector.mine.weight"): t
            for name, t in state.items()
        }  # fmt: skip
    layer = DoRAEmbedding(23, 9, rank=3, alpha=2, dtype=f64)
    layer.load_state_dict(state)
    x = torch.tensor([1, 5])
    assert torch.equal(layer(x), source(x))


def test_numbers_of_pefts_layer():
    peft = pytest.importorskip("peft")
    model = nn.Sequential(nn.Embedding(23, 9, dtype=f64))
    config = peft.LoraConfig(r=3, lora_alpha=4, target_modules=["0"], use_dora=True, init_lora_weights=False)
    stock = peft.get_peft_model(model, config, autocast_adapter_dtype=False).base_model.model[0].to(f64)
    ours = DoRAEmbedding(23, 9, rank=3, alpha=4, dtype=f64)
    ours.load_state_dict(stock.state_dict())
    x = torch.randint(0, 23, (4, 5))
    pefts = [stock.lora_embedding_A["default"], stock.lora_embedding_B["default"],
             stock.lora_magnitude_vector["default"].weight]  # fmt: skip
    dy = torch.randn(4, 5, 9, dtype=f64)
    results = [
        [y.detach(), *torch.autograd.grad(y, parameters, dy)]
        for y, parameters in ((stock(x), pefts), (ours(x), adapter(ours)))
    ]
    torch.testing.assert_close(*results)


@pytest.mark.parametrize(
    "base, error, message",
    [
        (nn.Linear(2, 2), TypeError, "base: expected a torch.nn.Embedding and not a subclass, got Linear"),
        (type("Scaled", (nn.Embedding,), {})(2, 2), TypeError, "got Scaled"),
        (nn.Embedding(4, 4, max_norm=1.0), ValueError, r"max_norm: expected None, got 1\.0, which writes the table"),
    ],
)
def test_from_something_else(base, error, message):
    with pytest.raises(error, match=message):
        DoRAEmbedding.from_base(base, rank=2)
    if not isinstance(base, nn.Embedding):
        with pytest.raises(TypeError, match="base_layer: expected a torch.nn.Embedding, got Linear"):
            DoRAEmbedding(rank=2, base_layer=base)
    assert all(p.requires_grad for p in base.parameters())


def functional(layer, x, transform):
    """The layer's loss or output as a function of A, under one of what takes plain operations alone."""
    factor = layer.lora_embedding_A.detach()

    def output(lora_A, x=x):
        return torch.func.functional_call(layer, {"lora_embedding_A": lora_A}, (x,))

    if transform == "grad":
        return torch.func.grad(lambda a: output(a).square().sum())(factor)
    if transform == "vmap":
        return torch.func.vmap(lambda one: output(factor, one))(x)
    if transform == "jvp":
        return torch.func.jvp(output, (factor,), (torch.ones_like(factor),))[1]
    if transform == "forward":
        with torch.autograd.forward_ad.dual_level():
            y = output(torch.autograd.forward_ad.make_dual(factor, torch.ones_like(factor)))
            return torch.autograd.forward_ad.unpack_dual(y).tangent
    return torch.jit.trace(layer, x)(x)


@axes
@detachments
@pytest.mark.parametrize("transform", ["grad", "vmap", "jvp", "forward", "trace"])
@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.filterwarnings("error::RuntimeWarning", "ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_function_transforms(magnitude_axis, detach_norm, transform, backend):
    layer = random_layer(magnitude_axis=magnitude_axis, detach_norm=detach_norm, backend=backend)
    x = torch.randint(0, 23, (4, 5))
    got = functional(layer, x, transform)
    layer.forward = lambda x: table(layer)[x]
    torch.testing.assert_close(got, layer(x) if transform == "trace" else functional(layer, x, transform))


@axes
@detachments
@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_second_derivatives(magnitude_axis, detach_norm, backend):
    layer = random_layer(magnitude_axis=magnitude_axis, detach_norm=detach_norm, backend=backend)
    x = torch.tensor([1, 2, 2])
    results = []
    for y in (layer(x), table(layer)[x]):
        first = torch.autograd.grad(y.pow(3).sum(), adapter(layer), create_graph=True)
        results.append([*first, *torch.autograd.grad(sum(t.square().sum() for t in first), adapter(layer))])
    torch.testing.assert_close(*results)
