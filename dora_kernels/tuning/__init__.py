"""Measure, on the user's own machine, the choices that are otherwise made by a model or on another machine."""

from dora_kernels.tuning.measure import Tuned, tune

__all__ = ["Tuned", "tune"]
