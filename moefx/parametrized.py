"""Parameters that a module computes when it is asked for them (`torch.nn.utils.parametrize`): adapters of stacked experts,
weight norm. A rewritten block asks once a call, for all experts; the model's own code may ask another number of times.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from moefx.errors import Decline
from moefx.probe import state_kept
from moefx.python_state import attributes


def class_of(module: nn.Module) -> type:
    """Its class, without what parametrizing made of it (a class of its own for each module)."""
    return parametrize.type_before_parametrizations(module)


def value(owner: nn.Module, name: str) -> Tensor | None:
    """A parameter or buffer as it is now, computed where it is parametrized; None where there is none."""
    held = owner._parameters.get(name, owner._buffers.get(name))
    if held is None and parametrize.is_parametrized(owner, name):
        computed: Tensor = getattr(owner, name)
        return computed
    return held


def computed_in(block: nn.Module) -> frozenset[str]:
    """The names of the parameters that a block computes."""
    return frozenset(where for where, _, _ in _computed(block))


def check(block: nn.Module) -> None:
    """Raises Decline where it matters how often a parameter of the block is computed, in training or not."""
    for where, owner, name in _computed(block):
        check_value(owner, name, where, (True, False))


def _computed(block: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """The name in the block, the module that has it, the name there."""
    for path, owner in block.named_modules():
        if parametrize.is_parametrized(owner):
            for name in owner.parametrizations:  # type: ignore[union-attr]
                yield f"{path}.{name}".lstrip("."), owner, name


def check_value(owner: nn.Module, name: str, where: str, modes: tuple[bool, ...]) -> None:
    """Raises Decline where computing this parameter changes something or draws at random. where: what to call it.

    modes: of training or not.
    """
    steps: nn.Module = owner.parametrizations[name]  # type: ignore[index, assignment]
    kinds = " and ".join(type(step).__name__ for step in steps.children()) or "nothing"
    before = {m: m.training for m in steps.modules()}
    with state_kept(steps), torch.no_grad():
        try:
            for mode in modes:
                steps.train(mode)
                if not _same_each_time(owner, name, steps):
                    raise Decline(
                        f"{where} is computed at each call, by {kinds}, which draws at random or changes its own state"
                        f"{' in training' if mode else ''}: a rewritten block would compute it another number of times"
                    )
        finally:
            for m, training in before.items():
                m.training = training


def _same_each_time(owner: nn.Module, name: str, steps: nn.Module) -> bool:
    devices = list({t.device for t in steps.parameters() if t.is_cuda})

    def state() -> tuple[Any, ...]:
        held = [t._version for t in (*steps.parameters(), *steps.buffers())]
        return held, [attributes(m) for m in steps.modules()]

    def random() -> list[Tensor]:
        return [torch.get_rng_state(), *(torch.cuda.get_rng_state(d) for d in devices)]

    before, drawn = state(), random()
    first, second = getattr(owner, name), getattr(owner, name)
    return torch.equal(first, second) and state() == before and all(map(torch.equal, drawn, random()))
