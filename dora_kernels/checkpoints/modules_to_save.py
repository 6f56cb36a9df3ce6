"""Tensors in an adapter's file beside the adapter: PEFT's ``modules_to_save``, biases and ``trainable_token_indices``.

PEFT (utils/save_and_load.py, utils/other.py, tuners/trainable_tokens/layer.py) saves a trained module as a whole, under
its name in the model. For trained tokens it saves the rows, ``<embedding>.token_adapter.trainable_tokens_delta``, which
replace those of the embedding. If an embedding is adapted, PEFT also saves it as ``<embedding>.base_layer.weight``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dora_kernels.adapters import Adapter
from dora_kernels.adapters.experts import split_weight
from dora_kernels.adapters.load import Contents
from dora_kernels.checkpoints.checkpoint import Checkpoint, is_embedding, tied
from dora_kernels.core.shown import quoted
from dora_kernels.files import storage

_ROWS = ".trainable_tokens_delta"


@dataclass
class TrainedTensors:
    """The tensors that replace a checkpoint's, in their dtypes.

    Attributes:
        whole: tensors by key.
        rows: indices and rows, by the tensor's key.
        added: tensors of trained modules that the checkpoint does not have, in their own dtypes.
    """

    whole: dict[str, Tensor] = field(default_factory=dict)
    rows: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    added: dict[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.whole) + len(self.rows) + len(self.added)

    def __iter__(self) -> Iterator[str]:
        return iter((*self.whole, *self.rows, *self.added))

    def put(self, tensors: dict[str, Tensor]) -> None:
        """Put them in the place of a shard's tensors."""
        tensors.update({key: tensor for key, tensor in self.whole.items() if key in tensors})
        for key in self.rows.keys() & tensors.keys():
            tensors[key] = tensors[key].index_copy(0, *self.rows[key])


def trained_beside(
    checkpoint: Checkpoint, found: Contents, adapter: Adapter, keys: Mapping[str, str]
) -> TrainedTensors:
    """Return the tensors trained beside an adapter, except those that the checkpoint has bit for bit.

    Args:
        checkpoint: the base model.
        found: the keys of the adapter's file.
        adapter, keys: the results of `read_for`.

    Raises:
        ValueError: a tensor is neither in the checkpoint nor in ``modules_to_save``, has another size, is not finite,
            or belongs to an embedding that is tied to the output layer; or nothing says which tokens the rows belong
            to.
    """
    others, trained = set(found.others), TrainedTensors()
    for key, tensor in storage.read_tensors(found.file, others.__contains__).items():
        if tensor.is_floating_point():
            storage.check_tensor(found.file, key, tensor)
        name = key.removeprefix("base_model.model.").replace(".base_layer.", ".")
        try:
            if name.endswith(_ROWS):
                module = name.removesuffix(_ROWS).removesuffix(".token_adapter")
                _add_rows(trained, checkpoint, adapter, _key(checkpoint, keys, f"{module}.weight"), module, tensor)
            else:
                for one, part in _as_in_files(checkpoint, keys, name, tensor).items():
                    _add(trained, checkpoint, adapter, _key(checkpoint, keys, one), one, part)
        except ValueError as error:
            raise ValueError(f"{found.file}: {key}: {error}; adapter_only=True leaves it out") from None
    return trained


def _key(checkpoint: Checkpoint, keys: Mapping[str, str], name: str) -> str | None:
    return keys.get(name, name if name in checkpoint else None)


def _as_in_files(
    checkpoint: Checkpoint, keys: Mapping[str, str], name: str, tensor: Tensor
) -> Mapping[str, Tensor]:
    """The tensor by its name; or a stack of experts as the files have it, which may be the layers of each expert."""
    parts = split_weight(name, tensor) if _key(checkpoint, keys, name) is None else {}
    return parts if parts and all(_key(checkpoint, keys, one) is not None for one in parts) else {name: tensor}


def _add(
    trained: TrainedTensors, checkpoint: Checkpoint, adapter: Adapter, key: str | None, name: str, tensor: Tensor
) -> None:
    if key is None:
        modules = adapter.config.get("modules_to_save")
        if not any(f".{module}." in f".{name}" for module in (modules if isinstance(modules, list) else [])):
            raise ValueError("the model has no such tensor, and it is in none of the adapter's modules_to_save")
        if any(is_embedding(own) and checkpoint[own].shape == tensor.shape and tied(checkpoint, own)
               for own in checkpoint):  # fmt: skip
            raise ValueError("the model's output layer is tied to its embedding, and merging would untie them")
        trained.added[name] = tensor
        return
    stored = checkpoint[key]
    _check_size(stored, tensor)
    if torch.equal(tensor.to(stored.dtype), stored):
        return
    if is_embedding(key) and tied(checkpoint, key) and not adapter.config.get("ensure_weight_tying"):
        raise ValueError("the model's output layer is tied to this embedding, and would change with it")
    trained.whole[key] = _cast(tensor, stored)


def _add_rows(
    trained: TrainedTensors, checkpoint: Checkpoint, adapter: Adapter, key: str | None, module: str, rows: Tensor
) -> None:
    if key is None:
        raise ValueError("the model has no such embedding")
    said = adapter.config.get("trainable_token_indices")
    if isinstance(said, Mapping):
        said = next((each for name, each in said.items() if f".{module}".endswith(f".{name}")), None)
    stored = checkpoint[key]
    if not isinstance(said, list) or not all(type(index) is int and 0 <= index < len(stored) for index in said):
        wanted = f"expected rows of {key}, which has {len(stored)}"
        raise ValueError(f"trainable_token_indices: {wanted}, got {quoted(said)}")
    if module in adapter.layers:
        raise ValueError("the embedding is also adapted")
    _check_size(stored[: len(said)], rows)
    trained.rows[key] = torch.tensor(said), _cast(rows, stored)


def _check_size(stored: Tensor, tensor: Tensor) -> None:
    if stored.shape != tensor.shape or stored.is_floating_point() != tensor.is_floating_point():
        wanted, got = (f"{list(each.shape)} of {each.dtype}" for each in (stored, tensor))
        raise ValueError(f"expected {wanted}, as the model's, got {got}")


def _cast(tensor: Tensor, stored: Tensor) -> Tensor:
    cast = tensor.to(stored.dtype)
    if not bool(cast.isfinite().all()):
        raise ValueError(f"it has values that are not finite in {stored.dtype}, the model's")
    return cast
