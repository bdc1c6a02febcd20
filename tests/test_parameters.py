"""Arguments of a block's forward in their normal form, without `inspect` where that is possible, against `inspect`."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moefx.block import Parameters


class Forwards:
    """What a module's forward may look like."""

    def plain(self, x, ids, w): ...
    def defaults(self, x, mask=None, scale=1.0): ...
    def keywords(self, x, *, ids, w=None): ...
    def more(self, x, mask=None, **kwargs): ...
    def several(self, x, *rest, w=None): ...
    def hidden(self, x, /, mask=None): ...
    def nothing(self): ...


NAMES = ("x", "ids", "w", "mask", "scale", "rest", "other")


@pytest.mark.parametrize("name", [n for n in vars(Forwards) if not n.startswith("_")])
@given(st.lists(st.integers(), max_size=4), st.dictionaries(st.sampled_from(NAMES), st.integers(), max_size=4))
def test_as_inspect_binds_them(name: str, args: list[int], kwargs: dict[str, int]) -> None:
    signature = inspect.signature(getattr(Forwards, name))
    parameters = Parameters.of(signature)
    try:
        bound = signature.bind(None, *args, **kwargs)
    except TypeError:
        assert not parameters.fit(tuple(args), kwargs)
        return
    bound.apply_defaults()
    expected: tuple[tuple[Any, ...], dict[str, Any]] = bound.args[1:], bound.kwargs
    if parameters.fit(tuple(args), kwargs):
        assert parameters.normal_form(tuple(args), kwargs) == expected
    else:
        assert name == "several" and len(args) > 1  # those behind x have no names
