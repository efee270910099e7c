"""Log-probabilities of tokens, without a second copy of the logits."""

from typing import Any

import torch

from ..data.batching import IGNORED

# Number of logits that are converted to float32 at a time.
_PART = 2**20


def token_log_probabilities(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Log-probability (nats) of each target, 0 for IGNORED ones: (sequences, columns), float32.

    It reads only rows of logits with a target, part by part. The only tensor of the logits' size
    that it makes is their gradient.

    Args:
        logits: (sequences, columns, vocabulary).
        targets: (sequences, columns).
    """
    flat = targets.flatten()
    trained = (flat != IGNORED).nonzero().squeeze(1)
    chosen: torch.Tensor = _Chosen.apply(logits, trained, flat[trained])  # type: ignore[no-untyped-call]
    empty = torch.zeros(flat.shape, dtype=torch.float32, device=logits.device)
    return empty.index_put((trained,), chosen).view(targets.shape)


class _Chosen(torch.autograd.Function):
    """log softmax(logits)[token] of some rows; d/d logits = one_hot(token) - softmax(logits)."""

    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, rows: torch.Tensor, tokens: torch.Tensor
    ) -> torch.Tensor:
        flat = logits.flatten(0, 1)
        parts = torch.split(rows, _rows_at_a_time(logits))
        norms = torch.cat([flat[part].float().logsumexp(-1) for part in parts])
        ctx.save_for_backward(logits, rows, tokens, norms)
        return flat[rows, tokens].float() - norms

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        logits, rows, tokens, norms = ctx.saved_tensors
        gradient = torch.zeros_like(logits)
        flat, into = logits.flatten(0, 1), gradient.flatten(0, 1)
        size = _rows_at_a_time(logits)
        for part, token, norm, factor in zip(
            *(torch.split(tensor, size) for tensor in (rows, tokens, norms, upstream[0])),
            strict=True,
        ):
            of_part = (flat[part].float() - norm[:, None]).exp_().mul_(-factor[:, None])
            of_part[torch.arange(len(part), device=part.device), token] += factor
            into[part] = of_part.to(logits.dtype)
        return gradient, None, None


def _rows_at_a_time(logits: torch.Tensor) -> int:
    return max(1, _PART // logits.shape[-1])
