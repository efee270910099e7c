"""Follows how many bytes are alive while a layer and its gradients are computed.

Only shapes exist: see `activations`.
"""

import weakref
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map


class Beyond(NamedTuple):
    """Most bytes that a layer holds beyond what it keeps between its pass and its gradients'."""

    forward: int
    """In its pass."""
    again: int
    """In checkpointing's second pass, which begins when the gradients need what is kept, and ends
    when all is."""
    backward: int
    """While its gradients are computed; those of weights exist before, as in all microbatches of a
    step but the first."""


def beyond_kept(forward: Callable[..., Any], args: Any, kwargs: Any) -> Beyond | None:
    """What a layer holds for a while; None where its gradients cannot be followed.

    Args:
        forward: the layer's pass, whose result is a tensor or begins with one.
        args, kwargs: its arguments, whose own graph is left as it is.
    """
    args, kwargs = tree_map(detached, (args, kwargs))
    live, at_save, at_use = Live(), [0], list[int]()

    def save(tensor: torch.Tensor) -> torch.Tensor:
        at_save.append(live.most)
        return tensor

    def use(tensor: torch.Tensor) -> torch.Tensor:
        at_use.append(live.now)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save, use), live:
        try:
            end = end_of(forward(*args, **kwargs))
            torch.clear_autocast_cache()  # as after a loss
            kept, of_pass = live.now, live.most
            live.begin_backward()
            end.backward()  # type: ignore[no-untyped-call]
        except (RuntimeError, NotImplementedError, ValueError, TypeError):
            return None  # the code of some architectures reads values
    again = at_save[-1] + (at_use[0] - kept if at_use else 0)
    return Beyond(of_pass - kept, again - kept, live.most - kept)


def end_of(output: Any) -> torch.Tensor:
    """A scalar whose gradient is that of a whole result, which only its graph holds then."""
    first = output if isinstance(output, torch.Tensor) else output[0]
    end: torch.Tensor = _End.apply(first)  # type: ignore[no-untyped-call]
    return end


class _End(torch.autograd.Function):
    """Stands for the layers above: hands a gradient down."""

    @staticmethod
    def forward(ctx: Any, output: torch.Tensor) -> torch.Tensor:
        ctx.form = output.shape, output.dtype, output.device
        return output.new_empty(())

    @staticmethod
    def backward(ctx: Any, *_: torch.Tensor) -> torch.Tensor:
        shape, dtype, device = ctx.form
        return torch.empty(shape, dtype=dtype, device=device)


def detached(value: Any) -> Any:
    """The same value, at which gradients end if it has some."""
    if not isinstance(value, torch.Tensor):
        return value
    return value.detach().requires_grad_(value.requires_grad)


class Live(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of what operations make inside, for as long as something holds it."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.most = 0
        self._seen: set[int] = set()
        self._in_backward = False

    def begin_backward(self) -> None:
        """Begin to count what gradients hold.

        Gradients from several places are added up in place, except for tensors without values: the
        sum counts only when the next operation runs, and its parts are gone.
        """
        self.most, self._in_backward = 0, True

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        self._add(tree_leaves((args, kwargs)), made=False)
        self.most = max(self.most, self.now)
        results = func(*args, **kwargs)
        self._add(tree_leaves(results), made=True)
        if not self._in_backward or func is not torch.ops.aten.add.Tensor:
            self.most = max(self.most, self.now)
        return results

    def _add(self, values: Iterable[Any], made: bool) -> None:
        for value in values:
            if not isinstance(value, torch.Tensor):
                continue
            storage = value.untyped_storage()
            if storage._cdata not in self._seen:
                self._seen.add(storage._cdata)
                size = storage.nbytes() if made else 0
                self.now += size
                weakref.finalize(storage, self._free, storage._cdata, size)

    def _free(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size
