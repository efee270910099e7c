"""Weights that are not those of a linear layer, kept in 4 or 8 bits.

bitsandbytes quantises the weights of linear layers. Experts are three-dimensional parameters, which
any code may read: a packed weight therefore is a tensor with the shape and the type of the full one
whose values are computed when an operation reads them, and freed after it. Autograd keeps the
packed values for the backward pass.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, Self, cast

import torch
from bitsandbytes import functional
from torch.utils._pytree import tree_map_only

Scheme = Literal["nf4", "int8"]
_MOST = 2**30
"""Values that a kernel of bitsandbytes gets: it counts them in 32 bits, and notices no overflow."""
_SCALE = 1 / 127

aten = torch.ops.aten


class Packed4:
    """Values in NF4, double quantised: 4 bits in blocks of 64 (Dettmers et al., QLoRA, 2023)."""

    def __init__(self, codes: torch.Tensor, state: functional.QuantState) -> None:
        self.codes, self.state = codes, state

    @classmethod
    def of(cls, weight: torch.Tensor) -> Self:
        """Quantise a weight of any shape, in the order in which it is stored."""
        codes, state = functional.quantize_4bit(
            weight.contiguous(), compress_statistics=True, quant_type="nf4"
        )
        return cls(codes, state)

    @property
    def nbytes(self) -> int:
        """Stored bytes, with the scales."""
        nested = self.state.state2.absmax.nbytes
        return int(self.codes.nbytes + self.state.absmax.nbytes + nested)

    def values(self, dtype: torch.dtype) -> torch.Tensor:
        """All values, in the weight's shape."""
        return cast("torch.Tensor", functional.dequantize_4bit(self.codes, self.state)).to(dtype)

    def to(self, device: torch.device) -> Self:
        """These values on another device."""
        state = functional.QuantState.from_dict(self.state.as_dict(packed=False), device=device)
        return type(self)(self.codes.to(device), state)


class Packed8:
    """Values in 8 bits, scaled by the largest of each row along the last dimension."""

    def __init__(self, codes: torch.Tensor, scales: torch.Tensor, shape: torch.Size) -> None:
        self.codes, self.scales, self.shape = codes, scales, shape

    @classmethod
    def of(cls, weight: torch.Tensor) -> Self:
        """Quantise a weight of any shape."""
        rows = weight.reshape(-1, weight.shape[-1]).half()
        # A GPU's kernel reads the memory in its order, whatever the strides say.
        rows = rows.contiguous()
        codes, scales, _ = functional.int8_vectorwise_quant(rows)
        return cls(codes, scales, weight.shape)

    @property
    def nbytes(self) -> int:
        """Stored bytes, with the scales."""
        return self.codes.nbytes + self.scales.nbytes

    def values(self, dtype: torch.dtype) -> torch.Tensor:
        """All values, in the weight's shape."""
        values = torch.empty(self.codes.shape, dtype=dtype, device=self.codes.device)
        torch.mul(self.codes, self.scales[:, None] * _SCALE, out=values)  # no copy in float32
        return values.reshape(self.shape)

    def to(self, device: torch.device) -> Self:
        """These values on another device."""
        return type(self)(self.codes.to(device), self.scales.to(device), self.shape)


class PackedParts:
    """Values of a weight that is too large for a kernel, part by part along the first dimension."""

    def __init__(self, parts: list[Packed4 | Packed8], sizes: list[int], shape: torch.Size) -> None:
        self.parts, self.sizes, self.shape = parts, sizes, shape

    @property
    def codes(self) -> torch.Tensor:
        """Those of the first part."""
        return self.parts[0].codes

    @property
    def nbytes(self) -> int:
        """Stored bytes, with the scales."""
        return sum(part.nbytes for part in self.parts)

    def values(self, dtype: torch.dtype) -> torch.Tensor:
        """All values, in the weight's shape."""
        values = torch.empty(self.shape, dtype=dtype, device=self.codes.device)
        for part, place in zip(self.parts, torch.split(values, self.sizes), strict=True):
            place.copy_(part.values(dtype))
        return values

    def to(self, device: torch.device) -> Self:
        """These values on another device."""
        return type(self)([part.to(device) for part in self.parts], self.sizes, self.shape)


Packed = Packed4 | Packed8 | PackedParts
SCHEMES: dict[Scheme, type[Packed4] | type[Packed8]] = {"nf4": Packed4, "int8": Packed8}


def packed(weight: torch.Tensor, scheme: Scheme) -> Packed:
    """Quantise a weight of any size."""
    if weight.numel() <= _MOST:
        return SCHEMES[scheme].of(weight)
    parts = torch.split(weight, max(1, _MOST // weight[0].numel()))
    of_parts = [SCHEMES[scheme].of(part) for part in parts]
    return PackedParts(of_parts, [len(part) for part in parts], weight.shape)


class PackedWeight(torch.Tensor):
    """A frozen weight of two or three dimensions that reads as a tensor of floating-point numbers.

    Args:
        packed: the values.
        shape: shape of the values.
        dtype: type that the values are read in.
        transposed: True to read the last two dimensions exchanged.
    """

    packed: Packed
    stored_shape: torch.Size
    transposed: bool

    @staticmethod
    def __new__(
        cls: type[Self],
        packed: Packed,
        shape: torch.Size,
        dtype: torch.dtype,
        transposed: bool = False,
    ) -> Self:
        strides = [math.prod(shape[index + 1 :]) for index in range(len(shape))]
        sizes = list(shape)
        if transposed:
            sizes[-2:] = sizes[:-3:-1]
            strides[-2:] = strides[:-3:-1]
        make: Any = torch.Tensor._make_wrapper_subclass
        device = packed.codes.device
        new = make(cls, tuple(sizes), strides=tuple(strides), dtype=dtype, device=device)
        new.packed, new.stored_shape, new.transposed = packed, shape, transposed
        return cast("Self", new)

    @classmethod
    def of(cls, weight: torch.Tensor, scheme: Scheme) -> Self:
        """Quantise a weight."""
        return cls(packed(weight, scheme), weight.shape, weight.dtype)

    def values(self) -> torch.Tensor:
        """The weight as an ordinary tensor."""
        values = self.packed.values(self.dtype)
        return values.transpose(-2, -1) if self.transposed else values

    @property
    def nbytes(self) -> int:  # type: ignore[override]
        """Stored bytes, with the scales."""
        return self.packed.nbytes

    def element_size(self) -> float:  # type: ignore[override]
        """Mean number of stored bytes of a value."""
        return self.packed.nbytes / self.numel()

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return (
            f"{type(self).__name__}({list(self.shape)}, {self.dtype}, {self.packed.nbytes} bytes)"
        )

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        own = _OPERATIONS.get(func)
        if own is not None and isinstance(args[0], PackedWeight):
            return own(*args, **kwargs)
        written = func._schema.arguments[0].alias_info if func._schema.arguments else None
        if written is not None and written.is_write and isinstance(args[0], PackedWeight):
            raise RuntimeError(f"{func}: a quantised weight cannot be changed")
        args, kwargs = tree_map_only(PackedWeight, PackedWeight.values, (args, kwargs))
        return func(*args, **kwargs)


def _same(weight: PackedWeight, **_: Any) -> PackedWeight:
    """Packed values never change, so a copy may share them."""
    return PackedWeight(weight.packed, weight.stored_shape, weight.dtype, weight.transposed)


def _set(weight: PackedWeight, source: PackedWeight) -> PackedWeight:
    """Parametrisations set a parameter to its own values."""
    weight.packed, weight.transposed = source.packed, source.transposed
    return weight


def _cast(
    weight: PackedWeight,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
    **_: Any,
) -> PackedWeight:
    packed = weight.packed if device is None else weight.packed.to(torch.device(device))
    return PackedWeight(packed, weight.stored_shape, dtype or weight.dtype, weight.transposed)


def _transpose(weight: PackedWeight, first: int, second: int) -> torch.Tensor:
    dims = weight.dim()
    if {first % dims, second % dims} == {dims - 2, dims - 1}:
        shape = weight.stored_shape
        return PackedWeight(weight.packed, shape, weight.dtype, not weight.transposed)
    return weight.values().transpose(first, second)


def _expand(weight: PackedWeight, sizes: Sequence[int], **_: Any) -> torch.Tensor:
    """A matrix product expands its factors, usually to the shape that they have."""
    if tuple(sizes) == tuple(weight.shape):
        return _same(weight)
    return weight.values().expand(sizes)


def _view(weight: PackedWeight, sizes: Sequence[int]) -> torch.Tensor:
    if tuple(sizes) == tuple(weight.shape):
        return _same(weight)
    return weight.values().reshape(sizes)


def _baddbmm(weight: PackedWeight, *factors: torch.Tensor, **scales: Any) -> torch.Tensor:
    """Adds a product to the values without a second copy of them."""
    return weight.values().baddbmm_(*factors, **scales)


_OPERATIONS: dict[Any, Callable[..., Any]] = {
    aten.detach.default: _same,
    aten.alias.default: _same,
    aten.clone.default: _same,
    aten.set_.source_Tensor: _set,
    aten._to_copy.default: _cast,
    aten.t.default: lambda weight: _transpose(weight, 0, 1),
    aten.transpose.int: _transpose,
    aten.expand.default: _expand,
    aten.view.default: _view,
    aten._unsafe_view.default: _view,
    aten.baddbmm.default: _baddbmm,
}
