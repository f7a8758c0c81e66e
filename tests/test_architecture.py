"""The shape of the project: where files lie, who imports whom, what an import costs."""

from __future__ import annotations

import ast
import os
import resource
import subprocess
import sys
import tomllib
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted(path for folder in ("engine", "kernels") for path in (ROOT / folder).rglob("*.py"))
ENVIRONMENT = {**os.environ, "PYTHONPATH": f"{ROOT / 'engine'}{os.pathsep}{ROOT / 'kernels'}"}

# Lowest first. A module imports from its own layer and from those below it.
LAYERS = (
    ("errors",),
    ("checkpoint",),
    ("options", "quantization"),
    ("tokenization", "model"),
    ("execution",),
    ("engine",),
    ("loading",),
    ("bulk", "server"),
    ("integrations",),
    ("cli", "__main__", ""),
)
RANKS = {package: rank for rank, packages in enumerate(LAYERS) for package in packages}

MAX_LINES = 350

HEAVY = ("torch", "triton", "numpy", "transformers", "safetensors", "tokenizers", "huggingface_hub", "tqdm", "pyarrow")
HELP_SECONDS = 0.5


def module_name(path: Path) -> str:
    """engine/unpadded/families/bert.py -> unpadded.checkpoint.families.bert"""
    parts = path.relative_to(ROOT).with_suffix("").parts[1:]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in SOURCES}


def imports(name: str) -> set[str]:
    """The modules that `name` imports anywhere in its file; `from package import module` names the module."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} line {node.lineno}: a relative import"
            assert node.module is not None
            submodules = {f"{node.module}.{alias.name}" for alias in node.names} & MODULES.keys()
            found |= submodules or {node.module}
    return found


def package(name: str) -> str:
    """unpadded.checkpoint.families.bert -> checkpoint; the root package itself -> ''"""
    return name.removeprefix("unpadded").removeprefix(".").split(".")[0]


def rank(name: str) -> int:
    return RANKS[package(name)]


def test_no_package_directly_in_a_source_root() -> None:
    assert not (ROOT / "kernels/__init__.py").exists(), "it would shadow Hugging Face's kernels package"
    assert not (ROOT / "engine/__init__.py").exists()


def test_the_kernels_need_torch_and_triton_only() -> None:
    allowed = sys.stdlib_module_names | {"torch", "triton", "unpadded_kernels"}
    for name in (name for name in MODULES if name.startswith("unpadded_kernels")):
        assert {module.split(".")[0] for module in imports(name)} <= allowed, name


def test_imports_run_one_way() -> None:
    for name in (name for name in MODULES if name.split(".")[0] == "unpadded"):
        for target in imports(name) & MODULES.keys() - {"unpadded"}:
            assert rank(target) <= rank(name), f"{name} imports {target}, which lies above it"


def test_imports_have_no_cycle() -> None:
    TopologicalSorter({name: imports(name) & MODULES.keys() - {name} for name in MODULES}).prepare()


def is_jit(function: ast.FunctionDef) -> bool:
    return any("triton" in ast.unparse(decorator) for decorator in function.decorator_list)


def test_every_host_function_of_the_kernels_is_typed() -> None:
    for name in (name for name in MODULES if name.startswith("unpadded_kernels")):
        for node in ast.walk(ast.parse(MODULES[name].read_text())):
            if not isinstance(node, ast.FunctionDef) or is_jit(node):
                continue
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            untyped = {argument.arg for argument in arguments if argument.annotation is None} - {"self", "cls"}
            assert not untyped and node.returns is not None, f"{name}.{node.name}: {untyped or 'result'} has no type"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_is_at_most_350_lines(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= MAX_LINES


def test_transformers_imports_from_the_root() -> None:
    """From the root, `kernels/` is importable as a namespace, and must not pass for Hugging Face's package."""
    code = "import transformers, transformers.integrations.hub_kernels; transformers.BertModel"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=120)


def test_help_imports_nothing_heavy() -> None:
    code = "import sys; from unpadded.cli.main import main\ntry: main(['-h'])\n"
    code += "finally: print(*sys.modules, file=sys.stderr)"
    ran = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True, check=True)
    assert "unpadded.cli" in ran.stderr.split()
    assert {module.split(".")[0] for module in ran.stderr.split()}.isdisjoint(HEAVY)
    assert "embed" in ran.stdout and "info" in ran.stdout


def test_help_is_fast() -> None:
    def cpu_seconds() -> float:
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    seconds = []
    for _ in range(3):
        start = cpu_seconds()
        subprocess.run([sys.executable, "-m", "unpadded", "--help"], env=ENVIRONMENT, capture_output=True, check=True)
        seconds.append(cpu_seconds() - start)
    assert min(seconds) < HELP_SECONDS, seconds


def test_base_dependencies_have_a_floor_and_no_cap() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for dependency in project["dependencies"]:
        requirement = dependency.split(";")[0]
        assert ">=" in requirement and "<" not in requirement and "==" not in requirement, dependency
