"""Every message for bad input: the kind of error, and that it names the argument, what came and what was expected."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import make_problem
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from dora_kernels import dora_linear, dora_weight_norm, merge_dora
from dora_kernels.core.problem import Weights
from dora_kernels.engine import dispatch
from dora_kernels.engine.dispatch import UnsupportedError

# A layer of 5 input and 4 output features, rank 2.
WEIGHT = dict(weight=torch.randn(4, 5), lora_A=torch.randn(2, 5), lora_B=torch.randn(4, 2))
ADAPTER = {**WEIGHT, "scaling": 1.0, "magnitude_axis": "out"}
LAYER = {**ADAPTER, "x": torch.randn(3, 5), "magnitude": torch.rand(4), "bias": torch.randn(4)}

ADAPTER_CASES = [
    ({"weight": torch.randn(4)}, ValueError, "weight: expected two dimensions, got shape [4]"),
    ({"lora_A": torch.randn(1, 2, 5)}, ValueError, "lora_A: expected two dimensions, got shape [1, 2, 5]"),
    ({"lora_B": torch.randn(4)}, ValueError, "lora_B: expected two dimensions, got shape [4]"),
    ({"weight": torch.randn(0, 5)}, ValueError, "weight: expected at least one feature on each side, got shape [0, 5]"),
    ({"weight": torch.randn(4, 0)}, ValueError, "weight: expected at least one feature on each side, got shape [4, 0]"),
    ({"lora_A": torch.randn(0, 5)}, ValueError, "lora_A: expected a rank of at least 1, got shape [0, 5]"),
    (
        {"lora_A": torch.randn(2, 6)},
        ValueError,
        "lora_A: expected [rank, 5] for a weight of shape [4, 5], got [2, 6]",
    ),
    (
        {"lora_B": torch.randn(4, 3)},
        ValueError,
        "lora_B: expected [4, 2] for a weight of shape [4, 5] and a lora_A of shape [2, 5], got [4, 3]",
    ),
    (
        {"lora_B": torch.randn(2, 4)},  # transposed
        ValueError,
        "lora_B: expected [4, 2] for a weight of shape [4, 5] and a lora_A of shape [2, 5], got [2, 4]",
    ),
    ({"weight": [[1.0]]}, TypeError, "weight: expected a torch.Tensor, got list"),
    ({"lora_A": None}, TypeError, "lora_A: expected a torch.Tensor, got NoneType"),
    ({"lora_B": 3}, TypeError, "lora_B: expected a torch.Tensor, got int"),
    (
        {"weight": torch.zeros(4, 5, dtype=torch.int8)},
        TypeError,
        "weight: expected float32, bfloat16, float16 or float64, got torch.int8",
    ),
    (
        {"lora_A": torch.zeros(2, 5, dtype=torch.complex64)},
        TypeError,
        "lora_A: expected float32, bfloat16, float16 or float64, got torch.complex64",
    ),
    (
        {"lora_B": torch.zeros(4, 2, dtype=torch.float8_e4m3fn)},
        TypeError,
        "lora_B: expected float32, bfloat16, float16 or float64, got torch.float8_e4m3fn",
    ),
    ({"lora_A": torch.randn(2, 5, device="meta")}, ValueError, "lora_A: expected the weight's device cpu, got meta"),
    ({"lora_B": torch.randn(4, 2, device="meta")}, ValueError, "lora_B: expected the weight's device cpu, got meta"),
    ({"scaling": math.nan}, ValueError, "scaling: expected a finite number, got nan"),
    ({"scaling": -math.inf}, ValueError, "scaling: expected a finite number, got -inf"),
    ({"scaling": "1"}, TypeError, "scaling: expected a finite number, got str"),
    ({"scaling": None}, TypeError, "scaling: expected a finite number, got NoneType"),
    ({"scaling": True}, TypeError, "scaling: expected a finite number, got bool"),
    ({"scaling": torch.tensor(1.0)}, TypeError, "scaling: expected a finite number, got Tensor"),
    ({"magnitude_axis": 1}, ValueError, "magnitude_axis: expected 'out' or 'in', got 1"),
    ({"magnitude_axis": "rows"}, ValueError, "magnitude_axis: expected 'out' or 'in', got 'rows'"),
]

BACKEND_CASES = [
    ({"backend": "cuda"}, ValueError, "backend: expected one of 'auto', 'torch', 'triton', got 'cuda'"),
    ({"backend": None}, ValueError, "backend: expected one of 'auto', 'torch', 'triton', got None"),
]

MAGNITUDE_CASES = [
    (
        {"magnitude": torch.rand(5)},
        ValueError,
        "magnitude: expected [4] for magnitude_axis='out' and a weight of shape [4, 5], got [5]",
    ),
    (
        {"magnitude": torch.rand(4), "magnitude_axis": "in"},
        ValueError,
        "magnitude: expected [5] for magnitude_axis='in' and a weight of shape [4, 5], got [4]",
    ),
    (
        {"magnitude": torch.rand(4, 1)},
        ValueError,
        "magnitude: expected [4] for magnitude_axis='out' and a weight of shape [4, 5], got [4, 1]",
    ),
    ({"magnitude": 1.0}, TypeError, "magnitude: expected a torch.Tensor, got float"),
    (
        {"magnitude": torch.ones(4, dtype=torch.int64)},
        TypeError,
        "magnitude: expected float32, bfloat16, float16 or float64, got torch.int64",
    ),
    (
        {"magnitude": torch.rand(4, device="meta")},
        ValueError,
        "magnitude: expected the weight's device cpu, got meta",
    ),
]

LAYER_CASES = [
    ({"x": [1.0]}, TypeError, "x: expected a torch.Tensor, got list"),
    (
        {"x": torch.zeros(3, 5, dtype=torch.int32)},
        TypeError,
        "x: expected float32, bfloat16, float16 or float64, got torch.int32",
    ),
    ({"x": torch.randn(3, 4)}, ValueError, "x: expected [..., 5], got [3, 4]"),
    ({"x": torch.tensor(1.0)}, ValueError, "x: expected [..., 5], got []"),
    ({"x": torch.randn(3, 5, device="meta")}, ValueError, "x: expected the weight's device cpu, got meta"),
    ({"bias": torch.randn(5)}, ValueError, "bias: expected [4] for a weight of shape [4, 5], got [5]"),
    ({"bias": 0}, TypeError, "bias: expected a torch.Tensor, got int"),
    ({"bias": torch.randn(4, device="meta")}, ValueError, "bias: expected the weight's device cpu, got meta"),
    (
        {"weight_norm": torch.rand(5)},
        ValueError,
        "weight_norm: expected [4] for magnitude_axis='out' and a weight of shape [4, 5], got [5]",
    ),
    (
        {"weight_norm": torch.rand(4, requires_grad=True)},
        ValueError,
        "weight_norm: requires grad, but the layer treats it as a constant; pass weight_norm.detach()",
    ),
    (
        {"weight_norm": torch.rand(4), "magnitude": None},
        ValueError,
        "weight_norm: expected None without a magnitude, because plain LoRA (magnitude=None) uses no norm",
    ),
    ({"weight_norm": [1.0]}, TypeError, "weight_norm: expected a torch.Tensor, got list"),
    (
        {"weight_norm": torch.rand(4, device="meta")},
        ValueError,
        "weight_norm: expected the weight's device cpu, got meta",
    ),
]


def says(error, message, function, arguments):
    with pytest.raises(error) as caught:
        function(**arguments)
    assert str(caught.value) == message
    assert type(caught.value) is error


def cases(*tables):
    rows = [row for table in tables for row in table]
    return pytest.mark.parametrize(("changes", "error", "message"), rows, ids=[message for _, _, message in rows])


@cases(ADAPTER_CASES, BACKEND_CASES, MAGNITUDE_CASES, LAYER_CASES)
def test_dora_linear(changes, error, message):
    says(error, message, dora_linear, {**LAYER, **changes})


@cases(ADAPTER_CASES, BACKEND_CASES)
def test_dora_weight_norm(changes, error, message):
    says(error, message, dora_weight_norm, {**ADAPTER, **changes})


ROUNDING_CASES = [
    ({"rounding": "up"}, ValueError, "rounding: expected 'nearest' or 'stochastic', got 'up'"),
    ({"rounding": None}, ValueError, "rounding: expected 'nearest' or 'stochastic', got None"),
    ({"seed": 0.5}, TypeError, "seed: expected an int in [0, 2**63), got float"),
    ({"seed": True}, TypeError, "seed: expected an int in [0, 2**63), got bool"),
    ({"seed": -1}, ValueError, "seed: expected an int in [0, 2**63), got -1"),
    ({"seed": 1 << 63}, ValueError, "seed: expected an int in [0, 2**63), got 9223372036854775808"),
]


@cases(ADAPTER_CASES, MAGNITUDE_CASES, ROUNDING_CASES)
def test_merge_dora(changes, error, message):
    says(error, message, merge_dora, {**ADAPTER, "magnitude": torch.rand(4), **changes})


def test_good_input_passes():
    """The cases above fail for the reason they name and no other."""
    assert dora_linear(**LAYER).shape == (3, 4)
    assert dora_weight_norm(**ADAPTER).shape == (4,)
    assert merge_dora(**ADAPTER, magnitude=LAYER["magnitude"]).shape == (4, 5)
    assert dora_linear(**{**LAYER, "scaling": 2}).shape == (3, 4)


# Backends that are there, but not for this call.


def test_triton_has_no_float64(lane):
    if lane.backend != "triton":
        pytest.skip("about the kernels")
    problem = make_problem(device=lane.device).map(lambda t: t.double())
    with pytest.raises(UnsupportedError, match="backend='triton'.*no kernels for torch.float64"):
        dora_linear(**problem.tensors, backend="triton")
    assert issubclass(UnsupportedError, RuntimeError)


def on_a_gpu(dtype=torch.float32, tokens=8192):
    """The tensors of a call."""
    with FakeTensorMode(), torch.device("cuda", 0):
        shapes = (4096, 4096), (16, 4096), (4096, 16), (4096,)
        return torch.empty(tokens, 4096, dtype=dtype), Weights(*(torch.empty(one, dtype=dtype) for one in shapes))


@pytest.fixture
def no_compiler(monkeypatch):
    """A GPU, as far as the rule looks at it, where no kernel can be built."""
    monkeypatch.setattr(dispatch, "PLAIN", {FakeTensor, type(None)})
    monkeypatch.setattr(dispatch, "triton_problem", lambda device: "a first kernel failed: RuntimeError: no C compiler")


def test_auto_goes_on_without_triton_and_says_why_once(no_compiler):
    x, weights = on_a_gpu()
    with pytest.warns(RuntimeWarning) as caught:
        chosen = [dispatch.norm_backend("auto", weights.weight) for _ in range(3)]
        chosen += [dispatch.resolve("auto", x, weights) for _ in range(3)]
    assert chosen == ["torch"] * 6
    assert len(caught) == 1
    message = str(caught[0].message)
    assert all(part in message for part in ("triton", "cuda:0", "no C compiler", "backend='torch'"))


def test_triton_by_name_does_not_fall_back(no_compiler):
    x, weights = on_a_gpu()
    for call in (lambda: dispatch.resolve("triton", x, weights), lambda: dispatch.norm_backend("triton", x)):
        with pytest.raises(UnsupportedError, match="backend='triton'.*cannot be used on cuda:0.*no C compiler"):
            call()


def test_auto_on_a_gpu(no_compiler, monkeypatch):
    """Quietly: triton where it runs and the problem is large, torch for float64."""
    monkeypatch.setattr(dispatch, "triton_problem", lambda device: None)
    assert dispatch.resolve("auto", *on_a_gpu()) == "triton"
    assert dispatch.resolve("auto", *on_a_gpu(tokens=1)) == "torch"
    assert dispatch.resolve("triton", *on_a_gpu(tokens=1)) == "triton"
    assert dispatch.resolve("auto", *on_a_gpu(torch.float64)) == "torch"
    x, weights = on_a_gpu()
    assert dispatch.resolve("auto", x, weights._replace(magnitude=weights.magnitude.double())) == "torch"
    assert dispatch.norm_backend("auto", weights.weight) == "triton"


def test_auto_on_the_cpu_is_torch():
    weights = Weights(WEIGHT["weight"], WEIGHT["lora_A"], WEIGHT["lora_B"])
    assert dispatch.resolve("auto", torch.zeros(1 << 20, 5), weights) == "torch"


A_LAYER = dispatch.Call("cuda", frozenset({torch.bfloat16, torch.float32}), 4096, 4096, 4096, 16, True)


@pytest.mark.parametrize(
    "changes, fused",
    [
        ({}, True),
        ({"tokens": 1}, False),
        ({"tokens": 256}, False),
        ({"tokens": 2048, "gradients": False}, True),
        ({"tokens": 1, "gradients": False}, False),
        ({"tokens": 0}, False),
        ({"tokens": 4096, "out_features": 64}, False),
        ({"dtypes": frozenset({torch.float16})}, True),
        ({"dtypes": frozenset({torch.bfloat16, torch.float64})}, False),
        ({"device": "cpu"}, False),
        ({"device": "meta"}, False),
    ],
)
def test_the_rule(changes, fused):
    assert dispatch.prefers_fused(A_LAYER._replace(**changes)) is fused


def test_the_rule_is_monotonic():
    """More of the same work never leaves the kernels, and whoever wants no gradient reaches them first."""
    sizes = [1 << power for power in range(15)]
    for gradients in (True, False):
        answers = [dispatch.prefers_fused(A_LAYER._replace(tokens=tokens, gradients=gradients)) for tokens in sizes]
        assert answers == sorted(answers) and set(answers) == {True, False}
    for tokens in sizes:
        with_gradients, without = (
            dispatch.prefers_fused(A_LAYER._replace(tokens=tokens, gradients=one)) for one in (True, False)
        )
        assert without >= with_gradients
