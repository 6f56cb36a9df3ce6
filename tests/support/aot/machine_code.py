"""What compiled kernels ask for, read from their machine code.

NVIDIA's is read by `cuobjdump` and `nvdisasm`, which ship inside the triton package; AMD's from the assembly text.
"""

from __future__ import annotations

import re
import struct
import subprocess
import tempfile
from collections import Counter
from itertools import accumulate
from pathlib import Path
from typing import Any

from aot.resources import TARGETS, Compiled, Target

# Whole mnemonics: `HFMA2.MMA` is ordinary arithmetic.
_MATRIX = re.compile(r"(?<![\w.])(HMMA|HGMMA|UTCHMMA|v_mfma|v_wmma)(?=[._\s])")
_LOCAL = re.compile(r"(?<![\w.])(?:LDL|STL)(?=[.\s])")
_USAGE = re.compile(r"REG:(\d+) STACK:(\d+)")
_ADDRESS = re.compile(r"^\s*/\*([0-9a-f]+)\*/\s+(.*)", re.MULTILINE)


def read(pairs: list[tuple[Compiled, Any]]) -> None:
    """Fill every record with what triton's compiled kernel beside it asks for; all are of one target."""
    for record, compiled in pairs:
        record.shared = compiled.metadata.shared
        record.tensor_memory = getattr(compiled.metadata, "tmem_size", None) or 0
    if not pairs:
        return
    target = TARGETS[pairs[0][0].target]
    if not target.cuda:
        for record, compiled in pairs:
            _read_assembly(compiled.asm["amdgcn"], record)
        return
    try:
        _read_cubins(target, [(record, compiled.asm["cubin"]) for record, compiled in pairs])
    except RuntimeError as error:
        for record, _ in pairs:
            record.unread = str(error)


def _read_cubins(target: Target, pairs: list[tuple[Compiled, bytes]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for record, cubin in pairs:
            path = Path(folder, "kernel.cubin")
            path.write_bytes(cubin)
            usage = _USAGE.search(_tool("cuobjdump", "-res-usage", str(path)))
            if usage is None:
                raise RuntimeError("cuobjdump said nothing about registers")
            record.registers, record.stack = int(usage[1]), int(usage[2])
        # nvdisasm needs a third of a second to start: it is given the code of all kernels, end to end.
        codes = [_code(cubin) for _, cubin in pairs]
        path = Path(folder, "kernels.bin")
        path.write_bytes(b"".join(codes))
        arch = f"SM{target.arch}" + ("a" if int(target.arch) >= 90 else "")
        listing = _tool("nvdisasm", "--no-dataflow", "--binary", arch, str(path))
    starts = [0, *accumulate(len(code) for code in codes)]
    instructions = [(int(found[1], 16), found[2]) for found in _ADDRESS.finditer(listing)]
    for (record, _), start, end in zip(pairs, starts, starts[1:]):
        text = "\n".join(instruction for address, instruction in instructions if start <= address < end)
        if "EXIT" not in text:
            raise RuntimeError("nvdisasm listed no instructions")
        record.spills = len(_LOCAL.findall(text))
        record.matrix = dict(Counter(_MATRIX.findall(text)))


def _code(cubin: bytes) -> bytes:
    """The machine code in an ELF file: its .text section, filled up to whole instructions."""
    table, entry, count, names = struct.unpack_from("<28xQ10xHHH", cubin, 12)
    headers = [struct.unpack_from("<I12xQQQ", cubin, table + i * entry)[::] for i in range(count)]
    name_base = headers[names][2]
    sections = [
        cubin[offset : offset + size]
        for name, _, offset, size in headers
        if cubin[name_base + name :].startswith(b".text")
    ]
    if len(sections) != 1 or len(sections[0]) % 16 != 0:
        raise RuntimeError(f"a cubin with {len(sections)} code sections of {[len(s) for s in sections]} bytes")
    return sections[0]


def _tool(name: str, *arguments: str) -> str:
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    if not path.exists():
        raise RuntimeError(f"triton {triton.__version__} comes without {name}")
    done = subprocess.run([str(path), *arguments], capture_output=True, text=True, timeout=120)
    if done.returncode != 0:
        reason = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()[0]
        raise RuntimeError(f"{name} of triton {triton.__version__} failed: {reason}")
    return done.stdout


def _read_assembly(assembly: str, record: Compiled) -> None:
    def figure(key: str) -> int:
        return int(re.search(rf"^\s*\.{key}:\s*(\d+)", assembly, re.MULTILINE)[1])  # type: ignore[index]

    record.registers = figure("vgpr_count")
    record.stack = figure("private_segment_fixed_size")
    record.spills = figure("vgpr_spill_count") + figure("sgpr_spill_count")
    record.matrix = dict(Counter(_MATRIX.findall(assembly)))
