"""Task graphs with times for the scheduler's tests: random layers of every layout, and plain pipelines."""

from __future__ import annotations

import random
from typing import Any

from hypothesis import strategies as st
from moefx.passes.partition import Layout, expert_parallel

from moefx.ir import Task, TaskGraph

LAYOUTS = {
    "pipemoe": Layout(permute=False),
    "schemoe": Layout(permute=False, codec=True, split_backward=False),
    "codec": Layout(permute=False, codec=True),
    "pipe_a2a": Layout(codec=True, split_links=True),
    "fsmoe": Layout(permute=False, shards=True, gradient_slices=3),
    "fsmoe_codec": Layout(permute=False, codec=True, shards=True),
    "shared": Layout(shared=True, gradient_slices=2),
}


def timed_layer(layout: Layout, degree: int, phase: Any, seconds: dict[str, float]) -> TaskGraph:
    return expert_parallel(degree, phase, layout).timed(lambda task: seconds[task.kind])


def random_layer(
    rng: random.Random, layout: str | None = None, degree: int | None = None, uneven: bool = False
) -> TaskGraph:
    """Times of very different proportions: all alike, small codecs, or anything from 0.1 to 10. uneven: by chunk too."""
    name = layout or rng.choice(list(LAYOUTS))
    graph = expert_parallel(degree or rng.randint(1, 4), rng.choice(("forward", "backward")), LAYOUTS[name])
    style = rng.randrange(3)

    def one(kind: str) -> float:
        if style == 0:
            return rng.uniform(0.5, 1.5)
        if style == 1:
            large = "all_to_all" in kind or kind.startswith("experts") or "reduce" in kind or "gather" in kind
            return rng.uniform(0.5, 2) if large else rng.uniform(0.05, 0.4)
        return rng.choice((rng.uniform(0.1, 1), rng.uniform(1, 10), float(rng.randint(0, 3))))

    seconds = {kind: one(kind) for kind in sorted({t.kind for t in graph.tasks})}
    return graph.timed(lambda task: seconds[task.kind] * (rng.uniform(0.5, 1.5) if uneven else 1.0))


@st.composite
def layers(draw: Any, most: int = 4) -> TaskGraph:
    """A layer of any layout and phase with up to `most` chunks, equal or not, and times from 0 to 10 s."""
    layout = draw(st.sampled_from(sorted(LAYOUTS)))
    graph = expert_parallel(draw(st.integers(1, most)), draw(st.sampled_from(["forward", "backward"])), LAYOUTS[layout])
    times = st.one_of(st.integers(0, 5).map(float), st.floats(0.01, 10))
    kinds = {kind: draw(times) for kind in sorted({t.kind for t in graph.tasks})}
    if not draw(st.booleans()):
        return graph.timed(lambda task: kinds[task.kind])
    factor = [draw(st.floats(0.5, 2)) for _ in range(graph.degree)]
    return graph.timed(lambda task: kinds[task.kind] * factor[task.chunk])


def pipeline(degree: int, *stages: tuple[str, str, float]) -> TaskGraph:
    """Chunks that pass the same stages (kind, resource, seconds) one after another."""
    tasks = []
    for c in range(degree):
        for i, (kind, resource, seconds) in enumerate(stages):
            deps = (f"{stages[i - 1][0]}_{c}",) if i else ()
            tasks.append(Task(f"{kind}_{c}", kind, c, resource, deps, seconds))
    return TaskGraph("forward", degree, tuple(tasks))
