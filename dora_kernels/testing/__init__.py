"""Problems, a float64 reference and error budgets, to test a DoRA layer or kernel against.

The tests of this package, ``dora-kernels parity`` and the benchmarks use this module, and so can a kernel of your own:

    from dora_kernels import testing

    problem = testing.make_problem((7,), 51, 45, rank=3, dtypes=testing.all_of("bf16"))
    results = testing.solve(my_dora_linear, problem)     # the output and every gradient
    testing.check(results, problem)                      # AssertionError if one exceeds its budget

The reference (`oracle`) is `dora_kernels.core.reference`, evaluated in float64 on the numbers as they are stored.

**The budget** (`budgets`). The distance of a result from the reference, in the Frobenius norm, may be twice the largest
of

* the distance of a baseline, by default `eager`: the same layer in plain PyTorch operations, in the same dtypes,
  differentiated by autograd;
* the change of the reference's answer when every input moves by a random relative amount of up to one eps of the
  compute dtype: half an eps for the inputs' own rounding, and as much again for the intermediate results, which are
  rounded too. This is the worst of several tries. It is what rounding does to the problem whatever the algorithm, and
  it matters if the baseline is exact by luck, as a result of a single number may be;
* for the full gradient, which is the detached one minus a part of it, the same change of the detached one: if the
  difference is small, the errors are those of the two terms;
* for a 16-bit weight, the change of the reference's answer when the norm moves by its own bound (`norm_bound`).

Twice, because two evaluations that round in different places have independent errors of about the same size, and a
norm of a few elements varies by nearly that factor. In float64 the reference's own error is as large as theirs: twice
again.

**For whole models** (`limits`), where only a baseline's results are known: four times the baseline's relative error,
and sixteen times that of its worst row.
"""

from __future__ import annotations

from dora_kernels.core.reference import weight_norm
from dora_kernels.core.scale import magnitude_scale
from dora_kernels.testing.accuracy import (
    ROW,
    beyond,
    budgets,
    check,
    distance,
    eager,
    error,
    errors,
    exact_merge,
    limits,
    norm_bound,
    norm_error,
    oracle,
    same_bits,
    true_norm,
)
from dora_kernels.testing.problems import (
    DTYPES,
    NAMES,
    Problem,
    all_of,
    gradients,
    leaves_of,
    make_problem,
    solve,
    widened,
)

__all__ = [
    "DTYPES", "NAMES", "ROW", "Problem", "all_of", "beyond", "budgets", "check", "distance", "eager", "error", "errors",
    "exact_merge", "gradients", "leaves_of", "limits", "magnitude_scale", "make_problem", "norm_bound", "norm_error",
    "oracle", "same_bits", "solve", "true_norm", "weight_norm", "widened",
]  # fmt: skip
