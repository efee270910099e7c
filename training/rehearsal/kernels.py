"""Slow stand-ins for the kernels of convolutions and recurrences, which need a GPU.

A rehearsal runs on the CPU. It cannot run the installed kernels, so it puts a stand-in in the place
of each one that takes the documents' borders, and shows that the model hands the borders to it. A
kernel whose signature lacks them ignores them, and so does its stand-in.
"""

import ast
import importlib.util
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Kernel:
    """A function of an optional package that keeps documents apart."""

    package: str
    module: str
    """Inside the package; empty for the package itself."""
    name: str
    border: str
    """The argument with the documents' borders."""
    stand_in: Callable[..., Any]


DISTRIBUTIONS = {
    "causal_conv1d": "causal-conv1d",
    "mamba_ssm": "mamba-ssm",
    "fla": "flash-linear-attention",
}
"""Packages by the name that is imported."""


def install() -> None:
    """Put the stand-ins into the place of the installed kernels; call it before transformers."""
    for package in {kernel.package for kernel in _KERNELS}:
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            continue
        arguments = _arguments(Path(next(iter(spec.submodule_search_locations))))
        root = _module(package)
        for kernel in (kernel for kernel in _KERNELS if kernel.package == package):
            if kernel.name in arguments:
                function = _as_installed(kernel, kernel.border in arguments[kernel.name])
                setattr(_inside(root, kernel.module), kernel.name, function)


def missing_packages(source: str) -> list[str]:
    """Distributions that would let a model keep documents apart, by the text of its code.

    None for a model with a kernel that takes no borders.
    """
    if any(f'"{name}"' in source for name in _WITHOUT_BORDERS):
        return []
    return [
        distribution
        for package, distribution in DISTRIBUTIONS.items()
        if f'"{package}"' in source and importlib.util.find_spec(package) is None
    ]


def _arguments(folder: Path) -> dict[str, set[str]]:
    """Argument names of each kernel that a package defines, without importing it."""
    names = {kernel.name for kernel in _KERNELS}
    arguments: dict[str, set[str]] = {}
    for file in folder.rglob("*.py"):
        text = file.read_text(encoding="utf-8", errors="replace")
        if not any(f"def {name}" in text for name in names):
            continue
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and node.name in names:
                every = (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)
                arguments[node.name] = {argument.arg for argument in every}
    return arguments


def _as_installed(kernel: Kernel, takes_borders: bool) -> Callable[..., Any]:
    """The stand-in, or without the borders if the installed kernel does not take them."""
    if takes_borders:
        return kernel.stand_in

    def without_borders(*args: Any, **kwargs: Any) -> Any:
        return kernel.stand_in(*args, **kwargs)

    # transformers passes the arguments that the signature names.
    signature = inspect.signature(kernel.stand_in)
    parameters = [p for p in signature.parameters.values() if p.name != kernel.border]
    without_borders.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return wraps(kernel.stand_in, assigned=())(without_borders)


def _module(name: str) -> ModuleType:
    module = sys.modules[name] = ModuleType(name)
    module.__spec__ = ModuleSpec(name, None)
    module.__path__ = []
    module.__version__ = "0"  # type: ignore[attr-defined]
    return module


def _inside(root: ModuleType, path: str) -> ModuleType:
    """The module at a dotted path under another one; it is made if it does not exist."""
    module = root
    for part in filter(None, path.split(".")):
        name = f"{module.__name__}.{part}"
        if name not in sys.modules:
            setattr(module, part, _module(name))
        module = sys.modules[name]
    return module


# the stand-ins; arguments and results as of the kernels


def _causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    seq_idx: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """A depthwise convolution of (rows, channels, tokens) over the tokens before."""
    width = weight.shape[-1]
    out = torch.zeros_like(x)
    for lag in range(width):
        shifted = F.pad(x, (lag, 0))[..., : x.shape[-1]]
        if seq_idx is not None:
            before = F.pad(seq_idx, (lag, 0), value=-1)[..., : x.shape[-1]]
            shifted = shifted * (before == seq_idx)[:, None]
        out = out + shifted * weight[:, width - 1 - lag, None]
    if bias is not None:
        out = out + bias[:, None]
    return F.silu(out) if activation in ("silu", "swish") else out


def _gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, None]:
    """The gated delta rule; q, k, v (rows, tokens, heads, size), g and beta one number a head."""
    if use_qk_l2norm_in_kernel:
        q, k = (x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6) for x in (q, k))
    q = q * q.shape[-1] ** -0.5
    repeats = v.shape[2] // k.shape[2]
    q, k = (x.repeat_interleave(repeats, dim=2) for x in (q, k))
    starts = _starts(cu_seqlens, q.shape[1])
    state = q.new_zeros(q.shape[0], q.shape[2], q.shape[3], v.shape[3])
    outputs = []
    for token in range(q.shape[1]):
        if token in starts:
            state = torch.zeros_like(state)
        state = state * g[:, token].exp()[..., None, None]
        key = k[:, token]
        recalled = torch.einsum("bhkv,bhk->bhv", state, key)
        change = (v[:, token] - recalled) * beta[:, token, :, None]
        state = state + torch.einsum("bhk,bhv->bhkv", key, change)
        outputs.append(torch.einsum("bhkv,bhk->bhv", state, q[:, token]))
    return torch.stack(outputs, dim=1), None


def _chunk_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_final_states: bool = False,
) -> Tensor:
    """Mamba-2's scan: x (rows, tokens, heads, size), B and C (rows, tokens, groups, states)."""
    dt = dt if dt_bias is None else dt + dt_bias
    dt = (F.softplus(dt) if dt_softplus else dt).clamp(*dt_limit)
    repeats = x.shape[2] // B.shape[2]
    B, C = (value.repeat_interleave(repeats, dim=2) for value in (B, C))
    state = x.new_zeros(x.shape[0], x.shape[2], x.shape[3], B.shape[3])
    outputs = []
    for token in range(x.shape[1]):
        if seq_idx is not None and token:
            same = seq_idx[:, token] == seq_idx[:, token - 1]
            state = state * same[:, None, None, None]
        step = dt[:, token]
        state = state * (step * A).exp()[..., None, None]
        state = state + torch.einsum("bh,bhp,bhn->bhpn", step, x[:, token], B[:, token])
        outputs.append(torch.einsum("bhpn,bhn->bhp", state, C[:, token]))
    y = torch.stack(outputs, dim=1)
    return y if D is None else y + x * D[:, None]


def _split_scan(
    zxbcdt: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    chunk_size: int,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_final_states: bool = False,
    activation: str = "silu",
    rmsnorm_weight: Tensor | None = None,
    rmsnorm_eps: float = 1e-6,
    outproj_weight: Tensor | None = None,
    outproj_bias: Tensor | None = None,
    headdim: int | None = None,
    ngroups: int = 1,
    norm_before_gate: bool = True,
) -> Tensor:
    """Mamba-2's convolution, scan, gated norm and output projection in one call."""
    heads, channels = dt_bias.shape[0], conv1d_weight.shape[0]
    inner = zxbcdt.shape[-1] - channels - heads
    z, mixed, dt = torch.split(zxbcdt, [inner, channels, heads], dim=-1)
    mixed = _causal_conv1d(
        mixed.transpose(1, 2), conv1d_weight, conv1d_bias, seq_idx, activation
    ).transpose(1, 2)
    states = (channels - inner) // (2 * ngroups)
    x, B, C = torch.split(mixed, [inner, ngroups * states, ngroups * states], dim=-1)
    rows, tokens = x.shape[:2]
    y = _chunk_scan(
        x.view(rows, tokens, heads, -1),
        dt,
        A,
        B.view(rows, tokens, ngroups, states),
        C.view(rows, tokens, ngroups, states),
        chunk_size,
        D=D,
        dt_bias=dt_bias,
        seq_idx=seq_idx,
        dt_softplus=True,
        dt_limit=dt_limit,
    ).reshape(rows, tokens, inner)
    if rmsnorm_weight is None:
        y = y * F.silu(z)
    else:
        y = _gated_norm(y, z, rmsnorm_weight, rmsnorm_eps, ngroups, norm_before_gate)
    return y if outproj_weight is None else F.linear(y, outproj_weight, outproj_bias)


def _gated_norm(
    y: Tensor, z: Tensor, weight: Tensor, eps: float, groups: int, norm_before_gate: bool
) -> Tensor:
    y = y if norm_before_gate else y * F.silu(z)
    grouped = y.view(*y.shape[:-1], groups, -1)
    grouped = grouped * torch.rsqrt(grouped.square().mean(-1, keepdim=True) + eps)
    y = grouped.flatten(-2) * weight
    return y * F.silu(z) if norm_before_gate else y


def _starts(borders: Tensor | None, length: int) -> set[int]:
    """Numbers of the tokens with which documents start."""
    return {0} if borders is None else {int(border) for border in borders if border < length}


_WITHOUT_BORDERS = ("selective_scan_fn", "chunk_kda")
"""Kernels of Mamba's first version, and of recurrences that have no stand-in here."""

_KERNELS = (
    Kernel("causal_conv1d", "", "causal_conv1d_fn", "seq_idx", _causal_conv1d),
    Kernel(
        "fla", "ops.gated_delta_rule", "chunk_gated_delta_rule", "cu_seqlens", _gated_delta_rule
    ),
    Kernel(
        *("mamba_ssm", "ops.triton.ssd_combined", "mamba_chunk_scan_combined", "seq_idx"),
        _chunk_scan,
    ),
    Kernel(
        *("mamba_ssm", "ops.triton.ssd_combined", "mamba_split_conv1d_scan_combined", "seq_idx"),
        _split_scan,
    ),
)
