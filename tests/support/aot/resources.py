"""The targets, their limits, and what a compiled kernel may ask of them."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

KIB = 1024


@dataclass(frozen=True)
class Target:
    """An architecture: how triton names it, and what one block or thread may use."""

    name: str
    backend: str
    arch: int | str
    warp_size: int
    shared_limit: int
    matrix: str
    """The matrix instruction of small tiles."""
    matrix_large: str | None = None
    """That of tiles of at least 64 rows, where it is another."""

    @property
    def cuda(self) -> bool:
        return self.backend == "cuda"


# Shared memory of one block: CUDA programming guide, table of compute capabilities; 64 KiB of LDS on AMD.
TARGETS = {
    target.name: target
    for target in (
        Target("sm_80", "cuda", 80, 32, 163 * KIB, "HMMA"),
        Target("sm_86", "cuda", 86, 32, 99 * KIB, "HMMA"),
        Target("sm_89", "cuda", 89, 32, 99 * KIB, "HMMA"),
        Target("sm_90", "cuda", 90, 32, 227 * KIB, "HMMA", "HGMMA"),
        Target("sm_100", "cuda", 100, 32, 227 * KIB, "HMMA", "UTCHMMA"),
        Target("sm_120", "cuda", 120, 32, 99 * KIB, "HMMA"),
        Target("gfx942", "hip", "gfx942", 64, 64 * KIB, "v_mfma"),
        Target("gfx1100", "hip", "gfx1100", 32, 64 * KIB, "v_wmma"),
    )
}
REGISTER_FILE = 65536  # 32-bit registers a CUDA block may use, on every target
TENSOR_MEMORY = 512  # columns of it on sm_100


@dataclass
class Compiled:
    """One launch compiled for one target. Figures that could not be read are None, and `error` or `unread` says why."""

    target: str
    kernel: str
    dtypes: str
    case: str
    config: dict[str, Any]
    shared: int | None = None
    registers: int | None = None
    stack: int | None = None
    """Bytes of local memory per thread (CUDA) or of scratch per lane (AMD)."""
    spills: int | None = None
    """Local loads and stores in the code (CUDA); spilled registers (AMD)."""
    matrix: dict[str, int] = field(default_factory=dict)
    tensor_memory: int = 0
    error: str | None = None
    """Why it does not compile."""
    unread: str | None = None
    """Why the machine code could not be read, where it does compile."""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def title(self) -> str:
        config = " ".join(f"{name}={value}" for name, value in self.config.items())
        return f"{self.target} {self.kernel} {self.dtypes} ({self.case}; {config})"


_PRODUCT_ROWS = {
    "weight_norm": "BLOCK_N", "factored_norm": "BLOCK_N", "merge": "BLOCK_N",
    "compose": "BLOCK_M", "product": "BLOCK_M", "one_pass": "BLOCK_M", "finish": "BLOCK_M", "scale_reduce": "BLOCK_F",
}  # fmt: skip


def expected_matrix(launch: Compiled) -> str | None:
    """The matrix instruction that the launch should use; None for a kernel without a product."""
    target = TARGETS[launch.target]
    rows = _PRODUCT_ROWS.get(launch.kernel)
    if rows is None or launch.config.get("PRODUCTS") == 0:
        return None
    return target.matrix_large if target.matrix_large and launch.config[rows] >= 64 else target.matrix


def problems(launch: Compiled) -> list[str]:
    """Why the launch must not ship: nothing where it fits, does not spill and uses the matrix units."""
    target = TARGETS[launch.target]
    if launch.error is not None:
        return [f"does not compile: {launch.error}"]
    found = []
    if launch.shared is None or launch.shared > target.shared_limit:
        found.append(f"asks for {launch.shared} bytes of shared memory, {target.shared_limit} are there")
    if launch.tensor_memory > TENSOR_MEMORY:
        found.append(f"asks for {launch.tensor_memory} columns of tensor memory, {TENSOR_MEMORY} are there")
    if launch.unread is not None:
        return found
    if target.cuda:
        if launch.stack != 0 or launch.spills != 0:
            found.append(f"spills: {launch.stack} bytes of stack, {launch.spills} local loads and stores")
        threads = launch.config["num_warps"] * target.warp_size
        if launch.registers is None or launch.registers * threads > REGISTER_FILE:
            found.append(f"asks for {launch.registers} registers in each of {threads} threads")
    wanted = expected_matrix(launch)
    if wanted is not None and not launch.matrix.get(wanted):
        found.append(f"has no {wanted}, but {launch.matrix or 'no matrix instruction'}")
    return found
