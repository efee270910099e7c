"""Greedy answers to held-out prompts, before and after training."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from ..config.sections import ANSWERS_AT_ONCE
from ..records.run_folder import is_match
from .loading import Model
from .stopping import stop_tokens


@torch.no_grad()
def generate_completions(
    model: Model,
    tokenizer: Any,
    prompts: list[list[int]],
    max_new_tokens: int,
    rank: int,
    world_size: int,
    at_once: int = ANSWERS_AT_ONCE,
) -> list["Generated"]:
    """Generate greedy completions of all prompts; each worker generates a share of them.

    Which prompts share a batch is the same for any number of workers.

    Args:
        prompts: token ids of each prompt, ending where the answer begins.
        at_once: answers that a worker generates in one batch.

    Returns:
        One completion per prompt, the same on every rank.
    """
    # Prompts of similar length share a batch, which then has little padding.
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    batches = [order[first : first + at_once] for first in range(0, len(order), at_once)]
    training = model.training
    model.eval()
    completions: dict[int, Generated] = {}
    # A sharded model needs equally many calls on all ranks: a rank without batches left generates
    # for prompt 0 and discards the answer.
    for first in range(0, len(batches), world_size):
        chosen = batches[first + rank] if first + rank < len(batches) else []
        texts = [prompts[index] for index in chosen or [0]]
        generated = generate_ids(model, tokenizer, texts, max_new_tokens)
        completions.update(zip(chosen, generated, strict=False))
    model.train(training)
    for part in _gather(completions, world_size):
        completions.update(part)
    return [completions[index] for index in range(len(prompts))]


@dataclass(frozen=True)
class Generated:
    """A generated completion."""

    ids: list[int]
    """Token ids, including the token that ended the completion."""
    ended: bool
    """True if a stop token ended it, False if it was cut off at the maximum length."""


@torch.no_grad()
def generate_ids(
    model: Model,
    tokenizer: Any,
    prompts: list[list[int]],
    max_new_tokens: int,
    stops: list[int] | None = None,
    **how: Any,
) -> list[Generated]:
    """Generate the completions of one batch of prompts; greedy ones, unless a processor of the
    scores chooses.

    Args:
        model: a language model in evaluation mode, on its device.
        tokenizer: its tokenizer.
        prompts: token ids of each prompt, ending where the completion begins.
        max_new_tokens: longest completion.
        stops: `stop_tokens` of the two, if they are computed already.
        how: `logits_processor`, `streamer` or `stopping_criteria` of transformers' `generate`.
    """
    pad = tokenizer.pad_token_id
    stops = stop_tokens(model, tokenizer) if stops is None else stops
    if pad is None:  # only a batch of equally long prompts needs none
        pad = stops[0] if stops else 0
    ids, mask = left_padded(prompts, pad)
    device = next(model.parameters()).device
    generated = model.generate(
        input_ids=ids.to(device),
        attention_mask=mask.to(device),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        use_cache=True,
        pad_token_id=pad,
        eos_token_id=stops or None,
        **how,
    )
    return [_up_to_stop(tokens, stops) for tokens in generated[:, ids.shape[1] :].tolist()]


def _up_to_stop(tokens: list[int], stops: list[int]) -> Generated:
    """The completion without the padding behind the token that ended it."""
    ends = next((index for index, token in enumerate(tokens) if token in stops), None)
    return Generated(tokens, False) if ends is None else Generated(tokens[: ends + 1], True)


def completion_texts(tokenizer: Any, completions: Sequence[Generated]) -> list[str]:
    """The completions as text, without special tokens."""
    texts: list[str] = tokenizer.batch_decode(
        [completion.ids for completion in completions], skip_special_tokens=True
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


def _gather(completions: dict[int, Generated], world_size: int) -> list[dict[int, Generated]]:
    if world_size == 1:
        return []
    parts: list[Any] = [None] * world_size
    dist.all_gather_object(parts, completions)
    return parts


def exact_match(answers: list[str], references: list[str]) -> float:
    """Share (0 to 1) of the answers that match their reference."""
    pairs = list(zip(answers, references, strict=True))
    return sum(is_match(answer, reference) for answer, reference in pairs) / len(pairs)
