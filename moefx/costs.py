"""The work of every task, in algebra: FLOPs, bytes of device memory, bytes on the wire; and its price on a profile.

    work("experts").flops == 2*m*T*K*f*D*F / r          # m = 3 matrices in a gated expert: 6 T K D F in all

Work is that of one task: of one chunk out of r, or of the whole where a task has no chunk. A kind of task that is not
in `WORK` is an error; nothing costs zero because it was forgotten. 1 FLOP is one addition or multiplication.

Letters: T tokens a rank, K experts a token, D model width, F expert width, E experts, P ranks that share them, b bytes an
element, f capacity factor (dropless: 1), r degree, m matrices an expert (2 plain, 3 gated), c bytes on the wire per byte
of the message (codec; 1 without), G ranks a node, S width of the shared expert, g bytes of gradients that all ranks sum,
s slices of them, A ranks that sum them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import cache
from itertools import pairwise
from typing import Any

import sympy

from moefx.errors import InputError
from moefx.ir import NO_CHUNK, Task, TaskGraph
from moefx.profile import PLUG_INS, Profile
from moefx.simulate import COMPUTE

T, K, D, F, E, P, b, f, r, m, c, G, S, g, s, A = LETTERS = sympy.symbols(
    "T K D F E P b f r m c G S g s A", positive=True
)


@dataclass(frozen=True)
class Work:
    """What one task does. All are sympy expressions of the letters.

    line: the line of the profile that prices it. launches: how often that line's start-up time is paid.
    message_bytes: what a collective is called with, a rank's own share included; wire_bytes: what leaves the rank.
    """

    line: str
    flops: Any = sympy.Integer(0)
    hbm_bytes: Any = sympy.Integer(0)
    wire_bytes: Any = sympy.Integer(0)
    message_bytes: Any = sympy.Integer(0)
    launches: Any = sympy.Integer(1)


_rows = f * K * T / r  # rows of one chunk on one rank; with balanced routing as many leave as arrive
_message = _rows * D * b  # one chunk's all-to-all, uncompressed
_weights = m * D * F * b * E / P  # the rank's experts
_products = 2 * m * _rows * D * F


def _permute(reads: Any, writes: Any) -> Work:
    return Work("permute", hbm_bytes=reads + writes)


def _all_to_all(line: str, peers: Any) -> Work:
    """Each of P ranks holds an equal share of the message for each; `peers` of the shares go over this link."""
    message = c * _message
    return Work(line, hbm_bytes=2 * message, wire_bytes=message * peers / P, message_bytes=message)


def _gathered(line: str) -> Work:
    """A rank's rows go to, or come from, the other G-1 ranks of its node."""
    moved = (G - 1) * _message
    return Work(line, hbm_bytes=moved + _message, wire_bytes=moved, message_bytes=G * _message)


def _codec() -> Work:
    """Reads the rows and writes their encoding, or the reverse."""
    return Work("codec", hbm_bytes=(1 + c) * _message)


def _experts(products: int, hbm_bytes: Any) -> Work:
    """`products` times the expert's m grouped products."""
    return Work("experts", flops=products * _products, hbm_bytes=hbm_bytes, launches=products * m)


def _shared(products: int) -> Work:
    """A dense expert of width S on all T tokens, in one task."""
    weights, activations = m * D * S * b, 2 * T * D * b + 2 * m * T * S * b
    flops = products * 2 * m * T * D * S
    return Work("gemm", flops=flops, hbm_bytes=products * (weights + activations), launches=products * m)


# Every product reads its input and weights and writes its output, the activation reads m-1 and writes one.
_rows_pass = 2 * _message + 2 * m * _rows * F * b + _weights
# A weight's gradient reads the product's input and the gradient of its output, and adds to the sum.
_weights_pass = m * _message + m * _rows * F * b + 2 * _weights
_tokens = T * D * b / r
_ids = 3 * 8 * T * K / r  # ids read, order and position written, 8 bytes each

WORK: dict[str, Work] = {
    # several ranks, forward (`passes.partition.expert_parallel`)
    "encode": _permute(_message, _message),
    "decode": _permute(_message, _tokens),
    **{f"{way}_compress": _codec() for way in ("dispatch", "combine")},
    **{f"{way}_decompress": _codec() for way in ("dispatch", "combine")},
    **{f"{way}_all_to_all": _all_to_all("all_to_all", P - 1) for way in ("dispatch", "combine")},
    **{f"{way}_inter_all_to_all": _all_to_all("all_to_all_inter", P - G) for way in ("dispatch", "combine")},
    **{f"{way}_intra_all_to_all": _all_to_all("all_to_all_intra", G - 1) for way in ("dispatch", "combine")},
    "all_gather": _gathered("all_gather"),
    "reduce_scatter": _gathered("reduce_scatter"),
    "experts": _experts(1, _rows_pass),
    "shared": _shared(1),
    # backward: the gradient of the rows costs what the rows cost, and so does that of the weights
    "decode_backward": _permute(_message + _tokens, _message),  # rows are read again for the gradient of their weights
    "encode_backward": _permute(_message, _tokens),
    "experts_dgrad": _experts(1, _rows_pass),
    "experts_wgrad": _experts(1, _weights_pass),
    "experts_backward": _experts(2, _rows_pass + _weights_pass),
    "shared_backward": _shared(2),
    # a ring: each rank sends 2 (A-1)/A of the slice
    "grad_all_reduce": Work("all_reduce", hbm_bytes=3 * g / s, wire_bytes=2 * (A - 1) / A * g / s, message_bytes=g / s),
    # one rank (`passes.partition.partition`)
    "route": _permute(_ids / 3, 2 * _ids / 3),
    "dispatch": _permute(_message, _message),
    "combine": _permute(_message, _tokens),
    "d_combine": _permute(_message + _tokens, _message),
    "d_experts": _experts(1, _rows_pass),
    "w_experts": _experts(1, _weights_pass),
    "d_dispatch": _permute(_message, _tokens),
}


def work(kind: str) -> Work:
    """The work of one task of this kind; InputError for a kind that is not known."""
    if kind not in WORK:
        raise InputError(f"no cost is known for tasks of kind {kind!r}; known: {', '.join(sorted(WORK))}")
    return WORK[kind]


@dataclass(frozen=True)
class Sizes:
    """Numbers for the letters, in their order of use; see the head of this file for what each one is.

    wire_share is c; codec and all_to_all are the names of the plug-ins whose lines of a profile are meant ("": none in
    particular); ranks_per_node G, shared_width S, gradient_bytes g, gradient_ranks A (0: as many as `ranks`).
    """

    tokens: int
    top_k: int
    d_model: int
    d_expert: int
    experts: int
    ranks: int
    bytes_per_element: float = 2
    capacity_factor: float = 1.0
    matrices: int = 3
    wire_share: float = 1.0
    ranks_per_node: int = 1
    shared_width: int = 0
    gradient_bytes: float = 0.0
    gradient_slices: int = 1
    gradient_ranks: int = 0
    codec: str = ""
    all_to_all: str = ""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type == "str":
                continue
            least = 0 if field.name in ("shared_width", "gradient_bytes", "gradient_ranks") else 1
            whole = field.type == "int"
            if whole and (not isinstance(value, int) or value < least):
                raise InputError(f"Sizes.{field.name} is a whole number >= {least}; got {value!r}")
            if not whole and (not 0 <= value < math.inf or (value == 0 and least == 1)):
                raise InputError(f"Sizes.{field.name} is a finite positive number; got {value!r}")
        if self.matrices not in (2, 3):
            raise InputError(f"an expert has 2 matrices, or 3 when it is gated; got Sizes.matrices={self.matrices}")
        if self.experts % self.ranks:
            raise InputError(f"{self.experts} experts cannot be spread evenly over {self.ranks} ranks")
        if self.top_k > self.experts:
            raise InputError(f"a token goes to at most {self.experts} experts; got Sizes.top_k={self.top_k}")
        if self.ranks_per_node > self.ranks:
            raise InputError(f"a node has at most {self.ranks} of the ranks; got {self.ranks_per_node}")

    @property
    def capacity(self) -> int:
        """Rows of one expert from one rank, ceil(K f T / E): the largest degree in which every chunk has rows."""
        return max(1, math.ceil(self.top_k * self.capacity_factor * self.tokens / self.experts))

    def values(self, degree: int) -> tuple[float, ...]:
        """In the order of `LETTERS`."""
        return (
            *(self.tokens, self.top_k, self.d_model, self.d_expert, self.experts, self.ranks, self.bytes_per_element),
            *(self.capacity_factor, degree, self.matrices, self.wire_share, self.ranks_per_node, self.shared_width),
            *(self.gradient_bytes, self.gradient_slices, self.gradient_ranks or self.ranks),
        )


@cache
def _function(kind: str, quantity: str) -> Callable[..., float]:
    function: Callable[..., float] = sympy.lambdify(LETTERS, getattr(work(kind), quantity), "math")
    return function


def amount(kind: str, quantity: str, sizes: Sizes, degree: int) -> float:
    """A number for `getattr(work(kind), quantity)`, such as ("experts", "flops")."""
    return float(_function(kind, quantity)(*sizes.values(degree)))


def seconds(kind: str, sizes: Sizes, degree: int, profile: Profile) -> float:
    """launches * alpha + beta * units of the profile's line for this kind, in the units that the line counts.

    InputError where the profile has no such line, and for degree > capacity.
    """
    if not 1 <= degree <= sizes.capacity:
        raise InputError(f"the degree lies between 1 and the capacity {sizes.capacity}; got {degree}")
    name = work(kind).line
    plug_in = getattr(sizes, name) if name in PLUG_INS else ""
    line = profile.line(f"{name}:{plug_in}" if plug_in else name)
    launches = amount(kind, "launches", sizes, degree)
    return launches * line.alpha_s + line.beta_s_per_unit * amount(kind, line.unit, sizes, degree)


def price(graph: TaskGraph, sizes: Sizes, profile: Profile) -> TaskGraph:
    """The graph with the time of every task on this profile."""
    by_kind = {kind: seconds(kind, sizes, graph.degree, profile) for kind in {t.kind for t in graph.tasks}}
    return graph.timed(lambda task: by_kind[task.kind])


@dataclass(frozen=True)
class BlockTimes:
    """What a phase of one block takes where it runs, beside what a profile knows of its tasks (`moefx.measured.block_times`).

    computed_s: all that is no exchange, by the number of chunks that it was measured in, one chunk first. exchange_s: an
    exchange of next to nothing, which no exchange is faster than. whole_exchange_s: one of all rows, right behind another: a
    profile's line is fitted to messages of all sizes, and may be off by a tenth at those of one block; 0: not measured.
    """

    computed_s: Mapping[int, float]
    exchange_s: float = 0.0
    whole_exchange_s: float = 0.0

    def compute_s(self, degree: int) -> float:
        """What is computed in so many chunks: on the straight line between the two measured degrees around it. Beyond the last
        the line goes on, but a chunk more never makes it shorter there."""
        points = sorted(self.computed_s.items())
        if len(points) == 1:
            return points[0][1]
        (low, low_s), (high, high_s) = next((pair for pair in pairwise(points) if degree <= pair[1][0]), points[-2:])
        slope = (high_s - low_s) / (high - low)
        return low_s + (degree - low) * slope if degree <= high else high_s + (degree - high) * max(0.0, slope)


def price_block(graph: TaskGraph, whole: TaskGraph, times: BlockTimes) -> TaskGraph:
    """A priced graph with what was measured of its block: prices only divide what is computed among the tasks, and say how much
    of a whole exchange one of a chunk takes.

    whole: the same graph in one chunk, priced.
    """
    computed = {t.kind: whole.seconds[t.name] for t in whole.tasks if t.resource == COMPUTE}
    seconds_a_share = times.compute_s(graph.degree) / sum(computed.values())
    exchanged = {t.kind: whole.seconds[t.name] for t in whole.tasks if t.resource != COMPUTE}
    slower = {kind: times.whole_exchange_s / s if times.whole_exchange_s and s else 1.0 for kind, s in exchanged.items()}

    def seconds_of(task: Task) -> float:
        if task.resource != COMPUTE:
            return max(slower[task.kind] * graph.seconds[task.name], times.exchange_s)
        share = seconds_a_share * computed[task.kind]
        return share if task.chunk == NO_CHUNK else share / graph.degree

    return graph.timed(seconds_of)
