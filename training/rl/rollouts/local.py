"""Samples rollouts with transformers' `generate`, from the model in training itself."""

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache, GenerationConfig, LogitsProcessorList

from ...config.methods import OnlineMethod
from ...models.composite import is_composite
from ...models.generation import left_padded
from ...models.loading import Model, evaluation_mode, forward_arguments
from ...models.out_of_memory import in_fitting_parts
from ...models.stopping import stop_tokens
from .rollout import Request, Rollout
from .sampling import Sampler


class LocalRollouts:
    """Generates in batches with a KV cache, which is computed once for all completions of a prompt.

    Args:
        model: the model in training, not wrapped; it samples in evaluation mode.
        tokenizer: the model's tokenizer.
        settings: the sampling settings of the method.
    """

    def __init__(self, model: Model, tokenizer: Any, settings: OnlineMethod) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._settings = settings
        self._at_once = settings.rollout_batch_size
        self._stops = stop_tokens(model, tokenizer)
        # Settings of the model's own generation configuration must not change the sampling.
        self._generation = GenerationConfig(
            max_new_tokens=settings.max_completion,
            do_sample=False,
            num_beams=1,
            use_cache=True,
            repetition_penalty=1.0,
            no_repeat_ngram_size=0,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=self._stops,
        )
        self._prefill = copy.deepcopy(self._generation)
        self._prefill.update(max_new_tokens=1, return_dict_in_generate=True)
        # Multimodal models keep positions of a prompt outside of its cache.
        has_cache = "past_key_values" in forward_arguments(model)
        # transformers takes no cache beside a kind of it that the model's folder asks for; hybrid
        # stands for none.
        takes_cache = model.generation_config.cache_implementation in (None, "hybrid")
        self._shares_prompts = has_cache and takes_cache and not is_composite(model.config)

    @torch.no_grad()
    def sample(self, requests: Sequence[Request]) -> list[Rollout]:
        """Sample a completion for each request; prompts of similar length share a batch."""
        order = sorted(range(len(requests)), key=lambda index: len(requests[index].prompt_ids))
        with evaluation_mode(self._model):
            rollouts, self._at_once = in_fitting_parts(
                *([requests[index] for index in order], self._at_once, self._batch),
                what="completions",
                remedy="a smaller method.max_completion or data.max_length takes less",
            )
        rollout_of = dict(zip(order, rollouts, strict=True))
        return [rollout_of[index] for index in range(len(requests))]

    def _batch(self, requests: Sequence[Request]) -> list[Rollout]:
        device = next(self._model.parameters()).device
        prompts = [request.prompt_ids for request in requests]
        ids, mask = left_padded(prompts, self._tokenizer.pad_token_id)
        length = self._settings.max_completion
        uniform = np.stack([request.random().random(length) for request in requests])
        sampler = Sampler(self._settings, torch.from_numpy(uniform).to(device), ids.shape[1])
        generated = self._model.generate(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            generation_config=self._generation,
            logits_processor=LogitsProcessorList([sampler]),
            past_key_values=self._cache(prompts, ids.to(device), mask.to(device)),
        )
        return [self._rollout(tokens) for tokens in generated[:, ids.shape[1] :].tolist()]

    def _cache(self, prompts: list[list[int]], ids: torch.Tensor, mask: torch.Tensor) -> Any:
        """The cache of all prompts but for their last tokens, each computed once; None if all
        prompts differ, or one has a single token.

        Args:
            prompts: token ids of each.
            ids, mask: as `left_padded` makes them of these.
        """
        numbers = {tuple(prompt): number for number, prompt in enumerate(prompts)}
        if not self._shares_prompts or len(numbers) == len(prompts) or min(map(len, prompts)) < 2:
            return None
        first = list(numbers.values())
        cache = self._model.generate(
            input_ids=ids[first, :-1],
            attention_mask=mask[first, :-1],
            generation_config=self._prefill,
        ).past_key_values
        if type(cache) is not DynamicCache:  # an architecture that keeps another state
            self._shares_prompts = False
            return None
        place = {prompt: place for place, prompt in enumerate(numbers)}
        index = [place[tuple(prompt)] for prompt in prompts]
        cache.reorder_cache(torch.tensor(index, device=ids.device))
        return cache

    def _rollout(self, tokens: list[int]) -> Rollout:
        """The rollout up to the token that ended it, without padding."""
        ends = [index for index, token in enumerate(tokens) if token in self._stops]
        return Rollout(tokens[: ends[0] + 1], True) if ends else Rollout(tokens, False)
