"""The layout of the project: direction of imports, sizes of files and packages, cost of an import."""

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

# From bottom to top. A module may import from its own layer and from those below it.
LAYERS = (
    ("unpadded_kernels", "errors"),
    ("checkpoint",),
    ("options", "quantization"),
    ("tokenization", "model"),
    ("execution",),
    ("engine",),
    ("loading",),
    ("bulk", "server"),
    ("integrations",),
    ("cli", "__main__"),
)
RANKS = {package: rank for rank, packages in enumerate(LAYERS) for package in packages}

MAX_LINES_OF_A_FILE = 350
MAX_LINES = {"core": 9000, "server": 2000, "bulk": 2000, "integrations": 2000, "cli": 2000}  # Python only

HEAVY = ("torch", "triton", "numpy", "transformers", "safetensors", "tokenizers", "huggingface_hub", "tqdm", "pyarrow")
HELP_CPU_SECONDS = 0.5


def module_name(path: Path) -> str:
    """engine/unpadded/checkpoint/reader.py -> unpadded.checkpoint.reader"""
    parts = path.relative_to(ROOT).with_suffix("").parts[1:]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in SOURCES}


def imports(name: str) -> set[str]:
    """Return the modules that a module imports anywhere in its file; a submodule by its full name."""
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
    """unpadded.checkpoint.families.bert -> checkpoint; unpadded_kernels.linear -> unpadded_kernels"""
    return name.removeprefix("unpadded.").split(".")[0]


def test_source_roots_are_not_packages() -> None:
    assert not (ROOT / "kernels/__init__.py").exists(), "it would shadow Hugging Face's kernels package"
    assert not (ROOT / "engine/__init__.py").exists()


def test_kernels_import_only_torch_and_triton() -> None:
    allowed = sys.stdlib_module_names | {"torch", "triton", "unpadded_kernels"}
    for name in (name for name in MODULES if name.startswith("unpadded_kernels")):
        assert {module.split(".")[0] for module in imports(name)} <= allowed, name


def test_imports_go_down() -> None:
    for name in MODULES.keys() - {"unpadded"}:
        for target in imports(name) & MODULES.keys() - {"unpadded"}:
            assert RANKS[package(target)] <= RANKS[package(name)], f"{name} imports {target} from a layer above"


def test_imports_have_no_cycle() -> None:
    TopologicalSorter({name: imports(name) & MODULES.keys() - {name} for name in MODULES}).prepare()


def test_checkpoint_does_not_import_torch() -> None:
    modules = ", ".join(name for name in MODULES if package(name) == "checkpoint")
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, check=True, timeout=600)


def test_benchmarks_use_test_helpers_and_helpers_use_no_benchmark() -> None:
    benchmarks = {path.stem for path in ROOT.glob("bench/*.py")}
    for path in (*ROOT.glob("tests/support/*.py"), *SOURCES):
        assert imported_names(path).isdisjoint(benchmarks), path
    tests = {path.stem for path in ROOT.glob("tests/*.py")}
    for path in ROOT.glob("bench/*.py"):
        assert imported_names(path).isdisjoint(tests - {"conftest"}), path


def imported_names(path: Path) -> set[str]:
    nodes = list(ast.walk(ast.parse(path.read_text())))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return names | {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module}


def is_jit(function: ast.FunctionDef) -> bool:
    return any(".jit" in ast.unparse(decorator) for decorator in function.decorator_list)


def test_host_functions_of_the_kernels_are_typed() -> None:
    for name in (name for name in MODULES if name.startswith("unpadded_kernels")):
        for node in ast.walk(ast.parse(MODULES[name].read_text())):
            if not isinstance(node, ast.FunctionDef) or is_jit(node):
                continue
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            untyped = {argument.arg for argument in arguments if argument.annotation is None} - {"self", "cls"}
            assert not untyped and node.returns is not None, f"{name}.{node.name}: {untyped or 'result'} has no type"


def lines(path: Path) -> int:
    return len(path.read_text().splitlines())


def test_files_have_at_most_350_lines() -> None:
    counts = {str(path): lines(path) for path in (*SOURCES, *ROOT.glob("bench/*.py"))}
    assert {path: count for path, count in counts.items() if count > MAX_LINES_OF_A_FILE} == {}


@pytest.mark.parametrize("part", MAX_LINES)
def test_packages_stay_small(part: str) -> None:
    sizes = dict.fromkeys(MAX_LINES, 0)
    for name, path in MODULES.items():
        own = "core" if name == "unpadded" else package(name)
        sizes[own if own in sizes else "core"] += lines(path)
    assert sizes[part] <= MAX_LINES[part]


def test_transformers_can_be_imported_in_the_root() -> None:
    """In the project's root `kernels/` is importable as a namespace package; Hugging Face's `kernels` must win."""
    code = "import transformers, transformers.integrations.hub_kernels; transformers.BertModel"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=600)


def test_help_imports_no_heavy_package() -> None:
    code = "import sys; from unpadded.cli.main import main\ntry: main(['-h'])\n"
    code += "finally: print(*sys.modules, file=sys.stderr)"
    ran = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True, check=True)
    assert "unpadded.cli" in ran.stderr.split()
    assert {module.split(".")[0] for module in ran.stderr.split()}.isdisjoint(HEAVY)
    assert "embed" in ran.stdout and "info" in ran.stdout


def test_help_takes_little_cpu_time() -> None:
    def cpu_seconds() -> float:
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    seconds = []
    for _ in range(3):
        start = cpu_seconds()
        subprocess.run([sys.executable, "-m", "unpadded", "--help"], env=ENVIRONMENT, capture_output=True, check=True)
        seconds.append(cpu_seconds() - start)
    assert min(seconds) < HELP_CPU_SECONDS, seconds


def test_base_dependencies_have_a_floor_and_no_cap() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for dependency in project["dependencies"]:
        requirement = dependency.split(";")[0]
        assert ">=" in requirement and "<" not in requirement and "==" not in requirement, dependency
