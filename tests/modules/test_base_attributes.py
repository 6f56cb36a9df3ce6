"""What models read of their layers, sizes, strides, padding, is there on the adapted ones, as the base layer has it."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from dora_kernels import DoRAConv1d, DoRAConv2d, DoRAConv3d, DoRAEmbedding, DoRALinear, LoRALinear

CONVOLUTION = {"stride": 2, "padding": 1, "dilation": 2, "padding_mode": "circular"}
LAYERS = [
    (LoRALinear, nn.Linear(4, 6), []),
    (DoRALinear, nn.Linear(4, 6), []),
    (DoRAEmbedding, nn.Embedding(9, 4, padding_idx=3, scale_grad_by_freq=True), []),
    (DoRAConv1d, nn.Conv1d(4, 6, 3, **CONVOLUTION), ["output_padding"]),
    (DoRAConv2d, nn.Conv2d(4, 6, (3, 1), **CONVOLUTION), ["output_padding"]),
    (DoRAConv3d, nn.Conv3d(4, 6, 1), ["output_padding"]),
]


@pytest.mark.parametrize("kind, base, other", LAYERS, ids=lambda value: getattr(value, "__name__", ""))
def test_attributes_of_the_base_layer(kind, base, other):
    names = set(type(base).__constants__) - set(other)  # of transposed convolutions
    layer = kind.from_base(copy.deepcopy(base), rank=2)
    state = list(layer.state_dict())
    for one in (layer, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert {name: getattr(one, name) for name in names} == {name: getattr(base, name) for name in names}
        assert list(one.state_dict()) == state
    assert not names & vars(layer).keys()


@pytest.mark.parametrize("kind, base, other", LAYERS[3:4])
def test_attributes_while_compiled(kind, base, other):
    """As Whisper reads the stride of its first layer."""
    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = kind.from_base(copy.deepcopy(base), rank=2)

        def forward(self, x):
            return self.layer(x) * self.layer.stride[0]

    model, x = Reads(), torch.randn(1, 4, 9)
    torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=True)(x), model.layer(x) * 2)


def test_unknown_attributes():
    layer = DoRAConv1d(4, 4, 1, rank=1)
    with pytest.raises(AttributeError, match="nothing"):
        layer.nothing  # noqa: B018


@pytest.mark.parametrize("kind, base, other", LAYERS, ids=lambda value: getattr(value, "__name__", ""))
def test_numbers_of_numpy(kind, base, other):
    np = pytest.importorskip("numpy")
    layer = kind.from_base(copy.deepcopy(base), rank=np.int64(2), alpha=np.float32(4), dropout=np.float32(0.5))
    assert (type(layer.rank), layer.rank, layer.scaling, layer.dropout.p) == (int, 2, 2.0, 0.5)
    for rank in (True, 2.0, np.float64(2)):
        with pytest.raises(TypeError, match="rank: expected an int, got "):
            kind.from_base(copy.deepcopy(base), rank=rank)
