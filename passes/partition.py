"""partition: a region becomes tasks, one set per chunk of tokens.

Forward, chunk c:   route_c -> dispatch_c -> experts_c -> combine_c
Backward, chunk c:  d_combine_c -> d_experts_c -> d_dispatch_c, and d_experts_c -> w_experts_c

d_experts is the gradient with respect to rows, w_experts with respect to the experts' parameters. Every chunk adds to
the same parameter gradients, so w_experts_c comes after w_experts_{c-1}.

Over several ranks (`expert_parallel`), chunk c in ScheMoE's letters; what the `Layout` lacks is left out:

    encode -> C1 -> A1 -> D1 -> AG -> E -> RS -> C2 -> A2 -> D2 -> decode        and, of no chunk, shared, slice_0 ...

C compresses, A is an all-to-all, D decompresses, AG and RS gather and reduce tokens over the shards of an expert. The
backward pass is the same chain for the gradients: A1 brings them to the experts, E is the gradient of the rows and W, of
the weights, needs no link, so that it can fill the time in which others are on the way.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moefx.errors import PlanError
from moefx.ir import NO_CHUNK, Region, Task, TaskGraph


def partition(region: Region, degree: int, phase: Literal["forward", "backward"]) -> TaskGraph:
    """The tasks of one phase of `region`, cut into `degree` >= 1 chunks of tokens."""
    if degree < 1:
        raise PlanError(f"a region is cut into at least one chunk; got degree {degree}")
    if region.identity and region.d_out != region.d_model:
        raise PlanError(f"identity experts return x, so d_out must be d_model; got {region.d_out} and {region.d_model}")
    chunk_tasks = {"forward": _forward, "backward": _backward}[phase]
    return TaskGraph(phase, degree, tuple(task for c in range(degree) for task in chunk_tasks(c)))


def _forward(c: int) -> list[Task]:
    return [
        Task(f"route_{c}", "route", c, "memory"),
        Task(f"dispatch_{c}", "dispatch", c, "memory", (f"route_{c}",)),
        Task(f"experts_{c}", "experts", c, "compute", (f"dispatch_{c}",)),
        Task(f"combine_{c}", "combine", c, "memory", (f"experts_{c}",)),
    ]


def _backward(c: int) -> list[Task]:
    earlier_sum = (f"w_experts_{c - 1}",) if c else ()
    return [
        Task(f"d_combine_{c}", "d_combine", c, "memory"),
        Task(f"d_experts_{c}", "d_experts", c, "compute", (f"d_combine_{c}",)),
        Task(f"w_experts_{c}", "w_experts", c, "compute", (f"d_experts_{c}", *earlier_sum)),
        Task(f"d_dispatch_{c}", "d_dispatch", c, "memory", (f"d_experts_{c}",)),
    ]


# ------------------------------------------------------------------------------------------------ several ranks


@dataclass(frozen=True)
class Layout:
    """What a layer on several ranks consists of besides its all-to-alls and experts.

    permute: rows are gathered before the dispatch (encode) and summed after the combine (decode), chunk by chunk.
    codec: what goes over the link is compressed. link: the resource of the all-to-alls, "inter" or "intra" (a node).
    split_links: an all-to-all is two tasks at once, between nodes on "inter" and within the node on "intra" (Pipe-A2A).
    shards: each expert is cut over the ranks of a node (FSMoE): an all-gather before it, a reduce-scatter after, on "intra".
    shared: a shared expert, one task. split_backward: the backward has W apart from E; else one task is both.
    gradient_slices: into how many pieces the all-reduce of the other gradients is cut (backward only), on `gradient_link`.
    """

    permute: bool = True
    codec: bool = False
    link: str = "inter"
    split_links: bool = False
    shards: bool = False
    shared: bool = False
    split_backward: bool = True
    gradient_slices: int = 0
    gradient_link: str = "inter"


def expert_parallel(degree: int, phase: Literal["forward", "backward"], layout: Layout = Layout()) -> TaskGraph:
    """The tasks of one phase of a layer whose experts are spread over ranks, in `degree` chunks; all ranks run the same.

    The graph has no times: `moefx.costs.price` puts them in. Names are A1_0 (all-to-all 1 of chunk 0) and the like.
    """
    if degree < 1:
        raise PlanError(f"a layer is cut into at least one chunk; got degree {degree}")
    if phase not in ("forward", "backward"):
        raise PlanError(f"a phase is 'forward' or 'backward'; got {phase!r}")
    if layout.gradient_slices < 0:
        raise PlanError(f"the gradients are cut into 0 or more slices; got {layout.gradient_slices}")
    tasks = [task for c in range(degree) for task in _chunk(c, phase, layout)]
    if layout.shared:
        kind = "shared" if phase == "forward" else "shared_backward"
        tasks.append(Task("shared", kind, NO_CHUNK, "compute"))
    if phase == "backward":
        link = layout.gradient_link
        slices = range(layout.gradient_slices)
        tasks += [Task(f"slice_{i}", "grad_all_reduce", NO_CHUNK, link) for i in slices]
    return TaskGraph(phase, degree, tuple(tasks))


def _chunk(c: int, phase: Literal["forward", "backward"], layout: Layout) -> list[Task]:
    forward = phase == "forward"
    tasks: list[Task] = []
    last: tuple[str, ...] = ()

    def then(*steps: tuple[str, str, str]) -> None:
        """Add tasks (name, kind, resource) that run after all of the step before, and beside each other."""
        nonlocal last
        tasks.extend(Task(f"{name}_{c}", kind, c, resource, last) for name, kind, resource in steps)
        last = tuple(f"{name}_{c}" for name, _, _ in steps)

    def exchange(number: int, way: str) -> None:
        if layout.codec:
            then((f"C{number}", f"{way}_compress", "compute"))
        if layout.split_links:
            inter, intra = f"{way}_inter_all_to_all", f"{way}_intra_all_to_all"
            then((f"A{number}", inter, "inter"), (f"I{number}", intra, "intra"))
        else:
            kind = f"{way}_intra_all_to_all" if layout.link == "intra" else f"{way}_all_to_all"
            then((f"A{number}", kind, layout.link))
        if layout.codec:
            then((f"D{number}", f"{way}_decompress", "compute"))

    if layout.permute:
        then(("encode", "encode" if forward else "decode_backward", "compute"))
    exchange(1, "dispatch")
    if layout.shards:
        then(("AG", "all_gather", "intra"))
    split = layout.split_backward
    then(("E", "experts" if forward else "experts_dgrad" if split else "experts_backward", "compute"))
    if not forward and split:
        earlier_sum = (f"W_{c - 1}",) if c else ()
        tasks.append(Task(f"W_{c}", "experts_wgrad", c, "compute", (f"E_{c}", *earlier_sum)))
    if layout.shards:
        then(("RS", "reduce_scatter", "intra"))
    exchange(2, "combine")
    if layout.permute:
        then(("decode", "decode" if forward else "encode_backward", "compute"))
    return tasks
