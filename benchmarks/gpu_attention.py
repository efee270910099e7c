"""Attention by documents on a GPU against plain attention in float64, forward and backward.

    gpu_attention.py [--dry]

Prints JSON: for each case the way that is taken and the largest error of the result and of the
gradients, relative to the largest value; for the last one also its time and memory.
"""

import json
import sys
import time
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch

ARGUMENTS: dict[str, Any] = {"scaling": None, "is_causal": None}


class Case(NamedTuple):
    """Sizes of a computation."""

    dtype: torch.dtype
    heads: int
    keys: int
    width: int
    lengths: tuple[int, ...]
    window: int | None = None
    softcap: float | None = None


_MIXED = (1, 700, 3, 129, 128, 64, 511)
CASES = {
    "bf16, grouped": Case(torch.bfloat16, 16, 8, 128, _MIXED),
    "fp16, grouped": Case(torch.float16, 16, 8, 128, _MIXED),
    "bf16, all heads": Case(torch.bfloat16, 8, 8, 64, _MIXED),
    "bf16, one key head": Case(torch.bfloat16, 8, 1, 96, _MIXED),
    "bf16, wide": Case(torch.bfloat16, 8, 4, 256, _MIXED),
    "bf16, width 192": Case(torch.bfloat16, 8, 8, 192, _MIXED),
    "bf16, window": Case(torch.bfloat16, 16, 8, 128, _MIXED, window=100),
    "bf16, window, wide": Case(torch.bfloat16, 8, 4, 256, _MIXED, window=100),
    "bf16, width 100": Case(torch.bfloat16, 8, 8, 100, _MIXED),
    "fp32, window": Case(torch.float32, 16, 8, 64, _MIXED, window=100),
    "bf16, capped": Case(torch.bfloat16, 8, 4, 64, _MIXED, softcap=30.0),
    "bf16, one document": Case(torch.bfloat16, 8, 4, 128, (2048,)),
}
LARGE = Case(torch.bfloat16, 32, 8, 128, (200, 300, 400, 500, 600, 48) * 4)
"""A layer of Llama 3.1 8B on 8,192 tokens."""


def compared(case: Case, device: torch.device) -> dict[str, Any]:
    """How a case is computed, and how exactly."""
    from finray.training.models import attention

    inputs, upstream = _inputs(case, device)
    documents = _documents(case, device)
    result = _attend(case, inputs, documents)
    gradients = torch.autograd.grad(result, inputs, upstream)
    wide = [tensor.detach().double().requires_grad_() for tensor in inputs]
    expected = _plain(case, *wide)
    right = torch.autograd.grad(expected, wide, upstream.double())
    flat = [tensor.detach()[0].transpose(0, 1) for tensor in inputs]
    by_kernel = attention._fits_kernel(*flat) and case.softcap is None
    return {
        "by": "kernel" if by_kernel else "groups" if device.type == "cuda" else "parts",
        "forward": _error(result, expected),
        "backward": max(map(_error, gradients, right)),
    }


def _inputs(case: Case, device: torch.device) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Query, key and value as a model's projections lay them out, and the gradient above."""
    generator = torch.Generator(device).manual_seed(0)
    tokens, how = sum(case.lengths), {"device": device, "generator": generator}
    made = []
    for heads in (case.heads, case.keys, case.keys):
        values = torch.randn(1, tokens, heads, case.width, **how)
        made.append(values.to(case.dtype).transpose(1, 2).requires_grad_())
    above = torch.randn(1, tokens, case.heads, case.width, **how)
    return made, above.to(case.dtype)


def _documents(case: Case, device: torch.device) -> Any:
    from finray.training.data.documents import Documents

    return Documents.of(np.array(case.lengths, np.int32)).to(device)


def _attend(case: Case, inputs: list[torch.Tensor], documents: Any) -> torch.Tensor:
    from finray.training.models.attention import attention

    how = {**ARGUMENTS, "sliding_window": case.window, "softcap": case.softcap}
    result, _ = attention(torch.nn.Identity(), *inputs, None, documents=documents, **how)
    return result


def _plain(case: Case, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Each document by itself, with all scores."""
    repeats, results = case.heads // case.keys, []
    key, value = (tensor.repeat_interleave(repeats, 1) for tensor in (key, value))
    borders = np.cumsum((0, *case.lengths)).tolist()
    for first, last in pairwise(borders):
        q, k, v = (tensor[:, :, first:last] for tensor in (query, key, value))
        scores = q @ k.transpose(-2, -1) * case.width**-0.5
        if case.softcap is not None:
            scores = (scores / case.softcap).tanh() * case.softcap
        seen = torch.ones_like(scores[0, 0], dtype=torch.bool).tril()
        if case.window is not None:
            seen = seen.triu(1 - case.window)
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        results.append((weights @ v).transpose(1, 2))
    return torch.cat(results, 1)


def _error(value: torch.Tensor, expected: torch.Tensor) -> float:
    value, expected = value.detach().double(), expected.detach()
    return float(f"{float((value - expected).abs().max() / expected.abs().max()):.2g}")


def measured(case: Case, device: torch.device) -> dict[str, Any]:
    """Milliseconds of a forward and backward pass, and bytes that it takes beside its inputs."""
    inputs, upstream = _inputs(case, device)
    documents = _documents(case, device)
    for _ in range(3):
        torch.autograd.grad(_attend(case, inputs, documents), inputs, upstream)
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    before, begun = torch.cuda.memory_allocated() if on_gpu else 0, time.monotonic()
    rounds = 20 if on_gpu else 1
    for _ in range(rounds):
        torch.autograd.grad(_attend(case, inputs, documents), inputs, upstream)
    if on_gpu:
        torch.cuda.synchronize()
    seconds = (time.monotonic() - begun) / rounds
    most = torch.cuda.max_memory_allocated() - before if on_gpu else 0
    return {"ms": round(1e3 * seconds, 3), "mib": round(most / 2**20, 1)}


def main() -> int:
    """Compute all cases; one that fails ends no other."""
    dry = "--dry" in sys.argv
    device = torch.device("cpu" if dry else "cuda")
    results: dict[str, Any] = {}
    for name, case in CASES.items():
        if dry and case.dtype == torch.float16:  # needs a GPU
            continue
        try:
            results[name] = compared(case, device)
        except Exception as error:  # noqa: BLE001
            results[name] = {"error": f"{type(error).__name__}: {error}"[:300]}
    large = LARGE._replace(dtype=torch.float32, lengths=(64,)) if dry else LARGE
    results["8,192 tokens"] = measured(large, device)
    print(json.dumps(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
