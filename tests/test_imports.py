"""The import law, read from the source: who may import whom.

A pass knows the vocabulary and its own private helpers, so that each stage can be read and tested alone. `triton` stays
in codegen/, and is imported there only when a kernel is needed, so that everything imports on a machine without it.
models/ know torch alone. Only the assembly sees passes and codegen together.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = {"moefx": "moefx", "passes": "moefx.passes", "codegen": "moefx.codegen", "models": "moefx.models"}
SOURCES = {folder: sorted((ROOT / folder).rglob("*.py")) for folder in PACKAGES}
OTHERS = [file for folder in ("tests", "benchmarks", "examples") for file in sorted((ROOT / folder).rglob("*.py"))]

# The one place where the stages meet, and the door through which plug-ins enter any of them.
ASSEMBLY = {"moefx.api", "moefx.build", "moefx.parallel", "moefx.plugins"}
NOT_VOCABULARY = {
    "moefx",
    "moefx.__main__",
    "moefx.analysis",
    "moefx.backend",
    "moefx.cli",
    "moefx.degrees",
    "moefx.demo",
    "moefx.graph_analysis",
    "moefx.hf",
    "moefx.measured",
    "moefx.parallel_region",
    "moefx.runtime",
    "moefx.compiled",
    "moefx.exchange",
    "moefx.region_op",
    "moefx.selection",
} | ASSEMBLY


def module_name(file: Path) -> str:
    folder, *parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join([PACKAGES.get(folder, folder), *parts]).removesuffix(".__init__")


MODULES = {module_name(file) for files in SOURCES.values() for file in files}


def imports(source: str, module: str = "", is_package: bool = False) -> Iterator[tuple[int, str]]:
    """Yield (line, full name) of every import, at any depth; `from a import b` gives a.b where that is a module."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = module.split(".")[: len(module.split(".")) - node.level + is_package] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                full = f"{base}.{alias.name}"
                yield node.lineno, full if full in MODULES else base


def imports_of(file: Path) -> list[tuple[int, str]]:
    return list(imports(file.read_text("utf-8"), module_name(file), file.name == "__init__.py"))


def is_in(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def is_private(name: str) -> bool:
    return any(part.startswith("_") for part in name.removeprefix("moefx.passes.").split("."))


def breaks_pass_law(importer: str, imported: str) -> bool:
    """Tell whether a pass may not import this: an assembling module, codegen, models, triton, or another pass."""
    if is_in(imported, "moefx.passes"):
        own = importer.removeprefix("moefx.passes.").split(".")[0]  # a pass may be a package of several files
        return not (is_private(imported) or is_in(imported, f"moefx.passes.{own}"))
    return imported in NOT_VOCABULARY or any(
        is_in(imported, other) for other in ("moefx.codegen", "moefx.models", "triton", "transformers")
    )


@pytest.mark.parametrize("file", SOURCES["passes"], ids=module_name)
def test_a_pass_imports_only_the_vocabulary(file: Path) -> None:
    broken = [(line, name) for line, name in imports_of(file) if breaks_pass_law(module_name(file), name)]
    assert not broken, f"{file}: a pass may import vocabulary and private helpers only"


@pytest.mark.parametrize("file", SOURCES["models"], ids=module_name)
def test_models_import_torch_alone(file: Path) -> None:
    allowed = {"torch", *sys.stdlib_module_names}
    broken = [
        (line, name)
        for line, name in imports_of(file)
        if name.split(".")[0] not in allowed and not is_in(name, "moefx.models")
    ]
    assert not broken, f"{file}: models/ may import torch and the standard library only"


def test_only_the_assembly_sees_passes_and_codegen() -> None:
    for file in (file for files in SOURCES.values() for file in files):
        if module_name(file) not in ASSEMBLY:
            names = [name for _, name in imports_of(file)]
            seen = [package for package in ("moefx.passes", "moefx.codegen") if any(is_in(n, package) for n in names)]
            assert len(seen) < 2, f"{file} imports both passes and codegen"


def test_triton_is_imported_in_codegen_only() -> None:
    for folder in ("moefx", "passes", "models"):
        for file in SOURCES[folder]:
            broken = [(line, name) for line, name in imports_of(file) if is_in(name, "triton")]
            assert not broken, f"{file}: triton belongs in codegen/"


def test_no_sub_package_is_imported_at_top_level() -> None:
    """`import passes` works in a checkout and gives a second module object for the same file."""
    for file in [*OTHERS, *(file for files in SOURCES.values() for file in files)]:
        broken = [(line, name) for line, name in imports_of(file) if name.split(".")[0] in set(PACKAGES) - {"moefx"}]
        assert not broken, f"{file}: write moefx.{broken[0][1]}"


def test_everything_imports_without_the_optional_packages() -> None:
    """Python refuses to import a name that sys.modules maps to None."""
    code = (
        "import sys\n"
        "for name in ('triton', 'transformers', 'matplotlib', 'tqdm'): sys.modules[name] = None\n"
        "import moefx, moefx.passes, moefx.codegen, moefx.models, moefx.cli\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=120)


@pytest.mark.parametrize(
    ("source", "importer"),
    [
        ("from moefx.passes.find import find", "moefx.passes.lower"),
        ("from moefx.passes import find", "moefx.passes.lower"),
        ("from . import find", "moefx.passes.lower"),
        ("def f():\n    import moefx.passes.find", "moefx.passes.lower"),
        ("from moefx.codegen.emit import emit", "moefx.passes.lower"),
        ("from moefx import codegen", "moefx.passes.lower"),
        ("from moefx import runtime", "moefx.passes.lower"),
        ("from moefx import optimize", "moefx.passes.lower"),
        ("import triton.language as tl", "moefx.passes.lower"),
    ],
)
def test_the_law_sees_a_breach(source: str, importer: str) -> None:
    assert any(breaks_pass_law(importer, name) for _, name in imports(source, importer))


@pytest.mark.parametrize(
    ("source", "importer"),
    [
        ("from moefx.passes._lift import Lifter", "moefx.passes.find"),
        ("from . import _lift", "moefx.passes.find"),
        ("from moefx import sizes", "moefx.passes.capture"),
        ("from moefx.ir import Region\nimport torch, sympy", "moefx.passes.partition"),
        ("from moefx.passes.find.gates import solve", "moefx.passes.find.roles"),
    ],
)
def test_the_law_allows_the_vocabulary(source: str, importer: str) -> None:
    assert not any(breaks_pass_law(importer, name) for _, name in imports(source, importer))
