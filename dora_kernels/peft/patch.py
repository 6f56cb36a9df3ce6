"""`patch_peft` runs the DoRA layers of one PEFT model on this package; `patch_peft_globally` those of later models."""

from __future__ import annotations

import functools
import logging
import weakref
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import peft
import torch
from peft.tuners import lora
from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from dora_kernels.engine.dispatch import norm_backend, warn_once
from dora_kernels.engine.merged import check_forward, check_merged_dtype
from dora_kernels.engine.model_forward import ask_once
from dora_kernels.peft import calls, experts, gptq, registered, shards, stacks, tensor_parallel
from dora_kernels.peft.check import check_layers
from dora_kernels.peft.config import (
    NORMS,
    configs_of,
    follow_configs,
    forget_grouped_norm,
    read_from_files,
    set_grouped_norm,
)
from dora_kernels.peft.exact_init import Rewritten, rewrite_magnitudes, undo
from dora_kernels.peft.kinds import LoraModel, out_of_reach, patch_layers, restore_layers, runs_here, unsupported
from dora_kernels.peft.linear import DoraLinear
from dora_kernels.peft.state import Options, dora_adapters, switch
from dora_kernels.peft.targets import left_out

logger = logging.getLogger("dora_kernels")

TESTED = (0, 17), (0, 21)
"""The first and the last minor version of PEFT that the tests run with."""


class PatchHandle:
    """Lists what a patch reached, and undoes it. `patched` and `skipped` are read from the models at each access.

    Names are those of `named_modules`. If there are several models, each name starts with the model's class and number.
    """

    def __init__(self, undo: Callable[[], None] | None = None) -> None:
        self._models: weakref.WeakKeyDictionary[nn.Module, Callable[[], None]] = weakref.WeakKeyDictionary()
        """Each model, with a function that removes its hooks."""
        self._calls: list[calls.Record] = []
        self._tuners: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self._undo = undo
        self._rewritten: list[Rewritten] = []

    @property
    def rewritten(self) -> list[str]:
        """The magnitudes that ``exact_init`` rewrote: names of layers, each with the adapter's."""
        return [each.name for each in self._rewritten]

    @property
    def patched(self) -> list[str]:
        """Names of the DoRA layers whose calls run on this package, including those of adapters added later.

        The list shows this moment. FSDP2 gathers tensors only for the duration of a call, so layers that it has sharded
        are listed in `skipped` although their calls run on this package.
        """
        return [name for name, reason in self._reasons() if reason is None]

    @property
    def skipped(self) -> dict[str, str]:
        """Names of the DoRA layers whose calls do not run on this package, each with the reason."""
        return {name: reason for name, reason in self._reasons() if reason is not None}

    def restore(self) -> None:
        """Restore every model, unmerged. Calling it twice does nothing."""
        if self._undo is not None:
            self._undo()
        for model, without_hooks in list(self._models.items()):
            without_hooks()
            restore_layers(model)
            forget_grouped_norm(configs_of(model))
        undo(self._rewritten)
        self._rewritten = []
        for tuner in list(self._tuners):
            if type(tuner) is LoraModel:
                tuner.__class__ = lora.LoraModel
                forget_grouped_norm(tuner.peft_config)

    def _never_called(self) -> list[str]:
        """A warning for each model none of whose layers has ever been called."""
        return [text for record in self._calls if (text := record.warning()) is not None]

    def __repr__(self) -> str:
        waits = not self._models and any(one.handle is self for one in _on)
        of = ", of models made from now on" if waits else ""
        return f"PatchHandle(patched={len(self.patched)}, skipped={len(self.skipped)}{of})"

    def _add(self, model: nn.Module) -> None:
        if model not in self._models:
            record, unwatch = calls.watch(model)
            unask = ask_once(model)

            def without_hooks() -> None:
                unwatch()
                unask()

            self._calls.append(record)
            self._models[model] = without_hooks

    def _rewrite(self, model: nn.Module) -> None:
        rewritten = rewrite_magnitudes(model)
        self._rewritten += rewritten
        logger.info("gave %d fresh magnitudes of %s their exact norm", len(rewritten), type(model).__name__)

    def _take(self, tuner: nn.Module) -> None:
        if type(tuner) is lora.LoraModel:
            tuner.__class__ = LoraModel
        if type(tuner) is LoraModel:
            self._tuners.add(tuner)

    def _reasons(self) -> Iterator[tuple[str, str | None]]:
        """Yield each DoRA layer's name and why its calls do not run on this package, None if they do."""
        models = list(self._models)
        for number, model in enumerate(models):
            prefix = f"{type(model).__name__} {number}: " if len(models) > 1 else ""
            layers = _layers(model)
            read = calls.read_by_others(model, layers)
            for name, layer in layers.items():
                yield prefix + name, read.get(name) or out_of_reach(layer)


def patch_peft(
    model: nn.Module,
    *,
    dropout: str = "peft",
    exact_init: bool = False,
    keep_unmerged: bool = True,
    grouped_norm: str | None = None,
    forward: str = "composed",
) -> PatchHandle:
    """Run the DoRA layers of a PEFT model on this package: same parameters, same files, same numbers, less time.

    Call it after `get_peft_model` or loading, and before a Trainer, ``accelerator.prepare`` or `torch.compile`. The
    patch is per model. It is safe to call twice: the options of the last call count. What cannot be patched stays with
    PEFT and is listed in `PatchHandle.skipped`. A version of PEFT outside `TESTED` is warned about.

    Args:
        model: a `PeftModel`, or any module with PEFT adapters injected.
        dropout: "peft" takes PEFT's formula where dropout is active. It applies dropout to part of the base product too
            and needs a second base product. "lora" applies dropout to the low-rank branch only, as torchtune and
            axolotl do, and needs one. Without dropout, and in evaluation, they are the same. Embeddings have no
            dropout.
        exact_init: give fresh magnitudes the float32 norm of the base weight, so that a fresh adapter changes nothing.
            PEFT computes them in the base dtype, up to 3.5e-3 off in bfloat16. A magnitude is rewritten only if B is 0
            and it is bit for bit PEFT's own start; `PatchHandle.rewritten` lists them.
        keep_unmerged: let ``merge_adapter`` keep a copy of each unmerged weight on the CPU, so that unmerging is exact.
        grouped_norm: "peft", PEFT's norm of grouped convolutions, or "exact", the norm of what they compute. Saved
            adapters record "exact". `patch_peft_globally` reads it from their files; elsewhere give it again, since
            PEFT drops it with a warning. None takes what an adapter's configuration says, and PEFT's norm if it says
            nothing.
        forward: "composed", or "merged" for linear layers that write ``g * (W + s B A)`` once per optimizer step and
            multiply by that: faster from about half as many tokens per step as a layer has features on, at high rank
            above all, for another copy of each weight (docs/merged.md).

    Returns:
        The handle, with `patched`, `skipped`, `rewritten` and `restore()`.

    Raises:
        TypeError: `model` is not an `nn.Module`, or `exact_init` or `keep_unmerged` is not a bool.
        ValueError: `dropout`, `grouped_norm` or `forward` has another value; there is nothing to patch; `forward` is
            "merged" and a linear layer is tensor-parallel, or multiplies in a dtype in which it is not offered; or a
            layer is merged, on the meta device, without its magnitude, or not finite. The message names the layer and
            the reason. The model is unchanged.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    options = _options(dropout, exact_init, keep_unmerged, grouped_norm, forward)
    _warn_of_version()
    _check_something_to_patch(model)
    check_layers(model)
    if forward == "merged":
        _check_merged(model)
    calls.warn_of(calls.read_by_others(model, _layers(model)), model)  # before anything changes: it may be an error
    patch_layers(model, options)
    configs = configs_of(model)
    if grouped_norm is not None:
        set_grouped_norm(configs, grouped_norm)
    follow_configs(model, configs)
    handle = PatchHandle()
    handle._add(model)
    for module in model.modules():
        handle._take(module)
    if exact_init:
        handle._rewrite(model)
    patched, skipped = handle.patched, handle.skipped
    logger.info(
        "patched %d DoRA layers of %s, skipped %d, backend %s",
        len(patched), type(model).__name__, len(skipped), _backend(model),
    )  # fmt: skip
    return handle


class _Globally(NamedTuple):
    """One active `patch_peft_globally`."""

    handle: PatchHandle
    options: Options
    exact_init: bool
    grouped_norm: str | None
    report: Callable[[str], None] = logger.info


_on: list[_Globally] = []
"""The active ones; the options of the last are used."""


def patch_peft_globally(
    *, dropout: str = "peft", exact_init: bool = False, keep_unmerged: bool = True, grouped_norm: str | None = None
) -> PatchHandle:
    """Do what `patch_peft` does for every PEFT model made afterwards, for frameworks that build the model themselves.

    All functions of PEFT that make an adapter (`get_peft_model`, `load_adapter`, `inject_adapter_in_model`, the
    integrations of transformers and diffusers) call ``BaseTuner.inject_adapter``, and this wraps it. Models without
    DoRA layers are left alone. `PatchHandle.restore` restores every model that is still alive and ends the wrapping.
    Called twice, the options of the last call count for models made from then on, until it is restored.

    While it is on, DoRA also works on GPTQ, AWQ, EETQ and AQLM layers, where PEFT does not allow it. These stay
    patched.

    Args:
        dropout: as `patch_peft`.
        exact_init: as `patch_peft`.
        keep_unmerged: as `patch_peft`.
        grouped_norm: as `patch_peft`.

    Returns:
        The handle of all models made while it is on. Until the first of them is made it counts 0 layers.

    Raises:
        TypeError: `exact_init` or `keep_unmerged` is no bool.
        ValueError: `dropout` or `grouped_norm` is no such choice.
    """
    options = _options(dropout, exact_init, keep_unmerged, grouped_norm)
    _warn_of_version()
    handle = PatchHandle(lambda: _off(handle))
    if not _on:
        _wrap_inject_adapter()
    _on.append(_Globally(handle, options, exact_init, grouped_norm))
    return handle


def patch_and_report(report: Callable[[str], None], **options: Any) -> PatchHandle:
    """`patch_peft_globally`, with one line to `report` for each model that it patches."""
    handle = patch_peft_globally(**options)
    _on[-1] = _on[-1]._replace(report=report)
    return handle


def _off(handle: PatchHandle) -> None:
    _on[:] = [one for one in _on if one.handle is not handle]
    if not _on:
        while _unwrap:
            _unwrap.pop()()


_unwrap: list[Callable[[], None]] = []


def _wrap_inject_adapter() -> None:
    original = BaseTuner.inject_adapter
    exchange = not registered.available()

    @functools.wraps(original)
    def inject_adapter(self: BaseTuner, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        if not _on:
            return original(self, model, *args, **kwargs)
        tensor_parallel.check_targets(self, model, *args, **kwargs)
        stacks.check_targets(self, model, *args, **kwargs)
        warn_of_left_out = left_out(self, model, *args, **kwargs)
        with tensor_parallel.whole_parameters():
            original(self, model, *args, **kwargs)
        warn_of_left_out()
        if not _on or not any(map(_concerns, model.modules())):
            return
        handle, options, exact_init, grouped_norm, report = _on[-1]
        patch_layers(model, options, exchange_linear=exchange)
        if grouped_norm is not None:
            set_grouped_norm(self.peft_config, grouped_norm)
        follow_configs(model, self.peft_config)
        handle._add(model)
        if exchange:
            handle._take(self)
        if exact_init:
            handle._rewrite(model)
        # The weights themselves may still be on meta. Which layers are patched is what counts.
        layers = _layers(model)
        read = calls.read_by_others(model, layers)
        others = [
            reason for name, layer in layers.items()
            if (reason := read.get(name) or (unsupported(layer) if switch(layer) is None else None)) is not None
        ]  # fmt: skip
        calls.warn_of(read, model)
        left = f", left {len(others)} to PEFT ({others[0]})" if others else ""
        done = len(layers) - len(others)
        report(f"patched {done} DoRA layers of {type(model).__name__}, backend {_backend(model)}{left}")

    def unwrap() -> None:
        # If another wrapper was put on top, this one stays in the chain and does nothing from now on.
        if BaseTuner.inject_adapter is inject_adapter:
            BaseTuner.inject_adapter = original

    _unwrap.extend([gptq.allow(), experts.allow(), tensor_parallel.allow(), read_from_files(), unwrap])
    _unwrap.extend([] if exchange else [registered.register()])
    BaseTuner.inject_adapter = inject_adapter


def _layers(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if runs_here(module)}


def _concerns(layer: Any) -> bool:
    """True if a patch changes something for a layer: it runs it, or mends PEFT's plain LoRA on a split one."""
    return runs_here(layer) or (isinstance(layer, lora.LoraLayer) and shards.split_of(layer) is not None)


def _warn_of_version() -> None:
    version = tuple(int(part) for part in peft.__version__.split(".")[:2])
    first, last = (".".join(map(str, each)) for each in TESTED)
    if not TESTED[0] <= version <= TESTED[1]:
        warn_once(f"dora_kernels is tested with peft {first} to {last}, and this is {peft.__version__}")


def _options(
    dropout: str, exact_init: bool, keep_unmerged: bool, grouped_norm: str | None, forward: str = "composed"
) -> Options:
    check_forward(forward)
    if dropout not in ("peft", "lora"):
        raise ValueError(f"dropout: expected 'peft' or 'lora', got {dropout!r}")
    if grouped_norm not in (None, *NORMS):
        raise ValueError(f"grouped_norm: expected 'peft' or 'exact', got {grouped_norm!r}")
    for name, value in (("exact_init", exact_init), ("keep_unmerged", keep_unmerged)):
        if not isinstance(value, bool):
            raise TypeError(f"{name}: expected a bool, got {type(value).__name__}")
    return Options(dropout, forward, keep_unmerged)


def _check_merged(model: nn.Module) -> None:
    """Check that the weights of all linear layers may be merged."""
    for name, layer in model.named_modules():
        if type(layer) in (lora.Linear, DoraLinear) and dora_adapters(layer):
            if shards.is_split(layer):
                raise ValueError(f"forward: expected 'composed', since {name} is tensor-parallel, got 'merged'")
            weight = getattr(layer.get_base_layer(), "weight", None)
            check_merged_dtype(getattr(weight, "dtype", None), f"{name}.base_layer.weight")
        elif isinstance(layer, lora.LoraLayer) and dora_adapters(layer):
            check_merged_dtype(getattr(layer.base_layer, "compute_dtype", None), f"{name}.base_layer.compute_dtype")


def _check_something_to_patch(model: nn.Module) -> None:
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, lora.LoraLayer)]
    if not layers:
        raise ValueError(
            "model: nothing to patch, it has no LoRA layers; "
            "call peft.get_peft_model(model, LoraConfig(use_dora=True, ...)) first"
        )
    dora = [(name, layer) for name, layer in layers if runs_here(layer)]
    if not dora and any(_concerns(layer) for _, layer in layers):
        return
    if not dora:
        raise ValueError(
            f"model: nothing to patch, none of its {len(layers)} LoRA layers has a DoRA adapter; "
            "set use_dora=True in the LoraConfig"
        )
    reasons = [(name, unsupported(layer)) for name, layer in dora]
    if all(reason is not None for _, reason in reasons):
        name, reason = reasons[0]
        raise ValueError(f"model: nothing to patch, none of its {len(dora)} DoRA layers is supported; {name}: {reason}")


def _backend(model: nn.Module) -> str:
    parameter = next(model.parameters())
    return norm_backend("auto", torch.empty(0, device=parameter.device)) if parameter.device.type != "meta" else "auto"
