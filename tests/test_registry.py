"""Registries, and the public door to each of them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from moefx.codegen.all_to_all import ALL_TO_ALLS
from moefx.codegen.codecs import CODECS
from moefx.passes.schedule import POLICIES

import moefx
from moefx.errors import InputError, PlanError
from moefx.registry import Registry


def registry() -> Registry[Callable[[], int]]:
    known: Registry[Callable[[], int]] = Registry("counter", requires=("__call__",))
    known.register("one", lambda: 1)
    return known


def test_lookup():
    known = registry()
    assert known["one"]() == 1 and "one" in known and list(known) == ["one"]
    with pytest.raises(InputError, match="no counter 'two'; known: one"):
        known["two"]
    assert "two" not in known and known.get("two") is None
    with pytest.raises(PlanError, match="no clock 'x'; known: none"):
        Registry("clock", error=PlanError)["x"]


def test_a_taken_name_is_refused_and_may_be_assigned():
    known = registry()
    with pytest.raises(InputError, match="a counter 'one' exists"):
        known.register("one", lambda: 2)
    assert known["one"]() == 1
    known["one"] = lambda: 3
    assert known["one"]() == 3


@pytest.mark.parametrize("name", ["", 1, None])
def test_names_are_strings(name):
    with pytest.raises(InputError, match="the name of a counter"):
        registry().register(name, lambda: 2)


def test_what_does_not_fit_is_refused():
    with pytest.raises(InputError, match="7 is no counter: it lacks __call__"):
        registry().register("seven", 7)  # type: ignore[arg-type]


class Nothing:
    def nothing(self, *args: object) -> None:
        raise NotImplementedError

    encode = decode = wire_bytes = error_bound = __call__ = nothing


@pytest.mark.parametrize(
    ("register", "known", "taken"),
    [
        (moefx.register_codec, CODECS, "none"),
        (moefx.register_all_to_all, ALL_TO_ALLS, "direct"),
        (moefx.register_policy, POLICIES, "fifo"),
    ],
)
def test_the_public_door(register, known, taken):
    thing = Nothing()
    try:
        register("toy", thing)
        assert known["toy"] is thing
    finally:
        known.pop("toy", None)
    with pytest.raises(InputError, match=f"'{taken}' exists"):
        register(taken, thing)
    with pytest.raises(InputError, match="lacks"):
        register("toy", object())
