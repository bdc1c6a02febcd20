"""Probe copies and probe inputs: what a block is run on while it is analysed and verified.

A probe copy lives on the CPU in float64 with random parameters: equal experts (upcycling), zero-initialised weights and
constant buffers would hide what the block computes, and in float64 every cast the block makes is visible as a cast. A
block that mixes in float32 (`one_hot(...).float()`, a router that always computes in float32) does not run in float64:
its probe copy is in float32. Where the block itself holds parameters of two dtypes, float64 stands for that of its tokens.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from moefx.errors import Decline, InputError
from moefx.python_state import Kept, places, restore_items

HOOKS = (
    "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks",
    "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks_with_kwargs",
)  # fmt: skip
_TILE = 1_000_003  # a prime, so that tiled random numbers line up differently in every expert


def random_like(tensor: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Random values of the tensor's shape: matrices scaled by their fan-in, vectors around one."""
    base = torch.randn(min(tensor.numel(), _TILE), generator=generator, dtype=torch.float32).to(dtype)
    base = base.mul_(tensor.shape[-1] ** -0.5) if tensor.dim() > 1 else base.mul_(0.1).add_(1.0)
    if tensor.numel() <= _TILE:
        return base.reshape(tensor.shape)
    values = torch.empty(tensor.shape, dtype=dtype)
    for piece in values.view(-1).split(_TILE):
        piece.copy_(base[: piece.numel()])
    return values


def probe_copy(
    module: nn.Module, seed: int = 0, dtype: torch.dtype = torch.float64, main: torch.dtype | None = None
) -> nn.Module:
    """A private copy of `module` on the CPU with random parameters of `dtype`, without hooks.

    What is parametrized (`torch.nn.utils.parametrize`) is a parameter like others there.
    main: the dtype of the block's tokens; parameters of another one keep theirs (a float32 router beside bf16 experts).
    Integer buffers keep their values; constant float buffers are perturbed. Raises Decline when it cannot be copied.
    """
    generator = torch.Generator().manual_seed(seed)
    memo: dict[int, Any] = {}
    for p in module.parameters():
        own = p.dtype if main is not None and p.dtype != main else dtype
        new = random_like(p, own, generator) if p.is_floating_point() else p.detach().cpu().clone()
        if p.dtype.is_complex:
            raise Decline("a parameter is complex: experts on complex numbers are not rewritten")
        memo[id(p)] = nn.Parameter(new, requires_grad=False)
    for b in module.buffers():
        new = b.detach().cpu().clone()
        if b.is_floating_point():
            new = new.to(dtype)
            if new.numel() > 1 and bool((new == new.flatten()[0]).all()):
                new = new + 0.1 * torch.randn(new.shape, generator=generator, dtype=torch.float32).to(dtype)
        memo[id(b)] = new
    own_forwards = {m: m.__dict__.pop("forward") for m in module.modules() if "forward" in m.__dict__}
    try:
        twin = copy.deepcopy(module, memo)
    except Exception as error:
        raise Decline(f"the block cannot be copied for analysis: {type(error).__name__}: {error}") from error
    finally:
        for m, forward in own_forwards.items():
            m.__dict__["forward"] = forward
    for m in twin.modules():
        for name in HOOKS:
            if name in m.__dict__:
                m.__dict__[name] = type(m.__dict__[name])()
    for m in list(twin.modules()):
        if parametrize.is_parametrized(m):
            _hold_computed(m)
    return twin


def _hold_computed(m: nn.Module) -> None:
    """Makes what is parametrized in a module of a copy a parameter or buffer. torch's `remove_parametrizations` takes the property
    from the class, which is that of the module that was copied too."""
    plain = parametrize.type_before_parametrizations(m)
    steps: Any = m._modules.pop("parametrizations")
    with torch.no_grad():
        values = {name: each().detach().clone() for name, each in steps.items()}
    m.__class__ = plain
    for name, value in values.items():
        if any(True for _ in steps[name].parameters(recurse=False)):
            m.register_parameter(name, nn.Parameter(value, requires_grad=False))
        else:
            m.register_buffer(name, value)


def unpack(twin: nn.Module) -> None:
    """Every parameter of a probe copy has its own storage again (running a region packs them): lifting needs that."""
    for p in twin.parameters():
        if p.untyped_storage().nbytes() != p.numel() * p.element_size():
            p.data = p.data.clone()


class Emulated(TorchDispatchMode):
    """While this is active, probes on the CPU run what only other devices have: torch's grouped_mm in float64, and histc
    of integers, which code takes on a GPU where the CPU would have had floats."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._grouped_mm.default and args[0].dtype == torch.float64:
            return grouped_product(*args, **kwargs)
        if func is torch.ops.aten.histc.default and not args[0].is_floating_point():
            return func(args[0].double(), *args[1:], **kwargs).to(args[0].dtype)
        return func(*args, **kwargs)


def grouped_product(
    a: Tensor, b: Tensor, offs: Tensor | None = None, bias: Tensor | None = None, out_dtype: Any = None
) -> Tensor:
    """The meaning of aten._grouped_mm: products of the segments that `offs` [E] (ends) cuts, or of whole batches."""
    if offs is None:
        return torch.bmm(a, b)
    ends = offs.tolist()
    segments = [slice(start, end) for start, end in zip([0, *ends], ends)]
    if a.dim() == 2 and b.dim() == 2:  # the contracted dimension is cut: [E, M, N]
        product = a.new_empty(len(segments), a.shape[0], b.shape[1])
        for e, s in enumerate(segments):
            torch.mm(a[:, s], b[s], out=product[e])
        return product
    if a.dim() == 2:  # rows are cut
        out = a.new_zeros(a.shape[0], b.shape[2])
        for e, s in enumerate(segments):
            out[s] = a[s] @ b[e]
        return out
    out = a.new_zeros(a.shape[1], b.shape[1])  # columns are cut
    for e, s in enumerate(segments):
        out[:, s] = a[e] @ b[:, s]
    return out


@contextlib.contextmanager
def plain_einsum() -> Iterator[None]:
    """Einsum takes its operands in their order: opt_einsum, where it is installed, may sum over slots and features at once.

    Its own `flags` cannot be entered twice: it would set a strategy while opt_einsum is off.
    """
    before = torch.backends.opt_einsum.enabled
    torch.backends.opt_einsum.set_flags(False)
    try:
        yield
    finally:
        torch.backends.opt_einsum.set_flags(before)


@contextlib.contextmanager
def own_cores() -> Iterator[None]:
    """Inside, torch uses three quarters of the host's cores at most, or of this rank's share of them where torchrun started it.

    With torchrun's own setting, one thread a rank, analysis takes three times as long. With all cores, one that is busy with
    something else (a data loader, a compiler's process) holds up every operator: the probe copy took 3 to 20 times as long.
    """
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "0"))
    before = torch.get_num_threads()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    share = cores // max(ranks, 1)
    threads = max(share - share // 4, 1)
    torch.set_num_threads(threads if ranks and before == 1 else min(threads, before))
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def eagerly() -> Iterator[None]:
    """Inside, what the user has compiled runs as it is written."""
    try:
        stance = torch.compiler.set_stance("force_eager")
    except RuntimeError:  # while Dynamo traces, and compiled code does not run
        yield
        return
    with stance:
        yield


@contextlib.contextmanager
def neutral() -> Iterator[None]:
    """Analysis runs outside of the caller's inference_mode, no_grad and autocast, on some of the cores (`own_cores`)."""
    with torch.inference_mode(False), torch.enable_grad(), own_cores(), contextlib.ExitStack() as stack:
        for device in ("cpu", "cuda"):
            stack.enter_context(torch.autocast(device, enabled=False))
        yield


@contextlib.contextmanager
def state_kept(module: nn.Module) -> Iterator[None]:
    """Runs of the user's own module inside leave no trace.

    Buffers, plain attributes, the globals that its code names and the random state are put back.
    """
    attributes = {child: _shallow(vars(child)) for child in module.modules()}
    outside = Kept([place for child in module.modules() for place in places(child)])
    buffers = [(b, b.detach().clone()) for b in module.buffers()]
    devices = list({p.device for p in module.parameters() if p.device.type == "cuda"})
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        for child, before in attributes.items():
            for name in [n for n in vars(child) if n not in before and _put_back(n)]:
                del child.__dict__[name]
            for name, (value, content) in before.items():
                child.__dict__[name] = value
                if content is not None:
                    restore_items(value, content)
        outside.put_back()
        with torch.no_grad():
            for b, before_b in buffers:
                # a needless write would spoil the backward of a call that saved the buffer
                if b.shape == before_b.shape and not torch.equal(b, before_b):
                    b.copy_(before_b)


def _shallow(state: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Each attribute with a shallow copy of its content where it is a container."""
    return {
        n: (v, copy.copy(v) if type(v) in (list, set, dict) else None)
        for n, v in state.items()
        if _put_back(n)
    }


def _put_back(name: str) -> bool:
    """Which attributes of a module are. Parameters come and go by themselves where they are spread over ranks (`fully_shard`):
    what does that would not know."""
    return not name.endswith("_hooks") and name != "_parameters"


def bind(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The call in one normal form: everything that can be positional is positional, defaults filled in.

    Raises InputError naming the module and its signature when the arguments do not fit.
    """
    signature = inspect.signature(type(module).forward)
    try:
        bound = signature.bind(module, *args, **kwargs)
    except TypeError as error:
        raise InputError(f"{type(module).__name__}.forward{signature} does not take these inputs: {error}") from None
    bound.apply_defaults()
    return tuple(bound.args[1:]), dict(bound.kwargs)


@dataclass(frozen=True)
class Example:
    """One real call of a block, moved to the CPU: the pattern from which probe inputs are drawn.

    features: the axis of a token's features in float tensors; the others are token dimensions. 1: images, channels first.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    features: int = -1

    @staticmethod
    def of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Example:
        def keep(x: Any) -> Any:
            return x.detach().cpu().clone() if isinstance(x, Tensor) else copy.deepcopy(x)

        with torch.inference_mode(False):  # inference tensors would not take part in autograd
            return Example(*pytree.tree_map(keep, (tuple(args), dict(kwargs))))

    def leaves(self) -> list[Any]:
        return list(pytree.tree_leaves((self.args, self.kwargs)))

    @property
    def dtype(self) -> torch.dtype:
        """Of its first floating-point tensor; float32 where it has none."""
        floats = (t.dtype for t in self.leaves() if isinstance(t, Tensor) and t.is_floating_point())
        return next(floats, torch.float32)

    @property
    def token_sizes(self) -> tuple[int, ...]:
        """The distinct sizes of token dimensions: all but the features of float tensors, else all of integer tensors."""
        tensors = [t for t in self.leaves() if isinstance(t, Tensor)]
        floats = [t for t in tensors if t.is_floating_point() and t.dim() >= 2]
        dims = [n for t in floats for n in self._lengths(t)] or [
            n for t in tensors if not t.is_floating_point() for n in t.shape
        ]
        return tuple(dict.fromkeys(dims))

    def _lengths(self, t: Tensor) -> list[int]:
        return [n for d, n in enumerate(t.shape) if d != self.features % t.dim()]

    @property
    def repeats(self) -> int:
        """How many token dimensions share the one token size: a batch of one sequence of one token, of n times n tokens."""
        if len(self.token_sizes) != 1:
            return 1
        floats = [t for t in self.leaves() if isinstance(t, Tensor) and t.is_floating_point() and t.dim()]
        return max([1, *(self._lengths(t).count(self.token_sizes[0]) for t in floats)])


# token shapes to draw, by the number of token dimensions
SHAPES: dict[int, tuple[tuple[int, ...], ...]] = {
    0: ((),),
    1: ((53,), (37,), (1,), (211,)),
    2: ((3, 17), (2, 23), (1, 1), (5, 43)),
    3: ((3, 2, 9), (2, 5, 7), (1, 1, 1), (5, 3, 13)),
}


def shapes_for(example: Example) -> tuple[tuple[int, ...], ...]:
    rank = len(example.token_sizes)
    if example.repeats > 1:
        return tuple((round(n ** (1 / example.repeats)),) for (n,) in SHAPES[1])
    if rank in SHAPES:
        return SHAPES[rank]
    raise Decline(f"the block's inputs have {rank} different leading sizes; which of them are tokens is unclear")


def guess_experts(module: nn.Module) -> int:
    """How many experts there may be: the commonest leading size of stacked parameters, or of repeated equal shapes."""
    stacks = Counter(p.shape[0] for p in module.parameters() if p.dim() >= 3)
    if stacks:
        most = max(stacks.values())
        return max(n for n, count in stacks.items() if count == most)
    repeats = Counter(tuple(p.shape) for p in module.parameters() if p.dim() >= 2)
    return max(repeats.values(), default=1)


def dtype_of(module: nn.Module) -> torch.dtype:
    """The dtype of a probe copy, that of its tokens: the widest of its parameters."""
    held = [p.dtype for p in module.parameters() if p.is_floating_point()]
    return max(held, key=lambda dtype: dtype.itemsize, default=torch.float64)


def draw(
    example: Example,
    token_shape: tuple[int, ...],
    seed: int,
    experts: int,
    tokens: str = "random",
    dtype: torch.dtype = torch.float64,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Fresh inputs in the example's pattern with other token sizes.

    tokens: "random"; "alike": every token the same; "near": nearly the same (skewed routing); "one": like random, but
    integer routing inputs send every token to the same experts.
    """
    generator = torch.Generator().manual_seed(seed)
    new_size = dict(zip(example.token_sizes, token_shape))
    leaves, spec = pytree.tree_flatten((example.args, example.kwargs))
    partners = [tuple(t.shape) for t in leaves if isinstance(t, Tensor) and t.is_floating_point()]

    floats = [t for t in leaves if isinstance(t, Tensor) and t.is_floating_point() and t.dim() >= 2]
    only_masks = all(map(_is_mask, floats))  # an example of zeros or ones: then it is no mask, but the tokens

    def resize(t: Tensor, dims: range) -> Tensor:
        for d in dims:
            if t.shape[d] in new_size:
                pick = torch.randint(0, max(t.shape[d], 1), (new_size[t.shape[d]],), generator=generator)
                t = t.index_select(d, pick)
        return t.clone()

    def fresh(t: Any) -> Any:
        if not isinstance(t, Tensor):
            return copy.deepcopy(t)
        if t.is_floating_point():
            if t.dim() < 2 or _is_mask(t) and not only_masks:
                return resize(t, range(t.dim())).to(dtype)
            axis = example.features % t.dim()
            shape = [n if d == axis else new_size.get(n, n) for d, n in enumerate(t.shape)]
            if any(not i.is_floating_point() and i.shape == t.shape for i in leaves if isinstance(i, Tensor)):
                return (torch.rand(shape, generator=generator) + 0.1).to(dtype)
            if tokens not in ("alike", "near"):
                return torch.randn(shape, generator=generator).to(dtype)
            token = torch.randn(shape[axis], generator=generator).view(-1, *[1] * (t.dim() - 1 - axis)).expand(shape)
            return (token + 0.01 * torch.randn(shape, generator=generator) if tokens == "near" else token.clone()).to(dtype)
        if t.dim() >= 2 and tuple(t.shape) in partners and t.dtype != torch.bool:
            shape = [new_size.get(n, n) for n in t.shape[:-1]]
            limit = max(experts, t.shape[-1], int(t.max()) + 1 if t.numel() else 0)
            scores = torch.rand([*shape, limit], generator=generator)
            if tokens in ("alike", "one"):
                scores = scores[(0,) * len(shape)].expand_as(scores) if scores.numel() else scores
            return scores.argsort(-1)[..., : t.shape[-1]].to(t.dtype)
        t = resize(t, range(t.dim()))
        if t.dim() >= 2 and t.shape[-1] == experts > 1 and t.numel() and bool(((t == 0) | (t == 1)).all()):
            turn = torch.randint(0, experts, t.shape[:-1], generator=generator)  # a mask over experts: turn each row
            t = t.gather(-1, (torch.arange(experts) + turn[..., None]) % experts)
        return t

    args, kwargs = pytree.tree_unflatten([fresh(t) for t in leaves], spec)
    return args, kwargs


def _is_mask(t: Tensor) -> bool:
    """A float tensor of very few different values is a mask, not data."""
    if len(set(t.flatten()[:16].tolist())) > 4:
        return False  # seen at a glance (non-finite values count once each)
    return t.numel() > 8 and len(torch.unique(t[torch.isfinite(t)])) <= 2
