"""A pretend accelerator: tensors on the device ``pretend`` are CPU tensors in a wrapper, so that
everything computes the same numbers, and what a real one would refuse or wait for is seen.

* A tensor of the CPU beside one of the device is refused (but numbers without dimensions, and
  indices, as CUDA takes them).
* Transfers and synchronizations are counted; inside :func:`no_waiting` a synchronization fails.
* Live bytes are counted, and with a cap an allocation beyond it raises ``torch.OutOfMemoryError``.
* A device tensor has no data pointer: numpy and safetensors cannot read it.

It is torch's PrivateUse1 backend in Python: operators without a tensor come through a fallback,
those with one through the wrapper's ``__torch_dispatch__``. Scratch inside an operator is not
counted. A refusal in a backward pass comes at its end: torch's guard of streams ends the process
if an exception passes through it.
"""

from __future__ import annotations

import functools
import gc
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_iter, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "pretend"
# Operators whose result has a shape, or is a Python number, that depends on the numbers.
_WAITING = frozenset(
    f"aten::{name}"
    for name in (
        "_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "unique_dim",
        "unique_consecutive", "bincount", "linalg_cholesky",
    )
)  # fmt: skip
_TAKES_HOST_INDICES = frozenset({"aten::index", "aten::index_put_", "aten::_index_put_impl_"})


class WaitedError(AssertionError):
    """A synchronization where none may be."""


@dataclass
class Ledger:
    """What happened on the device.

    Attributes:
        cap: bytes that it has; None: without limit.
        live: bytes now.
        base, peak: of them, when counting began; and the most since then beside those.
        to_device, to_host: transfers.
        waits: synchronizations, by operator.
        refused: the first refusal in a backward pass that is not over.
        made: tensors that were made on it so far.
        streams: what takes copies that need not be waited for; see ``pretend_streams``.
    """

    cap: int | None = None
    live: int = 0
    base: int = 0
    peak: int = 0
    to_device: int = 0
    to_host: int = 0
    waits: Counter[str] = field(default_factory=Counter)
    waiting_allowed: bool = True
    refused: Exception | None = None
    made: int = 0
    streams: Any = None
    _storages: dict[int, list[int]] = field(default_factory=dict)

    def refuse(self, error: Exception) -> None:
        if torch._C._current_autograd_node() is None:
            raise error
        self.refused = self.refused or error

    def wait(self, what: str) -> None:
        if not self.waiting_allowed:
            self.refuse(WaitedError(f"{what} waits for the device"))
        self.waits[what] += 1

    def hold(self, raw: Tensor) -> int:
        """Count a wrapper of this memory; returns what :meth:`release` takes."""
        storage = raw.untyped_storage()
        at, nbytes = storage.data_ptr(), storage.nbytes()
        if at in self._storages:
            self._storages[at][0] += 1
            return at
        if self.cap is not None and self.live + nbytes > self.cap:
            said = f"Tried to allocate {nbytes} bytes; {self.live} of {self.cap} are in use."
            self.refuse(torch.OutOfMemoryError(f"{NAME} out of memory. {said}"))
        self._storages[at] = [1, nbytes]
        self.live += nbytes
        self.peak = max(self.peak, self.live - self.base)
        return at

    def release(self, at: int) -> None:
        entry = self._storages[at]
        entry[0] -= 1
        if entry[0] == 0:
            self.live -= entry[1]
            del self._storages[at]
            if self.streams is not None:
                self.streams.given_away(at)


LEDGER = Ledger()


class PretendTensor(Tensor):
    """A tensor of the device; ``raw`` is its memory."""

    raw: Tensor
    number: int  # in the order of making

    @staticmethod
    def __new__(cls, raw: Tensor) -> PretendTensor:
        held = LEDGER.hold(raw)
        # A view of a tensor that was made outside of inference mode must not be of it.
        with torch.inference_mode(False):
            tensor: PretendTensor = torch.Tensor._make_wrapper_subclass(
                cls, raw.size(), strides=raw.stride(), storage_offset=raw.storage_offset(),
                dtype=raw.dtype, device=torch.device(NAME, 0),
            )  # fmt: skip
        tensor.raw = raw
        LEDGER.made += 1
        tensor.number = LEDGER.made
        weakref.finalize(tensor, LEDGER.release, held)
        return tensor

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.is_inference_mode_enabled():  # composite operators arrive whole in it
            parts = func.decompose(*args, **(kwargs or {}))
            if parts is not NotImplemented:
                return parts
        return _run(func, args, kwargs or {})

    def backward(self, *args: Any, **options: Any) -> None:
        super().backward(*args, **options)
        refused, LEDGER.refused = LEDGER.refused, None
        if refused is not None:
            raise refused

    def record_stream(self, stream: Any) -> None:
        stream.uses.add(self.raw.untyped_storage().data_ptr())

    def tolist(self) -> Any:
        LEDGER.wait("tolist")
        return self.raw.tolist()

    def numpy(self, *, force: bool = False) -> Any:
        raise TypeError(f"can't convert {NAME} device type tensor to numpy; use .cpu() first")

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"PretendTensor({self.raw!r})"


def on_device(value: Any) -> bool:
    return isinstance(value, PretendTensor)


@functools.cache
def install() -> torch.device:
    """Register the device, once for a process."""
    _setup_privateuseone_for_python_backend(NAME)
    library = torch.library.Library("_", "IMPL")
    library.fallback(lambda op, *args, **kwargs: _run(op, args, kwargs), "PrivateUse1")
    install.library = library  # type: ignore[attr-defined]  # which lives as long as its fallback
    plain = torch.tensor

    @functools.wraps(plain)
    def tensor(data: Any, *, device: Any = None, **options: Any) -> Tensor:
        """torch.tensor makes its data outside of the dispatcher, where a wrapper cannot be made."""
        made = plain(data, **options, device=_raw(torch.device(device)) if device else None)
        return made.to(device) if device is not None else made

    torch.tensor = tensor
    return torch.device(NAME, 0)


@contextmanager
def ledger(cap: int | None = None) -> Iterator[Ledger]:
    """Counts from zero, and a device of ``cap`` bytes beside what is in use."""
    install()
    gc.collect()  # what an earlier test has left
    LEDGER.base, LEDGER.peak = LEDGER.live, 0
    LEDGER.to_device = LEDGER.to_host = 0
    LEDGER.waits.clear()
    LEDGER.cap = None if cap is None else LEDGER.live + cap
    try:
        yield LEDGER
    finally:
        LEDGER.cap = None


@contextmanager
def no_waiting() -> Iterator[None]:
    """Synchronizations raise WaitedError."""
    before, LEDGER.waiting_allowed = LEDGER.waiting_allowed, False
    try:
        yield
    finally:
        LEDGER.waiting_allowed = before


def _raw(value: Any) -> Any:
    if isinstance(value, PretendTensor):
        return value.raw
    if isinstance(value, torch.device) and value.type == NAME:
        return torch.device("cpu")
    return value


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    name = func._schema.name
    if name == "aten::copy_":
        return _copy(*args, **kwargs)
    if name == "aten::_to_copy":
        return _to_copy(func, args[0], kwargs)
    tensors = [a for a in tree_iter((args, kwargs)) if isinstance(a, Tensor)]
    here = [t for t in tensors if on_device(t)]
    strangers = [t for t in tensors if not on_device(t) and t.dim() > 0]
    if here and strangers and name not in _TAKES_HOST_INDICES:
        said = f"expected all tensors to be on the same device, but found {NAME}:0 and cpu"
        LEDGER.refuse(RuntimeError(f"{name}: {said}"))
    by_mask = name == "aten::index" and any(
        isinstance(i, Tensor) and i.dtype is torch.bool for i in args[1]
    )
    if name in _WAITING or by_mask:
        LEDGER.wait(name)
    same = {id(t.raw): t for t in here}  # type: ignore[attr-defined]
    out = func(*tree_map(_raw, args), **tree_map(_raw, kwargs))

    def back(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        known = same.get(id(value))
        return PretendTensor(value) if known is None else known

    return tree_map(back, out)


def _copy(to: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    crosses = on_device(to) != on_device(source)
    host = source if on_device(to) else to
    beside = crosses and non_blocking and LEDGER.streams is not None and host.is_pinned()
    if crosses and on_device(to):
        LEDGER.to_device += 1
    elif crosses:
        LEDGER.to_host += 1
        if not beside:
            LEDGER.wait("copy to the host")
    make = partial(_raw(to).copy_, _raw(source))
    if beside:
        LEDGER.streams.copy(to, source, make)
    else:
        make()
    return to


def _to_copy(func: Any, source: Tensor, kwargs: dict[str, Any]) -> Tensor:
    wanted = kwargs.get("device")
    stays = on_device(source) if wanted is None else torch.device(wanted).type == NAME
    if on_device(source) and not stays:
        LEDGER.wait("copy to the host")
        LEDGER.to_host += 1
    elif stays and not on_device(source):
        LEDGER.to_device += 1
    options = {k: v for k, v in kwargs.items() if k not in ("pin_memory", "non_blocking")}
    out: Tensor = func(_raw(source), **tree_map(_raw, options))
    return PretendTensor(out) if stays else out
