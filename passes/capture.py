"""capture: nn.Module + inputs --> Trace, the torch-level program that one run of the block executed.

One run is recorded at two levels at once:

* here, at the level of torch functions and module calls, as the user wrote them. This level is *replayable*: autograd,
  autocast, no_grad regions and module hooks behave as in the original. The rewritten block is built from it.
* below the dispatcher (`watch`, given by find), where every spelling has become the same few aten operators. This level
  is only *analysed*.

Both see the very same tensors, so no matching between the two is needed. Values are renamed at every in-place write: a
Value is a tensor object at one version of its storage. Sizes keep their provenance (`moefx.sizes`).
"""

from __future__ import annotations

import builtins
import contextlib
import inspect
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from moefx import sizes
from moefx.constants import remembered
from moefx.errors import Decline
from moefx.probe import Emulated, plain_einsum
from moefx.python_state import attributes, changed, picture, places
from moefx.structure import taken_apart
from moefx.trace import HOST_READS, Call, ModuleCall, Trace, Value, rebuild, user_line

DETACHES = ("detach", "data")


class Recorder(TorchFunctionMode):
    """Records torch functions and module calls while a block runs."""

    def __init__(self, module: nn.Module, is_tainted: Callable[[Tensor], bool]) -> None:
        super().__init__()
        self.module, self.is_tainted = module, is_tainted
        self.calls: list[Call] = []
        self.module_calls: list[ModuleCall] = []
        self.values: list[Value] = []
        self.log = sizes.Log([], [])
        self.scope: tuple[ModuleCall, ...] = ()
        self._known: dict[tuple[Any, ...], Value] = {}
        self._alive: list[Any] = []  # keeps storages alive, so that their addresses stay unique
        self._detached: dict[int, Tensor] = {}  # by id: tensors without a past that lie where others with one do
        self._attributes: dict[int, tuple[str, str]] = {}
        for path, child in module.named_modules():
            for name, tensor in vars(child).items():
                if isinstance(tensor, Tensor):
                    self._attributes[id(tensor)] = ("attr", f"{path}.{name}".lstrip("."))
        self._parameter_storages = {
            p.untyped_storage()._cdata for p in module.parameters()
        }  # views of them are not copied
        for kind, named in (("param", module.named_parameters()), ("buffer", module.named_buffers())):
            for path, tensor in named:
                self._attributes[id(tensor)] = (kind, path)

    # ------------------------------------------------------------------ values

    def value_of(self, tensor: Tensor, producer: Call | None = None, origin: str = "", path: str = "") -> Value:
        """The Value of a tensor now; a new one if this version of it was not seen before."""
        if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
            return self._new(tensor, (id(tensor),), "unseen", "", None, None)
        storage = tensor.untyped_storage()._cdata
        apart = id(tensor) in self._detached
        alias = (storage, tensor.storage_offset(), tuple(tensor.shape), tensor.stride(), tensor.dtype, apart)
        key = (*alias, tensor._version)
        if key in self._known:
            return self._known[key]
        root = self._known.get((*alias, "object"))  # the same view of the same storage at an earlier version
        if not origin:
            if root is not None and producer is None:
                origin, path, producer = root.origin, root.path, root.producer
            else:
                known = self._attributes.get(id(tensor), ("unseen", ""))
                origin, path = ("call", "") if producer is not None else known
        value = self._new(tensor, key, origin, path, producer, root)
        self._known.setdefault((*alias, "object"), value.object)
        return value

    def _new(
        self, tensor: Tensor, key: Any, origin: str, path: str, producer: Call | None, root: Value | None
    ) -> Value:
        self._alive.append(tensor)
        wrapped = torch._C._functorch.is_functorch_wrapped_tensor(tensor)
        of_parameter = not wrapped and tensor.untyped_storage()._cdata in self._parameter_storages
        keep = origin not in ("param", "buffer", "attr") and not wrapped and not of_parameter
        with torch._C.DisableTorchFunction(), torch._C._DisableTorchDispatch(), torch.no_grad():
            snapshot = tensor.detach().clone() if keep else tensor.detach()
        storage, version = (-1, -1) if wrapped else (tensor.untyped_storage()._cdata, tensor._version)
        value = Value(len(self.values), snapshot, storage, version, origin, path, producer, root)
        value.tainted = not wrapped and self.is_tainted(tensor)
        self.values.append(value)
        self._known[key] = value
        return value

    def symbols(self, structure: Any) -> Any:
        """The structure with Values in place of tensors."""
        return rebuild(structure, lambda x: self.value_of(x) if isinstance(x, Tensor) else x)

    # ------------------------------------------------------------------ torch functions

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if any(torch._C._functorch.is_functorch_wrapped_tensor(t) for t in tensors):
            return func(*args, **kwargs)
        if (answer := self._size_query(func, args, kwargs)) is not None:
            return answer
        symbolic_args, symbolic_kwargs = self.symbols(args), self.symbols(kwargs)
        call = Call(
            len(self.calls), func, symbolic_args, symbolic_kwargs, self.scope, torch.is_grad_enabled(), user_line()
        )
        before = [t._version for t in tensors]
        result = func(*rebuild(args, sizes.plain), **rebuild(kwargs, sizes.plain))
        return self._finish(call, result, tensors, before)

    def _finish(self, call: Call, result: Any, tensors: list[Tensor], before: list[int]) -> Any:
        made = [t for t in pytree.tree_leaves(result) if isinstance(t, Tensor)]
        written = [t for t, version in zip(tensors, before) if t._version != version]
        if not made and not written and call.name not in HOST_READS:
            return result
        sources = tensors if call.name in DETACHES else [t for t in tensors if id(t) in self._detached]
        storages, given = {t.untyped_storage()._cdata for t in sources}, {id(t) for t in tensors}
        views = [t for t in made if t.untyped_storage()._cdata in storages and id(t) not in given]
        self._detached.update({id(t): t for t in views})
        self.calls.append(call)
        call.writes = tuple(dict.fromkeys(self.value_of(t, call) for t in written))
        call.result = rebuild(result, lambda x: self.value_of(x, call) if isinstance(x, Tensor) else x)
        return result

    def _size_query(self, func: Any, args: Any, kwargs: Any) -> Any:
        """x.shape, x.size(...), x.numel(), len(x) answered with sizes that remember their expression."""
        owner = getattr(func, "__self__", None)
        name = owner.__name__ if inspect.isgetsetdescriptor(owner) else getattr(func, "__name__", "")
        if name not in ("shape", "size", "numel", "nelement", "__len__") or not isinstance(args[0], Tensor):
            return None
        value = self.value_of(args[0])
        shape = [sizes.make(n, sizes.Expr(sizes.size_of, (value, d)), self.log) for d, n in enumerate(value.shape)]
        if name == "__len__":
            return shape[0]
        if name in ("numel", "nelement"):
            product: Any = 1
            for n in shape:
                product = product * n
            return product
        dim = args[1] if len(args) > 1 else kwargs.get("dim")
        return torch.Size(shape) if dim is None else shape[dim]

    def function_apply(self, cls: Any, original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """A custom autograd.Function stays one opaque call: its backward is the user's own."""
        tensors = [t for t in args if isinstance(t, Tensor)]
        grad_enabled = torch.is_grad_enabled()
        with torch._C.DisableTorchFunction():
            call = Call(
                len(self.calls), cls.apply, self.symbols(args), self.symbols(kwargs), self.scope, grad_enabled, user_line()
            )
            before = [t._version for t in tensors]
            result = original(*rebuild(args, sizes.plain), **rebuild(kwargs, sizes.plain))
            return self._finish(call, result, tensors, before)

    # ------------------------------------------------------------------ module calls

    def enter(self, path: str, args: Any, kwargs: Any) -> None:
        with torch._C.DisableTorchFunction():
            call = ModuleCall(path, len(self.calls), self.scope, self.symbols(args), self.symbols(kwargs))
        self.module_calls.append(call)
        self.scope = (*self.scope, call)

    def leave(self, result: Any) -> None:
        call = self.scope[-1]
        call.stop = len(self.calls)
        with torch._C.DisableTorchFunction():
            call.result = self.symbols(result)
        self.scope = self.scope[:-1]


@contextlib.contextmanager
def _observed(module: nn.Module, recorder: Recorder) -> Iterator[None]:
    """Reports module calls and custom autograd.Functions to the recorder."""
    handles = []
    for path, child in module.named_modules():
        if child is module:
            continue
        enter = lambda _m, a, k, path=path: recorder.enter(path, a, k)  # noqa: E731
        handles.append(child.register_forward_pre_hook(enter, with_kwargs=True))
        handles.append(child.register_forward_hook(lambda _m, _a, out: recorder.leave(out)))
    function = torch.autograd.Function
    original = function.__dict__["apply"]

    def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        return recorder.function_apply(cls, original.__get__(None, cls), args, kwargs)

    def size_aware_len(obj: Any) -> int:
        """`len` insists on a plain int from __len__, which would lose the expression."""
        return obj.size(0) if isinstance(obj, Tensor) and obj.dim() else plain_len(obj)

    def size_aware(choose: Callable[..., Any]) -> Callable[..., Any]:
        """min and max of sizes as expressions: no branch to guard."""

        def call(*args: Any, **kwargs: Any) -> Any:
            cut = {n: expr for expr, n in recorder.log.truncations if n > 1}
            if cut and not kwargs and len(args) > 1:  # max(1, int(factor * tokens)): the number that int() cut
                args = tuple(sizes.make(a, cut[a], recorder.log) if type(a) is int and a in cut else a for a in args)
            if not kwargs and len(args) > 1 and any(isinstance(a, (sizes.Size, sizes.Fraction)) for a in args):
                return sizes.apply(choose, *args)
            return choose(*args, **kwargs)

        return call

    plain_len, plain_min, plain_max = builtins.len, builtins.min, builtins.max
    function.apply = classmethod(apply)  # type: ignore[assignment, method-assign]
    builtins.len = size_aware_len  # type: ignore[assignment]
    builtins.min, builtins.max = size_aware(plain_min), size_aware(plain_max)  # type: ignore[assignment]
    try:
        yield
    finally:
        builtins.len, builtins.min, builtins.max = plain_len, plain_min, plain_max
        function.apply = original  # type: ignore[method-assign]
        for handle in handles:
            handle.remove()


def capture(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], watch: Any = None) -> Trace:
    """Runs `module(*args, **kwargs)` once and returns its Trace.

    module: a private copy of the block on the CPU, without hooks. watch: a mode that emulates as `Emulated` does and has a
    method `is_tainted(tensor)`, active below the recording. Raises Decline when the block itself fails on these inputs.
    """
    recorder = Recorder(module, watch.is_tainted if watch is not None else lambda _t: False)
    leaves, _ = pytree.tree_flatten((args, kwargs))
    inputs = tuple(
        recorder.value_of(x, None, "input", f"in{i}") if isinstance(x, Tensor) else x for i, x in enumerate(leaves)
    )
    before = {path: _state(child) for path, child in module.named_modules()}
    with (
        _observed(module, recorder),
        remembered(module, recorder.log),
        torch.enable_grad(),
        plain_einsum(),
        watch or Emulated(),
        recorder,
    ):
        try:
            result = module.forward(*args, **kwargs)
        except Exception as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            text = f"the block raised {type(error).__name__} on probe inputs: {str(error)[:200]}"
            raise Decline(text, location=f"{last.filename}:{last.lineno}") from error
    flat, structure = taken_apart(result)
    symbolic = [recorder.value_of(x) if isinstance(x, Tensor) else x for x in flat]
    taken = [recorder.value_of(x) for x in leaves if isinstance(x, Tensor)]
    effects = [
        (path, name)
        for path, child in module.named_modules()
        for name in changed(before.get(path, {}), _state(child))
    ]
    return Trace(
        inputs,
        tuple(taken),
        (symbolic, structure),
        tuple(recorder.calls),
        tuple(recorder.module_calls),
        tuple(recorder.values),
        recorder.log,
        tuple(effects),
        module,
    )


def _state(module: nn.Module) -> dict[str, Any]:
    """Pictures of all that a module's code may leave behind, by what a person calls it."""
    own = {f"self.{name}": value for name, value in attributes(module).items()}
    return own | {str(place): picture(place.get()) for place in places(module)}
