"""select: a router's torch.topk in a graph of Dynamo's --> moefx::topk, where that serves.

before:  topk = torch.topk(scores, 8, dim=-1, sorted=False)
after:   topk = moefx::topk(scores, 8)

Its results are those of torch.topk, but that equal scores come in their order, where torch promises none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses import FakeTensor

from moefx.ops import topk_serves


def select(nodes: Iterable[fx.Node], topk: Any, on: Callable[[torch.device], bool]) -> list[fx.Node]:
    """Replaces the calls of torch.topk among `nodes`, of tensors on devices that `on` accepts, by calls of the operator
    `topk`, in place. Returns the new nodes."""
    made = []
    for node in nodes:
        if node.target not in (torch.topk, torch.ops.aten.topk.default) and (node.op, node.target) != ("call_method", "topk"):
            continue
        given = _given(*node.args, **node.kwargs)
        if given is None or not isinstance(given[0], fx.Node):
            continue
        scores, k, *rest = given
        value = scores.meta.get("example_value", scores.meta.get("val"))
        if type(value) in (Tensor, FakeTensor) and topk_serves(value, k, *rest) and on(value.device):
            with node.graph.inserting_before(node):
                new = node.graph.call_function(topk, (scores, k))
            new.meta.update(node.meta)
            node.replace_all_uses_with(new)
            node.graph.erase_node(node)
            made.append(new)
    return made


def _given(
    input: Any = None, k: Any = None, dim: Any = -1, largest: Any = True, sorted: Any = True, **others: Any
) -> tuple[Any, Any, Any, Any] | None:
    """The arguments of torch.topk; None where there are others, as `out`."""
    return None if others else (input, k, dim, largest)
