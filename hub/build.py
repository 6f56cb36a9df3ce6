"""Write this package's core as a kernel for Hugging Face's Hub, as the `kernels` package (0.17) loads it.

    python hub/build.py OUT [--version N]

OUT becomes a kernel repository: ``build/torch-BACKEND/`` for each of `BACKENDS`, all with the same Python and Triton
files. They are the package's own modules with two mechanical changes: imports become relative, and the ops get a
namespace that no other version of the kernel has. ``metadata.json`` lists a digest of every file.
"""

import argparse
import base64
import hashlib
import json
import re
import shutil
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "dora_kernels"
PARTS = ("core", "engine", "kernels", "functional.py", "rounding.py")
LEFT_OUT = {"core/reference.py", "core/expressions.py", "core/patterns.py", "engine/model_forward.py"}
"""The oracle, and what only models and files need."""
BACKENDS = ("cpu", "cuda", "rocm", "xpu")
INIT = '''"""DoRA at the price of LoRA: functions, and layers for `kernelize`. Made from dora_kernels {version}."""

from . import layers
from .engine.dispatch import UnsupportedError
from .functional import dora_linear, dora_weight_norm, merge_dora

__version__ = "{version}"
__all__ = ["UnsupportedError", "dora_linear", "dora_weight_norm", "layers", "merge_dora"]
'''
CARD = """---
license: apache-2.0
tags:
- kernels
---

# dora-kernels

DoRA's linear layer, its weight norm and its merged weight, in PyTorch and Triton, and the layer `DoraLinear` for PEFT's
`DoraLinearLayer`. Made by `make hub` from dora_kernels {version}; its documentation says when to use which.

```python
from kernels import get_kernel

dora = get_kernel("OWNER/dora-kernels", version={number})
y = dora.dora_linear(x, weight, lora_A, lora_B, magnitude, bias, scaling=2.0)
```
"""


def converted(text: str, module: Path, namespace: str) -> str:
    """A module's text with relative imports and its ops in `namespace`."""
    up = "." * len(module.parts)
    text = re.sub(r"^(\s*)from dora_kernels import (\w+)", rf"\1from {up} import \2", text, flags=re.MULTILINE)
    text = re.sub(r"^(\s*)from dora_kernels\.([\w.]+) import", rf"\1from {up}\2 import", text, flags=re.MULTILINE)
    for before in ('"{}::', "torch.ops.{}.", 'Library("{}"'):
        text = text.replace(before.format("dora_kernels"), before.format(namespace))
    left = re.search(r"^\s*(import|from) dora_kernels|(import_module\(f?|modules\[).dora_kernels", text, re.MULTILINE)
    if left is not None:
        raise ValueError(f"{module}: {left[0].strip()!r} is not converted")
    return text


def sources(namespace: str, version: str) -> dict[str, str]:
    """Every file of a variant, by its path."""
    files = {"__init__.py": INIT.format(version=version), "layers.py": (ROOT / "hub" / "layers.py").read_text()}
    for part in PARTS:
        path = PACKAGE / part
        for module in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            name = module.relative_to(PACKAGE)
            if str(name) not in LEFT_OUT:
                files[str(name)] = converted(module.read_text(encoding="utf-8"), name, namespace)
    return files


def write(out: Path, number: int) -> None:
    """Write the repository."""
    version = re.search(r'^__version__ = "(.+)"', (PACKAGE / "__init__.py").read_text(), re.MULTILINE)[1]
    digest = hashlib.sha256("".join(sources("", version).values()).encode()).hexdigest()[:12]
    name = f"_dora_kernels_{digest}"
    with tempfile.TemporaryDirectory(dir=out.parent) as temporary:
        repository = Path(temporary) / "repository"
        for backend in BACKENDS:
            variant, files = repository / "build" / f"torch-{backend}", sources(f"{name}_{backend}", version)
            for path, text in files.items():
                (variant / path).parent.mkdir(parents=True, exist_ok=True)
                (variant / path).write_text(text, encoding="utf-8")
            digests = {path: base64.b64encode(hashlib.sha256(text.encode()).digest()) for path, text in files.items()}
            metadata = {
                "name": "dora-kernels", "id": f"{name}_{backend}", "version": number, "license": "apache-2.0",
                "python-depends": [], "backend": {"type": backend},
                "digest": {"algorithm": "sha256", "files": {path: digests[path].decode() for path in sorted(digests)}},
            }  # fmt: skip
            (variant / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")
        (repository / "README.md").write_text(CARD.format(version=version, number=number))
        if out.exists():
            shutil.rmtree(out)
        shutil.move(repository, out)


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--version", type=int, default=1, help="the kernel's version on the Hub")
    given = parser.parse_args()
    if given.out.exists() and not (given.out / "build").is_dir() and any(given.out.iterdir()):
        parser.error(f"{given.out} has other files in it")
    given.out.parent.mkdir(parents=True, exist_ok=True)
    write(given.out.resolve(), given.version)
    print(f"wrote {given.out}: {', '.join(f'torch-{backend}' for backend in BACKENDS)}")


if __name__ == "__main__":
    main()
