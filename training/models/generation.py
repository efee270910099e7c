"""Greedy answers to held-out prompts, before and after training."""

import math
from typing import Any

import torch
import torch.distributed as dist

from ..config.sections import ANSWERS_AT_ONCE
from ..records.run_folder import is_match
from .loading import Model
from .stopping import stop_tokens


@torch.no_grad()
def generate_answers(
    model: Model,
    tokenizer: Any,
    prompts: list[list[int]],
    max_new_tokens: int,
    rank: int,
    world_size: int,
    at_once: int = ANSWERS_AT_ONCE,
) -> list[str]:
    """Generate greedy completions of all prompts; each worker generates a share of them.

    Args:
        prompts: token ids of each prompt, ending where the answer begins.
        at_once: answers that a worker generates in one batch.

    Returns:
        One text per prompt, the same on every rank.
    """
    own = list(range(rank, len(prompts), world_size))
    # Prompts of similar length share a batch, which then has little padding.
    own.sort(key=lambda index: len(prompts[index]))
    training = model.training
    model.eval()
    answers: dict[int, str] = {}
    # A sharded model needs equally many calls on all ranks: a rank without prompts left generates
    # for prompt 0 and discards the answer.
    for first in range(0, math.ceil(len(prompts) / world_size), at_once):
        chosen = own[first : first + at_once]
        texts = _generate(model, tokenizer, [prompts[i] for i in chosen or [0]], max_new_tokens)
        answers.update(zip(chosen, texts, strict=False))
    model.train(training)
    for part in _gather(answers, world_size):
        answers.update(part)
    return [answers[index] for index in range(len(prompts))]


def _generate(
    model: Model, tokenizer: Any, prompts: list[list[int]], max_new_tokens: int
) -> list[str]:
    ids, mask = left_padded(prompts, tokenizer.pad_token_id)
    device = next(model.parameters()).device
    generated = model.generate(
        input_ids=ids.to(device),
        attention_mask=mask.to(device),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        use_cache=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=stop_tokens(model, tokenizer),
    )
    texts: list[str] = tokenizer.batch_decode(
        generated[:, ids.shape[1] :], skip_special_tokens=True
    )
    return texts


def left_padded(prompts: list[list[int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask, both (prompts, longest prompt), with the padding on the left.

    Args:
        prompts: token ids of each prompt.
        pad: token id of the padding.
    """
    longest = max(len(prompt) for prompt in prompts)
    ids = torch.full((len(prompts), longest), pad)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    return ids, mask


def _gather(answers: dict[int, str], world_size: int) -> list[dict[int, str]]:
    if world_size == 1:
        return []
    parts: list[Any] = [None] * world_size
    dist.all_gather_object(parts, answers)
    return parts


def exact_match(answers: list[str], references: list[str]) -> float:
    """Share (0 to 1) of the answers that match their reference."""
    pairs = list(zip(answers, references, strict=True))
    return sum(is_match(answer, reference) for answer, reference in pairs) / len(pairs)
