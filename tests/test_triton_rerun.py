"""The Triton tests in a process of their own, where this process imported triton before its interpreter was chosen."""

from __future__ import annotations

from pathlib import Path

import pytest
from triton_here import rerun

FILES = (
    "test_triton_ops",
    "test_triton_pointwise",
    "test_triton_compiled",
    "test_triton_codecs",
    "test_selection",
    "test_gluon_grouped",
)


@pytest.mark.parametrize("name", FILES)
def test_in_a_process_of_its_own(name: str) -> None:
    rerun(str(Path(__file__).with_name(f"{name}.py")))
