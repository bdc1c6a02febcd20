"""The Triton tests in a process of their own, where this process imported triton before its interpreter was chosen."""

from __future__ import annotations

from pathlib import Path

import pytest
from triton_here import rerun

HERE = Path(__file__)
FILES = [path.stem for path in sorted(HERE.parent.glob("test_*.py")) if path != HERE and "needs_triton" in path.read_text()]


@pytest.mark.parametrize("name", FILES)
def test_in_a_process_of_its_own(name: str) -> None:
    rerun(str(HERE.with_name(f"{name}.py")))
