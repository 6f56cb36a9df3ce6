"""How transformers' tensor parallelism splits a PEFT layer: this process's part of its tensors, and the group.

transformers (5.17 and later) makes the base layer's parameters DTensors and gives the module a forward that takes and
returns plain tensors. PEFT notes style and mesh on the base layer and splits A and B alike:

| style | W ``[N, K]`` | A | B | magnitude, bias | x | y |
|---|---|---|---|---|---|---|
| colwise | rows | whole | rows | split | whole | split |
| rowwise | columns | columns | whole | whole | split | whole |
| embedding_rowwise | columns (the table's rows) | columns | whole | whole | whole | whole |
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from peft.tuners import lora
from torch import Tensor, nn

from dora_kernels.core.problem import Form
from dora_kernels.engine.collectives import all_true
from dora_kernels.engine.writes import PARAMETER

STYLES = ("colwise", "rowwise", "embedding_rowwise")
"""The names in a `tp_plan` that PEFT has adapters for."""

_STYLE, _MESH = "_hf_tp_plan", "_hf_device_mesh"


class Split(NamedTuple):
    """How a layer is split."""

    style: str
    mesh: Any

    @property
    def group(self) -> Any:
        """The process group."""
        return self.mesh.get_group()

    @property
    def of_rows(self) -> bool:
        """True if each process has some rows of the linear problem, with their norms, magnitudes and outputs."""
        return self.style == "colwise"

    @property
    def norm_group(self) -> Any:
        """The process group that has to sum up a norm's squares, or None."""
        return None if self.of_rows else self.group

    def rows(self, own: Tensor, count: int) -> Any:
        """Return this process's elements as part of a vector of `count` elements."""
        from torch.distributed.tensor import DTensor, Shard

        return DTensor.from_local(own, self.mesh, [Shard(0)], run_check=False, shape=torch.Size([count]), stride=(1,))

    def columns(self, whole: Tensor) -> Tensor:
        """Return this process's columns of a matrix, as transformers cuts it."""
        from torch.distributed.tensor import Shard, distribute_tensor

        cut: Any = distribute_tensor(whole.detach(), self.mesh, [Shard(1)], src_data_rank=None)
        own: Tensor = cut.to_local()
        return own


def split_of(layer: Any) -> Split | None:
    """Return how the layer is split, or None if it is not, or if its parts cannot be read now (under FSDP2)."""
    base = layer._modules["base_layer"]
    own = base.__dict__
    style, mesh = own.get(_STYLE), own.get(_MESH)
    if style not in STYLES or mesh is None:
        return None
    weight = base._parameters.get("weight")
    return Split(style, mesh) if getattr(weight, "device_mesh", None) == mesh else None


def is_split(layer: Any) -> bool:
    """True if the layer is split, whether or not its parts can be read."""
    return _STYLE in layer._modules["base_layer"].__dict__


def problem(base: Any) -> str | None:
    """Return the reason why a tensor-parallel base layer cannot be adapted, or None."""
    style = base.__dict__.get(_STYLE)
    if style is None:
        return None
    if style not in STYLES:
        return f"its tensor-parallel style is {style!r}; expected one of {', '.join(STYLES)}"
    if type(base._parameters.get("weight")) in (nn.Parameter, Tensor):
        return "it is tensor-parallel without DTensors; that needs transformers 5.17 or later"
    return None


class Cut(NamedTuple):
    """How tensor parallelism cuts every expert of a stack ``[E, ., .]``."""

    group: Any
    dim: int
    """The dimension of the parameter that is cut: 1 or 2."""
    own: Tensor
    """This process's elements along it: packed ones (gate and up in one matrix) have two ranges."""
    size: int

    def take(self, tensor: Any, dim: int) -> Any:
        """Return this process's elements of a whole tensor: a view of one range."""
        if tensor is None:
            return None
        first, count = int(self.own[0]), len(self.own)
        if int(self.own[-1]) - first == count - 1:
            return tensor.narrow(dim, first, count)
        return tensor.index_select(dim, self.own.to(tensor.device))


def cut_of(module: Any, parameter: Any) -> Cut | None:
    """Return how a parameter of a module of experts is cut, or None if it is not, or is cut in another way."""
    mesh = getattr(parameter, "device_mesh", None)
    if mesh is None or mesh.ndim != 1 or parameter.dim() != 3 or not is_parallel(module.__dict__.get("forward")):
        return None
    (placement,) = parameter.placements
    if not hasattr(placement, "dim"):
        return None
    dim, packed = placement.dim % 3, getattr(placement, "split_factor", 1)
    size, count, rank = parameter.shape[dim], mesh.size(), mesh.get_local_rank()
    parts = torch.arange(size).view(packed, -1).chunk(count, 1)
    return Cut(mesh.get_group(), dim, parts[rank].flatten(), size) if dim and rank < len(parts) else None


def form_of(layer: Any, adapter: str) -> Form:
    """Return the options of an adapter's norm, of a patched layer."""
    return Form(layer.scaling[adapter], group=getattr(layer, "norm_group", None))  # another thread may restore it


def agreed(base: Any, own: bool) -> bool:
    """True if `own` is in every process that has a part of this base layer."""
    mesh = base.__dict__.get(_MESH)
    return own if mesh is None else all_true(mesh.get_group(), [own], base.weight.device)[0]


def part(tensor: Any) -> Any:
    """Return this process's part of a tensor. Its gradient reaches the parameter."""
    if tensor is None or not hasattr(tensor, "to_local"):
        return tensor
    own = tensor.to_local()
    if own.grad_fn is None:  # it may be the parameter's own, which is pickled with it
        own = own.detach()
    setattr(own, PARAMETER, tensor)
    return own


def write(parameter: Tensor, value: Tensor) -> Tensor:
    """Return a split parameter's ``data`` after writing `value` into it; for any other, return `value` as it is.

    Setting the ``data`` of a DTensor leaves this process's part as it was.
    """
    if not hasattr(parameter, "to_local"):
        return value
    part(parameter).data.copy_(part(value))
    return parameter.data


def like(whole: Any, own: Tensor) -> Any:
    """Return `own` as this process's part of a tensor that is split as `whole` is."""
    if not hasattr(whole, "to_local"):
        return own
    from torch.distributed.tensor import DTensor

    options = {"run_check": False, "shape": whole.shape, "stride": whole.stride()}
    return DTensor.from_local(own, whole.device_mesh, whole.placements, **options)


_LOCAL = "_dora_kernels_local_features"


def mend(model: nn.Module) -> bool:
    """Tell split lora_A and lora_B the number of features of all processes together; False if no layer is split.

    transformers needs that, and PEFT (0.21) gives them their own part's: plain LoRA raises in row-parallel layers.
    """
    for module in _split_factors(model):
        outputs, inputs = module.weight.shape
        if (module.in_features, module.out_features) != (inputs, outputs):
            setattr(module, _LOCAL, (module.in_features, module.out_features))
            module.in_features, module.out_features = inputs, outputs
    return any(isinstance(layer, lora.LoraLayer) and is_split(layer) for layer in model.modules())


def undo_mend(model: nn.Module) -> None:
    """Undo `mend`."""
    for module in _split_factors(model):
        if _LOCAL in vars(module):
            module.in_features, module.out_features = vars(module).pop(_LOCAL)


def _split_factors(model: nn.Module) -> Iterator[Any]:
    layer: Any
    for layer in model.modules():
        if isinstance(layer, lora.LoraLayer) and _STYLE in layer.get_base_layer().__dict__:
            for module in (*layer.lora_A.values(), *layer.lora_B.values()):
                if is_parallel(vars(module).get("forward")):
                    yield module


def is_parallel(forward: Any) -> bool:
    """True for the forward that transformers gives to a split module."""
    return getattr(forward, "__qualname__", "") == "TensorParallelLayer.install_forward.<locals>.tp_forward"


def holds_parallel(module: nn.Module) -> bool:
    """True if the module, or one in it, has a forward that transformers gave it to run it in parallel."""
    forwards = (vars(one).get("forward") for one in module.modules())
    return any(getattr(forward, "__module__", "").startswith("transformers.distributed.") for forward in forwards)
