"""A device that is not the CPU, for machines that have none: the rules of CUDA, the CPU's numbers.

`other_device()` is a context in which torch knows `cuda:0`. A tensor made there keeps its numbers
on the CPU and says that it lies on the other device, so every branch on the device takes that side.
An operation with tensors of both raises, as it would on a GPU; what CUDA allows is allowed: scalars
of the CPU, indices on the CPU, copies. Dtypes, rounding and speed are the CPU's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

DEVICE = torch.device("cuda:0")
CPU = torch.device("cpu")

_COPIES = ("copy_", "_to_copy")
_INDEXES = ("index", "index_put_", "index_put", "_index_put_impl_", "_unsafe_index")


class Elsewhere(Tensor):
    """A tensor on the other device; `held` has its numbers."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> Elsewhere:
        with torch.inference_mode(False):  # a view of what was made outside is no inference tensor
            made = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
                cls,
                held.shape,
                strides=held.stride(),
                storage_offset=held.storage_offset(),
                dtype=held.dtype,
                device="meta",  # torch's own checks of a CUDA device would ask for one
                requires_grad=held.requires_grad,
            )
        made.held = held.detach()
        return made  # type: ignore[no-any-return]

    def __repr__(self, **_: Any) -> str:
        return f"Elsewhere({self.held!r})"

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs, name = dict(kwargs or {}), func.overloadpacket.__name__
        _check(name, args, kwargs)
        target = kwargs.get("device", DEVICE)
        if "device" in kwargs:
            kwargs["device"] = CPU
        found = func(*tree_map(_inner, args), **tree_map(_inner, kwargs))
        if name.endswith("_") and not name.startswith("_") or name in ("copy_",):
            return args[0]
        if "out" in kwargs:
            return kwargs["out"]
        if torch.device(target or DEVICE).type == "cpu":
            return found
        return tree_map(_outer, found)


def _check(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Refuse tensors of both devices, but for what CUDA allows."""
    looked_at = (args[0], *args[2:]) if name in _INDEXES else args
    strangers: list[Tensor] = []

    def note(x: Any) -> None:
        if isinstance(x, Tensor) and not isinstance(x, Elsewhere):
            assert x.device == CPU, f"{name}: made by torch itself, and without numbers here"
            if x.ndim:
                strangers.append(x)

    tree_map(note, (looked_at, kwargs))
    if strangers and name not in _COPIES:
        shapes = [tuple(x.shape) for x in strangers]
        raise RuntimeError(f"{name}: tensors on {DEVICE} and on the CPU, the latter {shapes}")


def _inner(x: Any) -> Any:
    return x.held if isinstance(x, Elsewhere) else x


def _outer(x: Any) -> Any:
    return Elsewhere(x) if isinstance(x, Tensor) and not isinstance(x, Elsewhere) else x


_OF_DEVICES: dict[Any, Any] = {
    Tensor.device.__get__: DEVICE,  # type: ignore[attr-defined]
    Tensor.is_cpu.__get__: False,  # type: ignore[attr-defined]
    Tensor.is_cuda.__get__: True,  # type: ignore[attr-defined]
    Tensor.is_meta.__get__: False,  # type: ignore[attr-defined]
    Tensor.get_device: 0,
}
"""What is asked of a tensor's device, and the answer of one that lies there."""


_MAKERS = {
    *(torch.tensor, torch.as_tensor, torch.empty, torch.zeros, torch.ones, torch.full),
    *(torch.arange, torch.eye, torch.rand, torch.randn, torch.randint),
    *(torch.empty_like, torch.zeros_like, torch.ones_like, torch.full_like),
}
"""They take a device, and torch itself has no such one here."""


class _Factories(TorchFunctionMode):
    """Makes and moves tensors; all else goes its way."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in _OF_DEVICES:
            return _OF_DEVICES[func] if isinstance(args[0], Elsewhere) else func(*args)
        if func is torch.where and len(args) == 3:
            # torch would put a number where it takes the tensors to lie.
            args = tuple(x if isinstance(x, Tensor) else torch.tensor(x) for x in args)
        if func is F.scaled_dot_product_attention and isinstance(args[0], Elsewhere):
            return _attention(*args, **kwargs)
        if func is Tensor.to:
            return _moved(args, kwargs)
        if func is Tensor.__setitem__ and isinstance(args[0], Elsewhere):
            where, value = args[1:]
            if not isinstance(value, Tensor):
                value = Elsewhere(torch.tensor(value, dtype=args[0].dtype))
            return Tensor.__setitem__(args[0], where, value)
        if func is Tensor.tolist:
            return _inner(args[0]).tolist()
        if func is Tensor.numpy and isinstance(args[0], Elsewhere):
            raise TypeError(f"can't convert {DEVICE} tensor to numpy")
        if func is Tensor.cpu:
            return _moved((*args, CPU), {})
        device = kwargs.get("device")
        if func not in _MAKERS or device is None or torch.device(device).type != DEVICE.type:
            return func(*args, **kwargs)
        return _outer(func(*tree_map(_inner, args), **(kwargs | {"device": CPU})))


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    enable_gqa: bool = False,
) -> Tensor:
    """Products and a softmax: torch picks a kernel by the device, and here is none."""
    share = query.shape[-3] // key.shape[-3]
    assert share == 1 or enable_gqa
    key, value = (x.repeat_interleave(share, -3) for x in (key, value))
    scores = query @ key.mT * query.shape[-1] ** -0.5
    if is_causal:
        attn_mask = Elsewhere(torch.ones(scores.shape[-2:], dtype=torch.bool).tril())
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -torch.inf)
    return scores.softmax(-1) @ value


def _moved(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """`Tensor.to` with any of its signatures; gradients do not cross devices."""
    x, *rest = args
    device, dtype = kwargs.get("device"), kwargs.get("dtype")
    for value in rest:
        if isinstance(value, Tensor):
            device = DEVICE if isinstance(value, Elsewhere) else value.device
            dtype = value.dtype
        elif isinstance(value, torch.dtype):
            dtype = value
        elif isinstance(value, (str, torch.device)):
            device = value
    is_away = isinstance(x, Elsewhere)
    goes_away = is_away if device is None else torch.device(device).type == DEVICE.type
    is_copied = bool(kwargs.get("copy", False))
    if goes_away == is_away:
        return Tensor.to(x, dtype or x.dtype, copy=is_copied)
    assert not (torch.is_grad_enabled() and x.requires_grad), "a gradient would cross devices"
    found = Tensor.to(_inner(x), dtype or x.dtype, copy=True)
    return Elsewhere(found) if goes_away else found


@contextmanager
def other_device() -> Iterator[torch.device]:
    """See the module's docstring."""
    answers: dict[str, Any] = {
        "is_available": True,
        "device_count": 1,
        "get_device_name": "the other device",
        "get_device_capability": (7, 0),  # without FlexAttention
        "is_bf16_supported": True,
        "synchronize": None,
    }
    with _Factories(), ExitStack() as patches:
        for name, answer in answers.items():
            patches.enter_context(patch.object(torch.cuda, name, lambda *_, a=answer: a))
        yield DEVICE
