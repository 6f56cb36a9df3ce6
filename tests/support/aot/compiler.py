"""Ahead-of-time compilation of launches for targets that are not there."""

from __future__ import annotations

import concurrent.futures
import multiprocessing
from collections.abc import Container, Iterable, Iterator
from typing import Any

from aot.launches import shipped
from aot.machine_code import read
from aot.recording import Launch, kernels
from aot.resources import TARGETS, Compiled

_CHUNK = 16  # launches that one worker compiles before it disassembles them together


def compile_launches(target: str, launches: Iterable[Launch]) -> list[Compiled]:
    """Compile for one target; what does not compile is a finding, not an exception."""
    done, compiled = [], []
    for launch in launches:
        record = Compiled(target, launch.kernel, launch.dtypes, launch.case, dict(launch.config))
        done.append(record)
        try:
            compiled.append((record, _compile(target, launch)))
        except Exception as error:  # whatever stops a compiler
            lines = str(error).strip().splitlines() or ["no message"]
            record.error = f"{type(error).__name__}: {lines[0]}"
    read(compiled)
    return done


def compile_shipped(targets: Iterable[str], jobs: int, primitives: Container[str]) -> list[Compiled]:
    """Every shipped launch of some primitives for each target, in `jobs` processes.

    float16 is left out on AMD, where spills are no failure and it takes bfloat16's tiles.
    """
    work = []
    for target in targets:
        launches = [one for one in shipped(every_dtype=TARGETS[target].cuda) if one.primitive in primitives]
        work += [(target, launches[start : start + _CHUNK]) for start in range(0, len(launches), _CHUNK)]
    return [record for chunk in _mapped(work, jobs) for record in chunk]


def _mapped(work: list[tuple[str, list[Launch]]], jobs: int) -> Iterator[list[Compiled]]:
    if jobs <= 1:
        yield from (compile_launches(*item) for item in work)
        return
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["dora_kernels.kernels", "triton.compiler", __name__])
    with concurrent.futures.ProcessPoolExecutor(jobs, mp_context=context) as pool:
        yield from pool.map(compile_launches, *zip(*work))


def _compile(target_name: str, launch: Launch) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, make_backend

    target = TARGETS[target_name]
    gpu = GPUTarget(target.backend, target.arch, target.warp_size)
    backend = make_backend(gpu)
    attributes, constants = {}, {}
    for index, argument in enumerate(launch.arguments):
        # "S": the tensor is under 2 GB, which lets AMD's compiler use its buffer instructions.
        described = ("D" if argument.aligned else "") + ("S" if argument.type.startswith("*") else "")
        if argument.type == "constexpr":
            constants[(index,)] = argument.constant
        elif described:
            attributes[(index,)] = backend.parse_attr(described)
    source = ASTSource(
        fn=kernels()[launch.kernel],
        signature={argument.name: argument.type for argument in launch.arguments},
        constexprs=constants,
        attrs=attributes,
    )
    return triton.compile(source, target=gpu, options=dict(launch.options))
