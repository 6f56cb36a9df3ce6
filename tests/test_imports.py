"""What importing does (nothing), what it needs (torch), and which way imports point: checked in fresh interpreters."""

from __future__ import annotations

import ast
import graphlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dora_kernels

PACKAGE = Path(dora_kernels.__file__).parent


def run(code, **environment):
    """Output of `code`, standard and error, in a new interpreter, which must succeed.

    It inherits only what finds programs and libraries: what importing the package wrote into the environment here would
    hide there that it is written again.
    """
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR", "LD_LIBRARY_PATH") if name in os.environ}
    result = subprocess.run(
        [sys.executable, "-W", "default", "-c", code],
        env={**kept, "PYTHONPATH": str(PACKAGE.parent), **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout, result.stderr


BLOCKED = """
import sys
for name in ("triton", "peft", "transformers", "numpy", "typer", "rich", "safetensors"):
    sys.modules[name] = None     # import raises ModuleNotFoundError
"""

LAYER = """
import torch, dora_kernels
x, w, a, b = torch.randn(3, 5), torch.randn(4, 5), torch.randn(2, 5, requires_grad=True), torch.randn(4, 2)
m = dora_kernels.dora_weight_norm(w, a, b)
"""


def test_without_triton_peft_or_transformers():
    out, _ = run(BLOCKED + LAYER + """
y = dora_kernels.dora_linear(x, w, a, b, m)
y.sum().backward()
torch.testing.assert_close(y, x @ (w + b @ a).T)
torch.testing.assert_close(dora_kernels.merge_dora(w, a, b, m), w + b @ a)
assert a.grad is not None
try:
    dora_kernels.dora_linear(x, w, a, b, m, backend="triton")
except RuntimeError as error:
    print(type(error).__name__, error)
""")
    assert out.startswith("UnsupportedError backend='triton' cannot be used")
    assert "triton is not installed" in out


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_triton_by_name_on_the_cpu():
    pytest.importorskip("triton")
    out, _ = run(LAYER + """
try:
    dora_kernels.dora_linear(x, w, a, b, m, backend="triton")
except RuntimeError as error:
    print(type(error).__name__, error)
""")
    assert out.startswith("UnsupportedError backend='triton' cannot be used")
    assert "needs a GPU" in out and "cpu" in out


def test_importing_does_nothing():
    """Beyond what importing torch does: no optional package, no environment, no filters, no hooks, no output."""
    out, err = run("""
import os, sys, warnings
import torch
before = set(sys.modules), dict(os.environ), list(warnings.filters), torch.get_default_dtype(), torch.is_grad_enabled()
optimizer = sys.modules["torch.optim.optimizer"]
hooks = len(optimizer._global_optimizer_post_hooks)
import dora_kernels
assert dict(os.environ) == before[1], "the environment changed"
assert list(warnings.filters) == before[2], "the warning filters changed"
assert (torch.get_default_dtype(), torch.is_grad_enabled()) == before[3:]
assert len(optimizer._global_optimizer_post_hooks) == hooks, "a hook was registered"
assert not torch.cuda.is_initialized()
loaded = {name.partition(".")[0] for name in set(sys.modules) - before[0]}
wanted = {"triton", "peft", "transformers", "accelerate", "numpy", "typer", "rich", "safetensors"}
assert not loaded & wanted, f"imported {loaded & wanted}"
assert not any(name.startswith("dora_kernels.kernels") for name in sys.modules)
""")
    assert (out, err) == ("", "")


def test_files_without_safetensors(tmp_path):
    """What is missing is said with the extra that brings it."""
    out, _ = run(BLOCKED + f"""
import torch, dora_kernels
model = torch.nn.Sequential(torch.nn.Linear(2, 2))
dora_kernels.apply_dora(model, rank=1)
open({str(tmp_path / "a.safetensors")!r}, "w").close()
for call in (lambda: dora_kernels.save_adapter(model, {str(tmp_path / "new")!r}),
             lambda: dora_kernels.load_adapter({str(tmp_path / "a.safetensors")!r}, model)):
    try:
        call()
    except ImportError as error:
        print(error.name, error)
""")
    assert out.splitlines() == ["safetensors adapter files need safetensors: pip install 'dora-kernels[files]'"] * 2
    assert [file.name for file in tmp_path.rglob("*.*")] == ["a.safetensors"]


def test_the_patch_without_peft(tmp_path):
    """What is missing is said with its extra, and why what is there cannot be imported."""
    ask = """
import dora_kernels
try:
    dora_kernels.patch_peft
except ImportError as error:
    print(error)
try:
    from dora_kernels.run import main
    main(["-m", "json.tool"])
except SystemExit as error:
    print(error.code)
"""
    out, err = run(BLOCKED + ask)
    missing = "peft: pip install 'dora-kernels[peft]'"
    assert out == f"patch_peft needs {missing}\n2\n" and "peft is not installed" in err
    (tmp_path / "peft.py").write_text("import nowhere")
    out, _ = run(f"import sys; sys.path.insert(0, {str(tmp_path)!r})" + ask.partition("try:\n    from")[0])
    cause = "ModuleNotFoundError: No module named 'nowhere'"
    assert out == f"patch_peft needs peft, which is installed but cannot be imported: {cause}\n"


def test_dir():
    """The public names, lazily loaded ones too, and nothing that is merely imported."""
    out, _ = run("import dora_kernels; print(*dir(dora_kernels))")
    names = out.split()
    assert [name for name in names if not name.startswith("__")] == sorted(dora_kernels.__all__)
    assert {"__version__", "__all__", "__doc__"} <= set(names)


def test_a_star_without_what_is_optional():
    """It names what can be imported: the patch only where PEFT is."""
    out, _ = run(BLOCKED + """
from dora_kernels import *
print(DoRALinear.__name__, load_adapter.__name__, "patch_peft" in globals())
""")
    assert out == "DoRALinear load_adapter False\n"


# Which way imports point: a folder (or a module beside them) may import only from those before it; kernels from nothing
# but themselves. Inside a folder no imports go in a circle.
FOLDERS = (
    "rounding", "core", "kernels", "engine", "functional", "modules", "model", "files", "peft", "adapters",
    "checkpoints", "gguf", "serving", "vllm", "testing", "tuning", "cli", "startup", "run",
)  # fmt: skip
FILES = sorted(PACKAGE.rglob("*.py"))


def imports_of(path):
    """Absolute names of everything a file imports, also inside functions; `from package import name` gives both."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: relative imports hide their direction"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def module_of(path):
    """Its name below the package: ``engine.formula``; a folder's `__init__` is the folder."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {
    module_of(path): path for path in FILES if path.parent != PACKAGE or path.stem not in ("__init__", "__main__")
}


def modules_imported(path):
    """The package's modules among them."""
    names = (name.removeprefix("dora_kernels.") for name in imports_of(path) if name.startswith("dora_kernels."))
    return {name for name in names if name in MODULES} - {module_of(path)}


@pytest.mark.parametrize("module", MODULES)
def test_folders_import_one_way(module):
    own, *_ = module.split(".")
    for other in modules_imported(MODULES[module]):
        folder, *_ = other.split(".")
        assert folder == own or FOLDERS.index(folder) < FOLDERS.index(own), f"{module} imports {other}"
        assert own != "kernels" or folder == "kernels", f"a kernel file imports {other}"
        assert (own, folder) != ("adapters", "peft"), "adapters stand beside peft"


def test_no_imports_in_a_circle():
    order = graphlib.TopologicalSorter({
        module: modules_imported(path) for module, path in MODULES.items() if path.stem != "__init__"
    })  # fmt: skip
    order.prepare()  # CycleError names the circle


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_only_kernels_import_triton(path):
    if path.parent.name != "kernels":
        assert not {name for name in imports_of(path) if name.split(".")[0] == "triton"}


@pytest.mark.parametrize("path", [path for path in FILES if path.parent.name in ("core", "engine")], ids=str)
def test_what_needs_torch_alone(path):
    roots = {name.split(".")[0] for name in imports_of(path)} - set(sys.stdlib_module_names)
    assert roots <= {"torch", "dora_kernels"}


def test_nothing_that_runs_imports_the_oracle():
    importers = {path.relative_to(PACKAGE) for path in FILES if "core.reference" in modules_imported(path)}
    assert {path.parent for path in importers} == {Path("testing")}


def test_every_folder_has_its_place():
    assert {module.split(".")[0] for module in MODULES} == set(FOLDERS)
