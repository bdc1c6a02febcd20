"""An editable install, a plain install and a wheel import moefx and its sub-packages, and leak nothing beside them.

Each way installs a copy of the checkout into an environment of its own, which shares this one's torch through a .pth
file; nothing is downloaded.
"""

from __future__ import annotations

import configparser
import re
import shutil
import site
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SUB_PACKAGES = ("passes", "codegen", "models")
WAYS = ("editable", "plain", "wheel")

IMPORT_ALL = "import moefx.passes, moefx.codegen, moefx.models"
INSTALLED = f"""
import importlib.util, pathlib, sys
import moefx
{IMPORT_ALL}
from moefx.models import MixtralMoE
leaked = [name for name in {SUB_PACKAGES} if importlib.util.find_spec(name) is not None]
assert not leaked, leaked
root = pathlib.Path(sys.argv[1])
for module in (moefx, moefx.passes, moefx.codegen, moefx.models):
    assert pathlib.Path(module.__file__).is_relative_to(root), (module.__file__, root)
assert pathlib.Path(moefx.__file__).with_name("py.typed").is_file()
"""


def run(*command: str | Path, cwd: Path) -> str:
    """Run a command to its end; fail with what it printed."""
    done = subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a copy of the files that make up the project, with one test that imports everything."""
    copy = tmp_path_factory.mktemp("install") / "checkout"
    copy.mkdir()
    for name in ("setup.cfg", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, copy)
    for name in ("moefx", *SUB_PACKAGES):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    (copy / "tests").mkdir()
    (copy / "tests" / "test_all.py").write_text(f"def test_all():\n    {IMPORT_ALL}\n")
    return copy


@pytest.fixture(scope="module")
def wheel(checkout: Path) -> Path:
    pip = (sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index")
    run(*pip, "--wheel-dir", "dist", ".", cwd=checkout)
    (built,) = (checkout / "dist").glob("moefx-*.whl")
    return built


def new_environment(folder: Path) -> Path:
    """Make a virtual environment that sees the packages of this one after its own; return its Python."""
    venv.create(folder, symlinks=True)
    scheme = {"base": str(folder), "platbase": str(folder)}
    shared = [*site.getsitepackages(), *([site.getusersitepackages()] if site.ENABLE_USER_SITE else [])]
    Path(sysconfig.get_path("purelib", "venv", scheme), "shared.pth").write_text("\n".join(shared))
    return Path(sysconfig.get_path("scripts", "venv", scheme), "python")


@pytest.mark.parametrize("way", WAYS)
def test_installed(way: str, checkout: Path, wheel: Path, tmp_path: Path) -> None:
    """Everything imports from outside the checkout, the command runs, and pytest works inside the checkout."""
    python = new_environment(tmp_path / "environment")
    source = {"editable": ("--editable", checkout), "plain": (checkout,), "wheel": (wheel,)}[way]
    pip = (
        sys.executable,
        "-m",
        "pip",
        "--python",
        python,
        "install",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
    )
    run(*pip, *source, cwd=tmp_path)
    run(python, "-c", INSTALLED, checkout if way == "editable" else tmp_path / "environment", cwd=tmp_path)
    assert run(python.with_name("moefx"), "--version", cwd=tmp_path).startswith("moefx ")
    run_pytest(python, checkout)


def test_not_installed(checkout: Path, tmp_path: Path) -> None:
    run_pytest(new_environment(tmp_path / "environment"), checkout)


def run_pytest(python: Path, checkout: Path) -> None:
    """Run the copy's test as `python -m pytest`, which has the checkout on its path, and as `pytest`, which has not."""
    for command in (("-m", "pytest"), ("-I", "-c", "import sys, pytest; sys.exit(pytest.main(sys.argv[1:]))")):
        assert "1 passed" in run(python, *command, "-q", "-p", "no:cacheprovider", "tests/test_all.py", cwd=checkout)


def test_wheel_holds_moefx_alone(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {"moefx", f"moefx-{wheel.name.split('-')[1]}.dist-info"}
    for package in SUB_PACKAGES:
        expected = {f"moefx/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / package).rglob("*.py")}
        assert {name for name in names if name.startswith(f"moefx/{package}/")} == expected


def test_every_package_is_declared() -> None:
    """Each folder with Python files is named in setup.cfg, and each sub-package has its link for type checkers."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    declared = set(config["options"]["packages"].split())
    folders = {init.parent for name in ("moefx", *SUB_PACKAGES) for init in (ROOT / name).rglob("__init__.py")}
    found = {".".join(("moefx", *folder.relative_to(ROOT).parts)).replace("moefx.moefx", "moefx") for folder in folders}
    assert declared == found
    for name in SUB_PACKAGES:
        assert (ROOT / "typing" / "moefx" / name).resolve() == ROOT / name


def test_ci_runs_the_command_of_the_readme() -> None:
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), flags=re.DOTALL)
    (command,) = (block for block in blocks if "pytest" in block)
    assert command in (ROOT / ".ci" / "run").read_text("utf-8")
