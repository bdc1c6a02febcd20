"""Operators of torch whose functions are Python, called with less on the way.

Between a call in a compiled graph and the function of a `torch.library.custom_op` lie two Python functions of autograd, a
second pass through the dispatcher, and two wrappers: 30 us on a GPU's slow host, where a whole layer of few tokens takes 300.
Where gradients are off and nobody watches (no mode, no transform, nothing fake), the first of these calls the function itself.
"""

from __future__ import annotations

from typing import Any

import torch
from torch._library.autograd import make_autograd_impl

_BACKENDS = (torch._C.DispatchKey.CPU, torch._C.DispatchKey.CUDA)
_BELOW = torch._C._after_ADInplaceOrView_keyset


def shorten(operator: Any) -> Any:
    """The same operator (what `torch.library.custom_op` gives), with the short way in front of autograd's own function.

    For operators that write no argument and whose results share no memory with arguments or each other: nothing checks them
    on the short way.
    """
    function, whole = operator._init_fn, make_autograd_impl(operator._opoverload, operator)

    def call(keys: Any, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled() and (keys & _BELOW).highestPriorityTypeId() in _BACKENDS:
            return function(*args, **kwargs)
        return whole(keys, *args, **kwargs)

    for device in ("CPU", "CUDA"):
        operator._lib.impl(operator._opoverload, call, f"Autograd{device}", with_keyset=True)
    return operator
