"""Options and fixtures of all tests."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ["MOEFX_NO_CACHE"] = "1"  # what earlier processes found would hide what this one does not find

torch.set_num_threads(1)  # the models are tiny: on a shared machine threads cost ten times what they gain

GOLDEN = Path(__file__).parent / "golden"
LONGEST = ("test_triton_rerun", "test_multi_gpu")  # files that come first, so that no worker is alone with them at the end

hypothesis.settings.register_profile("moefx", deadline=None, derandomize=True)
hypothesis.settings.load_profile("moefx")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add ``--full`` and ``--update-golden``."""
    parser.addoption("--full", action="store_true", help="also run the tests marked slow")
    parser.addoption("--update-golden", action="store_true", help="rewrite the files in tests/golden")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect slow tests without ``--full``, skip gpu tests where there is no CUDA device, and begin with the longest."""
    items.sort(key=lambda item: item.path.stem not in LONGEST)
    if not config.getoption("--full"):
        slow = [item for item in items if item.get_closest_marker("slow")]
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if not item.get_closest_marker("slow")]
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Start every test from the same random state."""
    torch.manual_seed(0)


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """Return ``golden(name, text)``: compare ``text`` with tests/golden/<name>.txt, or write it with --update-golden.

    A missing file is a failure.
    """

    def check(name: str, text: str) -> None:
        path = GOLDEN / f"{name}.txt"
        text = text.rstrip("\n") + "\n"
        if request.config.getoption("--update-golden"):
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
            return
        if not path.is_file():
            pytest.fail(f"{path.name} is missing: run pytest --update-golden, then read and commit it")
        assert text == path.read_text(encoding="utf-8"), f"{path.name} differs: see --update-golden"

    return check


@pytest.fixture
def netbox() -> Callable[..., AbstractContextManager[Any]]:
    """`netbox.netbox`: hosts with slow links between them. Skipped, with the reason, where it cannot be."""
    import netbox

    if reason := netbox.why_not():
        pytest.skip(reason)
    return netbox.netbox
