"""Lifting: which rows of which tensors are f(x_t; theta_e), found below the dispatcher for all experts at once.

Every element of every tensor carries a *code* that says what it is:

    0                    a constant zero
    DATA (-1)            anything not understood; also plain data
    handle << 34 | col   an element of the thing the handle names:
        leaf p           element `col` of parameter p
        dot (p, n, s, cast, row)  sum_i row[i] * p.flatten()[col + i*s]: a row contracted with one column of a parameter
        val row          feature `col` of a template value

Codes live on storages, so views need no rule at all. An operator that only moves elements is run again on the codes, so
`index`, `cat`, `gather`, `index_put_` ... need no rule of their own either. What remains are four rules: contraction with a
parameter, pointwise, reduction over the features, and the routing weight (a multiplication by one number a row). What an
expert does to its tokens before its first parameter is plain data when it happens, and is followed back when that comes.

A Row is a template value for one token and one binding. A template value is a hash-consed expression whose holes are
parameter slices; the binding says which slices fill the holes. Experts are the bindings of one template value: that they
compute the same function of different parameters needs no check, it is what equality of hash-consed expressions means.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from moefx.passes._keys import distinct, flat_offsets, hash_rows, runs_of
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from moefx.probe import Emulated
from moefx.trace import user_line

DATA = -1
ZERO = 0
COL_BITS = 34
COL_MASK = (1 << COL_BITS) - 1
MAX_PARAM_ONLY = (
    1 << 16
)  # parameter-only arithmetic is followed up to this many elements (1 + norm weight, not W + B @ A)

Signature = tuple[
    str, tuple[Any, ...], tuple[tuple[str, Any], ...]
]  # operator name, args and kwargs with Child operands
Piece = tuple[int, int]  # (parameter number, flat offset): what fills a hole


@dataclass(frozen=True)
class Child:
    """Operand `index` of an op node."""

    index: int


class Row(NamedTuple):
    """Template value `tv` with its holes filled by `binding`, for token `token` (None: no token), times weight `gate`."""

    tv: int
    binding: tuple[Piece, ...]
    token: int | None
    gate: float | None


@dataclass(frozen=True)
class Node:
    """One template value. Holes are filled left to right by a binding.

    kind "x": the token row. "linear": child 0 times a hole (I, O) with strides, cast to a dtype if that is not None.
    "vector": a hole (n,) with a stride.
    "op": aten operator `name` on the children. "columns": features start, start+step, ... of child 0.
    "item": member of a tuple-valued op. "gate": child 0 times the routing weight.
    children: (template value, positions of its holes in this value's binding).
    """

    kind: str
    width: int
    children: tuple[tuple[int, tuple[int, ...]], ...] = ()
    name: str = ""
    args: tuple[Any, ...] = ()
    kwargs: tuple[tuple[str, Any], ...] = ()


class Made(NamedTuple):
    """A call that made a tensor of plain data, or changed it, and the versions of the other tensors that it read."""

    func: Any
    args: Any
    kwargs: Any
    result: Tensor
    read: tuple[tuple[Tensor, int], ...]


# By the template values and bindings of operands, what one operator makes of them.
Joined = dict[Any, tuple[int, tuple[Piece, ...]]]

# Operators that move elements, and the arguments that hold the elements moved (the others are indices and sizes).
MOVES: dict[str, tuple[int, ...]] = {
    **dict.fromkeys(
        "index index_select gather clone repeat flip roll masked_select take embedding repeat_interleave "
        "constant_pad_nd lift_fresh_copy view_copy expand_copy permute_copy _unsafe_view contiguous slice_copy".split(),
        (0,),
    ),
    "cat": (0,),
    "stack": (0,),
    "index_put": (0, 2),
    "_unsafe_index_put": (0, 2),
    "_index_put_impl": (0, 2),
    "masked_scatter": (0, 2),
    "index_copy": (0, 3),
    "scatter": (0, 3),
    "slice_scatter": (0, 1),
    "select_scatter": (0, 1),
    "where": (1, 2),
}
ZERO_FACTORIES = frozenset(
    "zeros zeros_like new_zeros empty empty_like new_empty empty_strided new_empty_strided zero".split()
)
FILLS = {"scalar_tensor": 0, "full": 1, "full_like": 1, "new_full": 2}  # and where the value stands
# op: (index of x, index of W, index of bias or None, whether W is transposed [O, I])
CONTRACTIONS: dict[str, tuple[int, int, int | None]] = {
    "mm": (0, 1, None), "bmm": (0, 1, None), "addmm": (1, 2, 0), "baddbmm": (1, 2, 0), "mv": (0, 1, None), "addmv": (1, 2, 0),
}  # fmt: skip
REDUCTIONS = frozenset("sum mean amax amin var std linalg_vector_norm prod".split())
ROWWISE = frozenset("_softmax _log_softmax softmax log_softmax glu".split())
POINTWISE = frozenset(("_prelu_kernel",))  # beside those with torch's tag
NORMS = frozenset("native_layer_norm _fused_rms_norm rms_norm".split())
RANDOM = frozenset("bernoulli native_dropout rand_like randn_like uniform normal rand randn dropout".split())


class Lifter(Emulated):
    """Follows one run of a block. `experts`: the parameters that may start a lift (None: all of them).

    It emulates what it follows itself: below another mode, each of the small operators by which it follows would pass that, too.
    """

    def __init__(self, module: nn.Module, experts: frozenset[str] | None = None) -> None:
        super().__init__()
        self.names: list[str] = []
        self.tensors: list[Tensor] = []
        self.param_of: dict[int, int] = {}
        self.buffers: set[int] = set()
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            self.param_of[tensor.untyped_storage()._cdata] = len(self.names)
            self.names.append(name)
            self.tensors.append(tensor.detach())
        self.experts = None if experts is None else frozenset(i for i, n in enumerate(self.names) if n in experts)
        self.handles: list[tuple[Any, ...]] = [()]
        self.rows: list[Row] = [Row(-1, (), None, None)]
        self.nodes: list[Node] = []
        self.uses: dict[int, dict[tuple[Piece, ...], list[int]]] = {}  # template value -> binding -> row numbers
        self.notes: list[str] = []  # why lifting stopped, for near misses
        self._handle_of: dict[tuple[Any, ...], int] = {}
        self._row_of: dict[Row, int] = {}
        self._node_of: dict[Node, int] = {}
        self._codes: dict[int, Tensor | int] = {}
        self._itemsize: dict[int, int] = {}
        self._tainted: set[int] = set()
        self._random: set[int] = set()  # storages of random numbers
        self._alive: list[Tensor] = []
        self._made: dict[int, list[Made]] = {}  # by storage: plain data of which each row may follow from one token
        self._token_of: dict[int, int] = {}
        self.token_dtypes: set[torch.dtype] = set()  # in which tokens were read
        if self.experts is not None:
            self._tainted |= {self.tensors[i].untyped_storage()._cdata for i in self.experts}

    def note(self, text: str) -> None:
        """Why lifting stopped, with the line of the user's that made it stop."""
        self.notes.append(f"{text} at {user_line()}")

    # ------------------------------------------------------------------ tables

    def node(self, node: Node) -> int:
        if node not in self._node_of:
            self._node_of[node] = len(self.nodes)
            self.nodes.append(node)
        return self._node_of[node]

    def row(self, row: Row) -> int:
        number = self._row_of.get(row)
        if number is None:
            number = self._row_of[row] = len(self.rows)
            self.rows.append(row)
            self.uses.setdefault(row.tv, {}).setdefault(row.binding, []).append(number)
        return number

    def handle(self, key: tuple[Any, ...]) -> int:
        if key not in self._handle_of:
            self._handle_of[key] = len(self.handles)
            self.handles.append(key)
        return self._handle_of[key]

    def token_ids(self, rows: Tensor) -> Tensor:
        """Numbers for data rows [N, D]: equal rows get equal numbers, an all-zero row gets 0."""
        hashes = hash_rows(rows)
        unique, inverse = torch.unique(hashes, return_inverse=True)
        ids = [self._token_of.setdefault(h, len(self._token_of) + 1) for h in unique.tolist()]
        self.token_dtypes.add(rows.dtype)
        numbers = torch.tensor(ids)[inverse] if ids else torch.zeros(0, dtype=torch.int64)
        return torch.where((rows == 0).all(-1), 0, numbers)

    def token_hashes(self) -> dict[int, int]:
        """token number -> row hash."""
        return {number: h for h, number in self._token_of.items()}

    # ------------------------------------------------------------------ codes on storages

    def is_tainted(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self._tainted

    def codes(self, tensor: Tensor) -> Tensor | int:
        """The codes of a tensor's elements: a tensor of its shape, or one number for all."""
        storage = tensor.untyped_storage()._cdata
        found = self._codes.get(storage)
        if found is None:
            param = self.param_of.get(storage)
            if param is None or tensor.dtype.is_complex:
                return DATA
            base = self.handle(("leaf", param)) << COL_BITS
            return base + flat_offsets(tensor)
        if isinstance(found, int):
            return found
        if self._itemsize[storage] != tensor.itemsize:
            return DATA
        return found.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())

    def set_codes(self, tensor: Tensor, codes: Tensor | int) -> None:
        storage = tensor.untyped_storage()._cdata
        if tensor.numel() == 0 or storage in self.param_of:
            return
        whole = tensor.numel() * tensor.itemsize == tensor.untyped_storage().nbytes()
        current = self._codes.get(storage, DATA)
        if isinstance(codes, int) and (whole or isinstance(current, int) and codes == current):
            self._codes[storage] = codes
            self._itemsize[storage] = tensor.itemsize
            return
        flat = self._codes.get(storage, DATA)
        if isinstance(flat, int):
            flat = torch.full((tensor.untyped_storage().nbytes() // tensor.itemsize,), flat, dtype=torch.int64)
            self._codes[storage], self._itemsize[storage] = flat, tensor.itemsize
        flat.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).copy_(
            codes if isinstance(codes, Tensor) else torch.tensor(codes)
        )

    def _settle(self, tensors: list[Tensor]) -> None:
        """Rows that leave the lifted world become known as rows, products that nothing consumed included."""
        for t in tensors:
            codes = self.codes(t)
            if (
                isinstance(codes, Tensor)
                and t.untyped_storage()._cdata not in self.param_of
                and self._holds_rows(codes)
            ):
                axis = self._feature_axis(codes)
                if axis is not None:
                    self.normalise(codes, axis)

    def _full(self, tensor: Tensor) -> Tensor:
        codes = self.codes(tensor)
        return codes if isinstance(codes, Tensor) else torch.full(tensor.shape, codes, dtype=torch.int64)

    def _lifted(self, tensor: Any) -> bool:
        """Whether a tensor holds any element that is not plain data or zero."""
        if not isinstance(tensor, Tensor) or tensor.numel() == 0:
            return False
        storage = tensor.untyped_storage()._cdata
        if storage in self.param_of:
            return True
        found = self._codes.get(storage)
        return isinstance(found, Tensor) and bool((self.codes(tensor) > 0).any())  # type: ignore[operator, union-attr]

    def _kind(self, code: int) -> str:
        return self.handles[code >> COL_BITS][0] if code > 0 else ""

    # ------------------------------------------------------------------ the dispatch mode

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = super().__torch_dispatch__(func, types, args, kwargs)
        inputs = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        outputs = [t for t in pytree.tree_leaves(result) if isinstance(t, Tensor)]
        self._alive.extend(outputs)
        if any(self.is_tainted(t) for t in inputs):
            self._tainted.update(t.untyped_storage()._cdata for t in outputs)
        self._follow(func, args, kwargs, result, inputs, outputs)
        return result

    def _follow(
        self, func: Any, args: Any, kwargs: Any, result: Any, inputs: list[Tensor], outputs: list[Tensor]
    ) -> None:
        name = func._schema.name.split("::")[-1]
        inplace = func._schema.is_mutable
        base = name[:-1] if inplace and name.endswith("_") else name
        shared = {t.untyped_storage()._cdata for t in inputs}
        if not inplace and outputs and all(t.untyped_storage()._cdata in shared for t in outputs):
            return  # a view: codes live on the storage
        lifted = any(self._lifted(t) for t in inputs)
        for t in outputs:
            self._remember(func, base, args, kwargs, t, None if lifted or len(outputs) > 1 else inputs)
        if base in RANDOM:
            self._random.update(t.untyped_storage()._cdata for t in outputs)
        if base in ZERO_FACTORIES or base in FILLS and args[FILLS[base]] == 0:
            for t in outputs:
                self.set_codes(t, ZERO)
            return
        if not lifted:
            if base in MOVES or base in ("copy", "fill", "masked_fill"):
                if any(self.codes(t) is not DATA for t in inputs):
                    self._move(func, base, args, kwargs, result, inplace)
                return
            for t in outputs:
                if t.untyped_storage()._cdata in self._codes:
                    self.set_codes(t, DATA)
            return
        codes: Tensor | int | None
        if base in RANDOM and not (base == "native_dropout" and (args[1] == 0 or args[2] is False)):
            self.note(f"a random operator ({base}) acts on an expert's values")
            codes = None
        elif base in CONTRACTIONS:
            codes = self._contraction(base, args, kwargs)
        elif base in MOVES and not (base == "where" and self._lifted(args[0])) or base in ("copy", "fill"):
            self._move(func, base, args, kwargs, result, inplace)
            return
        elif base == "masked_fill" and not self._lifted(args[1]):
            self._move(func, base, args, kwargs, result, inplace)
            return
        elif base in ("_to_copy", "native_dropout"):
            codes = self._cast(args, kwargs, outputs[0]) if base == "_to_copy" else self.codes(args[0])
        elif base in REDUCTIONS or base in ROWWISE:
            codes = self._feature_op(func, base, args, kwargs, outputs[0])
        elif base in NORMS:
            codes = self._norm(func, args, kwargs)
        elif _is_pointwise(func, base) and len(outputs) == 1:
            codes = self._pointwise(func, args, kwargs, outputs[0])
        else:
            codes = self._grouped(args, outputs[0]) if len(outputs) == 1 and outputs[0].dim() == 2 else None
        if codes is None:
            self._settle(inputs)
            if any(t.untyped_storage()._cdata in self._random for t in inputs):
                self.note("random numbers meet an expert's values")
            if any(isinstance(self._codes.get(t.untyped_storage()._cdata), Tensor) for t in inputs):
                self.note(f"what happens to an expert's values is not followed beyond {func}")
        for i, t in enumerate(outputs):
            self.set_codes(t, DATA if codes is None or i > 0 else codes)

    # ------------------------------------------------------------------ rule 0: moving elements

    def _move(self, func: Any, base: str, args: Any, kwargs: Any, result: Any, inplace: bool) -> None:
        out = result if isinstance(result, Tensor) else args[0]
        if base == "copy":
            self.set_codes(args[0], self._full(args[1]).expand(args[0].shape))
            return
        if base == "fill":
            self.set_codes(out, ZERO if not isinstance(args[1], Tensor) and args[1] == 0 else DATA)
            return
        if base == "masked_fill":
            value = args[2].item() if isinstance(args[2], Tensor) and args[2].dim() == 0 else args[2]
            kept = self._full(args[0]).clone()
            self.set_codes(out, kept.masked_fill(args[1], ZERO if value == 0 else DATA))
            return
        accumulates = base in ("index_put", "_unsafe_index_put", "_index_put_impl") and len(args) > 3 and args[3]
        scalar = base in ("scatter", "where") and any(
            not isinstance(args[i], Tensor) for i in MOVES[base] if i < len(args)
        )
        padded = base == "constant_pad_nd" and len(args) > 2 and args[2] != 0
        if accumulates or padded or (scalar and base == "scatter") or "reduce" in kwargs or kwargs.get("accumulate"):
            self._settle([a for a in args if isinstance(a, Tensor)])
            self.set_codes(out, DATA)
            return
        replaced = list(args)
        for i in MOVES[base]:
            if i < len(args):
                replaced[i] = self._code_argument(args[i])
        if base == "embedding":
            replaced = replaced[:2]
        moved = func(*replaced, **{k: v for k, v in kwargs.items() if k not in ("dtype", "memory_format")})
        self.set_codes(out, moved)

    def _code_argument(self, arg: Any) -> Any:
        if isinstance(arg, (list, tuple)):
            return [self._code_argument(a) for a in arg]
        if isinstance(arg, Tensor):
            return self._full(arg).clone()
        return ZERO if arg == 0 else DATA

    # ------------------------------------------------------------------ rows

    def normalise(self, codes: Tensor, axis: int) -> Tensor:
        """Row numbers of `codes` read along `axis`: shape without that axis; DATA where it is no row, 0 for a zero row."""
        c = codes.movedim(axis, -1)
        width = c.shape[-1]
        flat = c.reshape(-1, width)
        handles, cols = flat >> COL_BITS, flat & COL_MASK
        step = cols[:, 1] - cols[:, 0] if width > 1 else torch.ones_like(cols[:, 0])
        regular = (cols == cols[:, :1] + step[:, None] * torch.arange(width)).all(-1)
        valid = (handles == handles[:, :1]).all(-1) & regular & (handles[:, 0] > 0) & (step >= 0)
        keys = torch.stack([handles[:, 0], cols[:, 0], step], 1)
        keys = torch.where(valid[:, None], keys, torch.tensor([[-1, 0, 0]]))
        unique, inverse = distinct(keys)
        numbers = [self._normal_row(h, col, s, width) if h > 0 else DATA for h, col, s in unique]
        rows = torch.tensor(numbers, dtype=torch.int64)[inverse] if numbers else torch.zeros(0, dtype=torch.int64)
        rows = torch.where((flat == ZERO).all(-1), ZERO, rows)
        return rows.reshape(c.shape[:-1])

    def _normal_row(self, handle: int, col: int, step: int, width: int) -> int:
        key = self.handles[handle]
        if key[0] == "leaf":
            return self.row(Row(self.node(Node("vector", width, args=(step,))), ((key[1], col),), None, None))
        if key[0] == "dot":
            _, param, contracted, stride, cast, source = key
            row = self.rows[source]
            holes = tuple(range(len(row.binding)))
            node = Node("linear", width, ((row.tv, holes),), args=(contracted, stride, step, cast))
            return self.row(Row(self.node(node), (*row.binding, (param, col)), row.token, row.gate))
        row = self.rows[key[1]]
        full = self.nodes[row.tv].width
        if (col, step, width) == (0, 1, full) or (full == 1 and step in (0, 1)):
            return int(key[1])
        if step == 0:
            return DATA
        holes = tuple(range(len(row.binding)))
        node = Node("columns", width, ((row.tv, holes),), args=(col, step))
        return self.row(row._replace(tv=self.node(node)))

    def _spread(self, rows: Tensor, width: int, axis: int) -> Tensor:
        """Codes of values whose rows are given: the inverse of `normalise`."""
        unique, inverse = torch.unique(rows, return_inverse=True)
        handles = torch.tensor([self.handle(("val", r)) if r > 0 else 0 for r in unique.tolist()], dtype=torch.int64)
        base = (handles << COL_BITS)[inverse] if len(unique) else rows
        codes = base[..., None] + torch.arange(width)
        codes = torch.where(rows[..., None] > 0, codes, rows[..., None])
        return codes.movedim(-1, axis)

    def _feature_axis(self, codes: Tensor) -> int | None:
        """The axis along which neighbouring elements are features of one row: where experts lie beside each other in one parameter,
        those that are closest in it."""
        found: list[tuple[int, int]] = []
        for axis in reversed(range(codes.dim())):
            if codes.shape[axis] > 1:
                first, second = codes.select(axis, 0), codes.select(axis, 1)
                beside = (first > 0) & ((first >> COL_BITS) == (second >> COL_BITS)) & (first != second)
                if bool(beside.any()):
                    found.append((int((second - first)[beside].abs().min()), axis))
        if found:
            return min(found, key=lambda pair: pair[0])[1]
        ones = [a for a in range(codes.dim()) if codes.shape[a] == 1]
        return ones[-1] if ones else None

    def _join(self, op: Node, rows: Sequence[Row], joined: Joined) -> int:
        """The row `op(rows)`: DATA when the operands belong to different tokens or weights.

        op: a node without children. joined: what it made before; most rows differ in the token alone.
        """
        tokens = {r.token for r in rows if r.token is not None}
        gates = {r.gate for r in rows if r.gate is not None}
        if len(tokens) > 1 or len(gates) > 1:
            self.note("a pointwise operator mixes values of different tokens")
            return DATA
        key = tuple([(r.tv, r.binding) for r in rows])
        if key not in joined:
            binding = tuple(dict.fromkeys(p for r in rows for p in r.binding))
            place = {p: i for i, p in enumerate(binding)}
            children = tuple((r.tv, tuple(place[p] for p in r.binding)) for r in rows)
            joined[key] = self.node(replace(op, children=children)), binding
        return self.row(Row(*joined[key], tokens.pop() if tokens else None, gates.pop() if gates else None))

    # ------------------------------------------------------------------ rule 1: contraction with a parameter

    def _contraction(self, base: str, args: Any, kwargs: Any) -> Tensor | int | None:
        i, j, k = CONTRACTIONS[base]
        if any(kwargs.get(s, 1) != 1 for s in ("alpha", "beta")):
            return None
        left, right = args[i], args[j]
        vector = right.dim() == 1
        if vector:
            right = right.unsqueeze(-1)
        batched = left.dim() == 3
        if not batched:
            left, right = left.unsqueeze(0), right.unsqueeze(0)
        if self._sum_of_products(left, right) or self._sum_of_products(right.transpose(1, 2), left.transpose(1, 2)):
            return None
        codes = None
        if (columns := self._columns(right)) is not None:
            codes = self._dots(left, *columns, right.dtype)
        elif (columns := self._columns(left.transpose(1, 2))) is not None:
            codes = self._dots(right.transpose(1, 2), *columns, left.dtype)
            codes = None if codes is None else codes.transpose(1, 2)
        if codes is None:
            return None
        if not batched:
            codes = codes[0]
        if vector:
            codes = codes[..., 0]
        if k is not None:
            signature: Signature = ("aten.add.Tensor", (Child(0), Child(1)), ())
            return self._combine([codes, args[k]], [codes, self.codes(args[k])], signature, codes.shape)
        return codes

    def _columns(self, weight: Tensor) -> tuple[Tensor, Tensor, int] | None:
        """For a weight [B, I, J] made of parameters: (parameter number, flat offset) of each column [B, J], stride along I."""
        if weight.numel() == 0 or weight.shape[1] == 0:
            return None
        storage = weight.untyped_storage()._cdata
        param = self.param_of.get(storage)
        if param is not None:
            if weight.dtype.is_complex or self.experts is not None and param not in self.experts:
                return None
            batch, inner, column = (int(n) for n in weight.stride())
            offsets = torch.arange(weight.shape[0])[:, None] * batch + torch.arange(weight.shape[2]) * column
            offsets = torch.add(offsets, int(weight.storage_offset()))
            return torch.full_like(offsets, param), offsets, inner
        codes = self.codes(weight)
        if not isinstance(codes, Tensor) or self._kind(int(codes[0, 0, 0])) != "leaf":
            return None
        first = codes[:, 0, :]
        handles = first >> COL_BITS
        params = {h: self.handles[h] for h in torch.unique(handles).tolist()}
        if any(h <= 0 or key[0] != "leaf" for h, key in params.items()):
            return None
        if self.experts is not None and any(key[1] not in self.experts for key in params.values()):
            return None
        stride = int(codes[0, 1, 0] - codes[0, 0, 0]) if weight.shape[1] > 1 else 1
        if not bool((codes == first[:, None, :] + stride * torch.arange(weight.shape[1])[:, None]).all()):
            return None
        numbers = torch.zeros_like(handles)
        for h, key in params.items():
            numbers[handles == h] = key[1]
        return numbers, first & COL_MASK, stride

    def _source_rows(self, x: Tensor) -> Tensor | None:
        """Row numbers [B, N] of the left operand [B, N, I]: template rows, or fresh token rows for plain data."""
        codes = self.codes(x)
        if isinstance(codes, Tensor) and bool((codes > 0).any()):
            rows = self.normalise(codes, 2)
            if bool((rows != DATA).all()) and not bool((rows > 0).any() and self._is_vector(int(rows.max()))):
                return rows
        if not x.is_floating_point():
            return None
        tokens = self.token_ids(x.reshape(-1, x.shape[-1]))
        tv = self.node(Node("x", x.shape[-1]))
        unique, inverse = torch.unique(tokens, return_inverse=True)
        numbers = torch.tensor(
            [self.row(Row(tv, (), t, None)) if t else ZERO for t in unique.tolist()], dtype=torch.int64
        )
        return numbers[inverse].reshape(x.shape[:-1]) if len(unique) else tokens.reshape(x.shape[:-1])

    def _sum_of_products(self, x: Tensor, weight: Tensor) -> bool:
        """Whether x [B, N, I] @ weight [B, I, J] sums the products of several rows beside each other, as "teh,ehd->td" does. The
        sum is no row, but each product is what an expert gives: they are known from now on, though no tensor holds them."""
        codes = self.codes(x)
        if not isinstance(codes, Tensor) or not self._holds_rows(codes):
            return False
        parts = runs_of(codes >> COL_BITS)
        if len(parts) < 2 or any(bool((self.normalise(codes[:, :, part], 2) == DATA).any()) for part in parts):
            return False
        for part in parts:
            columns = self._columns(weight[:, part])
            dots = None if columns is None else self._dots(x[:, :, part], *columns, weight.dtype)
            if dots is None:
                return False
            self.normalise(dots, 2)
        return True

    def _is_vector(self, row: int) -> bool:
        return self.nodes[self.rows[row].tv].kind == "vector"

    def _dots(
        self, x: Tensor, params: Tensor, offsets: Tensor, stride: int, dtype: torch.dtype
    ) -> Tensor | None:
        """Codes [B, N, J] of x [B, N, I] @ columns, which were read as `dtype`."""
        rows = self._source_rows(x)
        if rows is None:
            return None
        contracted = x.shape[-1]
        out = torch.zeros(x.shape[0], x.shape[1], offsets.shape[1], dtype=torch.int64)
        for param in torch.unique(params).tolist():
            unique, inverse = torch.unique(rows, return_inverse=True)
            own = self.tensors[param].dtype
            cast = None if own is dtype else dtype
            keys = [self.handle(("dot", param, contracted, stride, cast, r)) if r > 0 else 0 for r in unique.tolist()]
            handles = torch.tensor(keys, dtype=torch.int64)[inverse] if len(unique) else rows
            codes = (handles << COL_BITS)[..., None] + offsets[:, None, :]
            codes = torch.where(rows[..., None] > 0, codes, ZERO)
            out = torch.where((params == param)[:, None, :], codes, out)
        return out

    def _grouped(self, args: Any, out: Tensor) -> Tensor | None:
        """A product of rows [R, I] with weights [E, I, J] by segments, under whatever operator name: proved by its values."""
        tensors = [a for a in args if isinstance(a, Tensor)]
        x = next((t for t in tensors if t.dim() == 2 and t.is_floating_point()), None)
        w = next((t for t in tensors if t.dim() == 3 and t.is_floating_point()), None)
        ends = next((t for t in tensors if t.dim() == 1 and not t.is_floating_point()), None)
        if x is None or w is None or ends is None or ends.shape[0] != w.shape[0] or x.shape[0] != out.shape[0]:
            return None
        w = w if w.shape[1] == x.shape[1] and w.shape[2] == out.shape[1] else w.transpose(1, 2)
        if w.shape[1] != x.shape[1] or w.shape[2] != out.shape[1]:
            return None
        codes = torch.full(out.shape, DATA, dtype=torch.int64)
        start = 0
        for e, end in enumerate(ends.tolist()):
            if end > start:
                columns = self._columns(w[e : e + 1])
                close = torch.allclose(
                    x[start:end] @ w[e], out[start:end], rtol=1e-3, atol=1e-3 * float(out.abs().max())
                )
                if columns is None or not close:
                    return None
                dots = self._dots(x[start:end].unsqueeze(0), *columns, w.dtype)
                if dots is None:
                    return None
                codes[start:end] = dots[0]
            start = max(start, end)
        return codes

    # ------------------------------------------------------------------ rule 2: pointwise, and rule 4: the routing weight

    def _pointwise(self, func: Any, args: Any, kwargs: Any, out: Tensor) -> Tensor | None:
        operands: list[Tensor] = []
        symbols = _symbol(tuple(args), operands)
        named = tuple(
            (k, _symbol(v, operands)) for k, v in kwargs.items() if k not in ("memory_format", "layout", "device", "pin_memory")
        )
        name = _functional_name(func)
        if name is None:
            return None
        return self._combine(operands, [self.codes(t) for t in operands], (name, symbols, named), out.shape)

    def _combine(
        self, operands: list[Tensor], codes: list[Tensor | int], signature: Signature, shape: Any
    ) -> Tensor | None:
        """Codes of a pointwise result of `shape` from its operands and their codes."""
        name, symbols, named = signature
        lifted = [isinstance(c, Tensor) and bool((c > 0).any()) for c in codes]
        own = [lft and self._holds_rows(c) for lft, c in zip(lifted, codes)]
        begins = False
        if not any(own) and not all(lifted):
            begins = len(shape) > 1 and any(lft and self._of_experts(t) for t, lft in zip(operands, lifted))
            if not begins:
                return None
            for i, t in enumerate(operands):
                if not lifted[i] and t.dim() == len(shape) and self._follow_back(t):
                    codes[i], lifted[i], own[i] = self.codes(t), True, True
        elif not any(own) and any(t.numel() > MAX_PARAM_ONLY for t in operands):
            return None
        axis = None
        for c, is_row in sorted(
            zip(codes, own), key=lambda p: (not p[1], -(p[0].numel() if isinstance(p[0], Tensor) else 0))
        ):
            if isinstance(c, Tensor) and axis is None and (is_row or not any(own)):
                wide = (
                    c.expand(shape)
                    if c.dim() == len(shape)
                    else c.reshape((1,) * (len(shape) - c.dim()) + c.shape).expand(shape)
                )
                axis = self._feature_axis(wide)
        if axis is None:
            axis = len(shape) - 1
        if axis < 0:
            return None
        width = shape[axis]
        columns: list[Tensor] = []  # for each operand: row numbers, or weights of rows, broadcast to the rows' shape
        is_gate: list[bool] = []
        rows_shape = [n for a, n in enumerate(shape) if a != axis]
        for t, c, lft in zip(operands, codes, lifted):
            full = t.reshape((1,) * (len(shape) - t.dim()) + t.shape)
            if lft:
                code = c.reshape(full.shape)  # type: ignore[union-attr]
                columns.append(self.normalise(code, axis).expand(rows_shape))
                is_gate.append(False)
            elif full.shape[axis] == 1 and t.is_floating_point() and name.startswith("aten.mul."):
                columns.append(full.select(axis, 0).expand(rows_shape).double())
                is_gate.append(True)
            elif t.numel() == 1:
                columns.append(t.reshape(()).expand(rows_shape).double())
                is_gate.append(False)
                symbols = _substitute(symbols, len(columns) - 1, t.reshape(()).item())
            elif (own_tokens := self._tokens_of(full, shape, axis, any(own) or begins)) is not None:
                columns.append(own_tokens)
                is_gate.append(False)
                lifted[len(columns) - 1] = True
            elif isinstance(c, int) and c == ZERO and name == "aten.add.Tensor":
                return codes[1 - len(columns)] if len(codes) == 2 and lifted[1 - len(columns)] else None  # type: ignore[return-value]
            else:
                return None
        keys = torch.stack([c.reshape(-1).double() for c in columns], 1)
        unique, inverse = distinct(keys)
        numbers = self._pointwise_rows(unique, is_gate, lifted, Node("op", width, (), name, symbols, named))
        rows = (
            torch.tensor(numbers, dtype=torch.int64)[inverse].reshape(rows_shape)
            if numbers
            else torch.zeros(rows_shape, dtype=torch.int64)
        )
        if not bool((rows > 0).any()):
            return None
        return self._spread(rows, width, axis)

    def _tokens_of(self, data: Tensor, shape: Any, axis: int, beside_rows: bool) -> Tensor | None:
        """Row numbers of plain data that stands beside rows: the token itself, as in x + f(x)."""
        width = shape[axis]
        if not beside_rows or width < 2 or not data.is_floating_point() or data.shape[axis] != width:
            return None
        rows = data.expand(shape).movedim(axis, -1)
        tokens = self.token_ids(rows.reshape(-1, width))
        tv = self.node(Node("x", width))
        unique, inverse = torch.unique(tokens, return_inverse=True)
        numbers = torch.tensor(
            [self.row(Row(tv, (), t, None)) if t else DATA for t in unique.tolist()], dtype=torch.int64
        )
        return numbers[inverse].reshape(rows.shape[:-1]) if len(unique) else None

    def _remember(self, func: Any, base: str, args: Any, kwargs: Any, out: Tensor, inputs: list[Tensor] | None) -> None:
        """How plain data was made, if row by row, in place of how its storage was filled before. inputs: None for other data."""
        storage = out.untyped_storage()._cdata
        before = self._made.pop(storage, None)
        if inputs is None or not out.is_floating_point() or func._schema.is_mutable and before is None:
            return
        if base in REDUCTIONS or base == "_to_copy" or _is_pointwise(func, base):
            others = tuple((t, t._version) for t in inputs if t.untyped_storage()._cdata != storage)
            self._made[storage] = [*(before or ()), Made(func, args, kwargs, out, others)]

    def _follow_back(self, data: Tensor) -> bool:
        """Gives plain data its codes, if it was made row by row from tokens. What an expert does to its tokens before it uses a
        parameter, as x / |x| * weight, is known to be the expert's when the parameter comes."""
        calls = self._made.pop(data.untyped_storage()._cdata, [])
        if not calls or any(t._version != version for call in calls for t, version in call.read):
            return False
        tokens: list[tuple[int, Tensor | int | None]] = []
        for call in calls:
            for t, _ in call.read:
                if self._lifted(t) or self._follow_back(t) or t.dim() < 2 or t.shape[-1] < 2 or t.stride(-1) == 0:
                    continue
                own = t.as_strided([n if s else 1 for n, s in zip(t.shape, t.stride())], t.stride(), t.storage_offset())
                if (rows := self._source_rows(own)) is not None:
                    storage = t.untyped_storage()._cdata
                    before = self._codes.get(storage)
                    tokens.append((storage, before.clone() if isinstance(before, Tensor) else before))
                    self.set_codes(own, self._spread(rows, own.shape[-1], own.dim() - 1))
            inputs = [t for t in pytree.tree_leaves((call.args, call.kwargs)) if isinstance(t, Tensor)]
            self._follow(call.func, call.args, call.kwargs, call.result, inputs, [call.result])
        for storage, before in reversed(tokens):
            if before is None:
                del self._codes[storage]
            else:
                self._codes[storage] = before
        own_storage = data.untyped_storage()._cdata
        self._made.pop(own_storage, None)  # what was remembered again where it could not be followed
        if self._lifted(data) and not bool((self._full(data) == DATA).any()):
            return True
        self._codes.pop(own_storage, None)
        return False

    def _pointwise_rows(self, keys: Sequence[Sequence[float]], is_gate: list[bool], lifted: list[bool], op: Node) -> list[int]:
        """The results for operands given by the numbers of their rows, where `lifted`, else by their weights."""
        places = [i for i, lft in enumerate(lifted) if lft]
        if not any(is_gate):
            order = {i: n for n, i in enumerate(places)}
            op = replace(op, args=_renumber(op.args, order), kwargs=tuple((k, _renumber(v, order)) for k, v in op.kwargs))
        joined: Joined = {}
        numbers: list[int] = []
        for key in keys:
            members = [int(key[i]) for i in places]
            if DATA in members or ZERO in members:
                numbers.append(DATA if DATA in members else ZERO)
            elif any(is_gate):
                numbers.append(self._gated(members, [weight for weight, gate in zip(key, is_gate) if gate]))
            else:
                numbers.append(self._join(op, [self.rows[n] for n in members], joined))
        return numbers

    def _gated(self, members: Sequence[int], weights: Sequence[float]) -> int:
        """A row times a weight: DATA where there are several of one or the other."""
        row = self.rows[members[0]]
        if len(members) != 1 or row.token is None or len(weights) != 1:
            return DATA
        node = Node("gate", self.nodes[row.tv].width, ((row.tv, tuple(range(len(row.binding)))),))
        return self.row(Row(self.node(node), row.binding, row.token, weights[0] * (row.gate or 1.0)))

    def _holds_rows(self, codes: Any) -> bool:
        """Whether codes contain values or dots (not parameters alone)."""
        positive = codes[codes > 0]
        handles = torch.unique(torch.unique_consecutive(positive >> COL_BITS)).tolist()  # long runs of one handle
        return any(
            self.handles[h][0] != "leaf"
            and not (self.handles[h][0] == "val" and self.rows[self.handles[h][1]].token is None)
            for h in handles
        )

    def _cast(self, args: Any, kwargs: Any, out: Tensor) -> Tensor | int | None:
        if out.dtype == args[0].dtype or not args[0].is_floating_point():
            return self.codes(args[0])
        codes = self._full(args[0])
        if not self._holds_rows(codes):
            return codes  # a parameter in another dtype is still that parameter
        signature: Signature = ("aten._to_copy.default", (Child(0),), (("dtype", out.dtype),))
        return self._combine([args[0]], [codes], signature, out.shape)

    # ------------------------------------------------------------------ rule 3: operators over the features of a row

    def _feature_rows(self, x: Tensor) -> tuple[Tensor, int] | None:
        """Row numbers of an operand that holds rows, and the axis of their features."""
        codes = self._full(x)
        axis = self._feature_axis(codes)
        return None if axis is None or not self._holds_rows(codes) else (self.normalise(codes, axis), axis)

    def _feature_op(self, func: Any, base: str, args: Any, kwargs: Any, out: Tensor) -> Tensor | None:
        x = args[0]
        if (source := self._feature_rows(x)) is None:
            return None
        rows, axis = source
        named = tuple((k, v) for k, v in kwargs.items() if k not in ("keepdim", "dim"))
        if base in REDUCTIONS:
            position = 2 if base == "linalg_vector_norm" else 1
            dims = args[position] if len(args) > position else kwargs.get("dim")
            dims = [dims] if isinstance(dims, int) else dims
            if not dims or [d % x.dim() for d in dims] != [axis]:
                return None
            before = (args[1],) if base == "linalg_vector_norm" else ()
            op = Node("op", 1, (), "", (Child(0), *before, (1,)), (*named, ("keepdim", True)))
        else:
            dim = args[1] if len(args) > 1 else -1
            if dim % x.dim() != axis:
                return None
            op = Node("op", out.shape[axis], (), "", (Child(0), 1, *args[2:]), named)
        spread = self._each_row(rows, axis, func, op)
        return spread if spread is None or out.dim() == x.dim() else spread.select(axis, 0)

    def _norm(self, func: Any, args: Any, kwargs: Any) -> Tensor | None:
        """A norm over the features, followed as one without weights, a product and a sum, since the operator takes one weight for
        all rows. On tokens it begins an expert's computation, where its weights are an expert's own."""
        x = args[0]
        weights = [(f, t) for f, t in zip(("mul", "add"), args[2:]) if isinstance(t, Tensor)]
        if self._lifted(x):
            source = self._feature_rows(x)
        else:
            tokens = self._source_rows(x) if weights and all(self._of_experts(t) for _, t in weights) else None
            source = None if tokens is None else (tokens, x.dim() - 1)
        if source is None or source[1] != x.dim() - 1 or list(args[1]) != [x.shape[-1]]:
            return None
        symbols = (Child(0), (x.shape[-1],), *(None if isinstance(a, Tensor) else a for a in args[2:]))
        return self._each_row(*source, func, Node("op", x.shape[-1], (), "", symbols, tuple(kwargs.items())), weights)

    def _of_experts(self, tensor: Tensor) -> bool:
        """Whether a lifted tensor is made from parameters that may be experts'."""
        return self.experts is None or self.is_tainted(tensor)

    def _each_row(
        self, rows: Tensor, axis: int, func: Any, op: Node, weights: Sequence[tuple[str, Tensor]] = ()
    ) -> Tensor | None:
        """Codes of an operator over the features of each row. op: without a name. weights: what is done with its result, and the
        vectors with which it is done."""
        name = _functional_name(func)
        vectors = [int(self.normalise(self._full(t), 0)) for _, t in weights]
        steps: list[tuple[Node, list[int]]] = [(replace(op, name=name or ""), [])]
        if len(func._schema.returns) > 1:
            steps.append((Node("item", op.width, args=(0,)), []))
        for (f, _), vector in zip(weights, vectors):
            steps.append((Node("op", op.width, (), f"aten.{f}.Tensor", (Child(0), Child(1))), [vector]))
        joined: list[Joined] = [{} for _ in steps]

        def made(row: int) -> int:
            if name is None or min([row, *vectors]) <= 0:
                return ZERO if row == ZERO else DATA
            for (step, others), before in zip(steps, joined):
                row = self._join(step, [self.rows[n] for n in (row, *others)], before)
            return row

        unique, inverse = torch.unique(rows, return_inverse=True)
        result = torch.tensor([made(r) for r in unique.tolist()], dtype=torch.int64)[inverse]
        return self._spread(result, op.width, axis) if bool((result > 0).any()) else None


def _symbol(argument: Any, operands: list[Tensor]) -> Any:
    """An argument whose tensors are the Children that they become in `operands`."""
    if isinstance(argument, (list, tuple)):
        return tuple(_symbol(a, operands) for a in argument)
    if not isinstance(argument, Tensor):
        return argument
    operands.append(argument)
    return Child(len(operands) - 1)


def _is_pointwise(func: Any, base: str) -> bool:
    return torch.Tag.pointwise in func.tags or base in POINTWISE


def _functional_name(func: Any) -> str | None:
    """Qualified name of the out-of-place variant of an operator."""
    packet, overload = func._schema.name.split("::")[1], func._overloadname
    if func._schema.is_mutable and packet.endswith("_"):
        packet = packet[:-1]
    try:
        getattr(getattr(torch.ops.aten, packet), overload)
    except AttributeError:
        return None
    return f"aten.{packet}.{overload}"


def _substitute(symbols: Any, index: int, value: Any) -> Any:
    """Replaces operand `index` by a number."""
    if isinstance(symbols, Child):
        return value if symbols.index == index else symbols
    return tuple(_substitute(s, index, value) for s in symbols) if isinstance(symbols, tuple) else symbols


def _renumber(symbols: Any, order: dict[int, int]) -> Any:
    """Renumbers operands after those that are not rows have left."""
    if isinstance(symbols, Child):
        return Child(order[symbols.index])
    return tuple(_renumber(s, order) for s in symbols) if isinstance(symbols, tuple) else symbols
