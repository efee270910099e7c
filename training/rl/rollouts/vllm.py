"""Rollouts by vLLM, on the same GPU as the training (colocated), in a process of its own.

The adapter is handed over before every generation, as a folder that vLLM loads as LoRA weights.
"""

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from peft import PeftModel

from ...config.methods import OnlineMethod
from ...config.recipe import Recipe
from ...models.dtypes import choose_dtype
from ...models.generation import stop_tokens
from .rollout import Request, Rollout

_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM reserves room for."""
_MEMORY_SHARE = 0.3
"""Of the GPU, for vLLM's weights and cache; the rest is the training's."""
_OF_THE_WORKERS = (
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "NODE_RANK"),
    *("MASTER_ADDR", "MASTER_PORT"),
)
_GPUS = "CUDA_VISIBLE_DEVICES"


class VllmRollouts:
    """vLLM's engine with the base's weights, and the adapter as it is at each call.

    Args:
        recipe: of an online method, with an adapter.
        model: what is trained, not wrapped: an adapter on a base.
        tokenizer: the model's.
    """

    def __init__(self, recipe: Recipe, model: PeftModel, tokenizer: Any) -> None:
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # read when it is imported
        from vllm import LLM

        self._model = model
        self._settings = cast(OnlineMethod, recipe.method)
        self._stops = stop_tokens(model, tokenizer)
        self._calls = 0
        rank = model.peft_config[model.active_adapter].r
        with _own_device():
            self._engine = LLM(
                model=recipe.model.base,
                revision=recipe.model.revision,
                trust_remote_code=recipe.model.trust_remote_code,
                dtype=choose_dtype(recipe.model),
                max_model_len=recipe.data.max_length,
                enable_lora=True,
                max_lora_rank=next(room for room in _RANKS if room >= rank),
                gpu_memory_utilization=_MEMORY_SHARE,
                # A prompt in pieces takes drawn numbers back, which a CPU's generator cannot.
                enable_chunked_prefill=torch.cuda.is_available(),
                seed=recipe.seed,
            )

    def sample(self, requests: Sequence[Request]) -> list[Rollout]:
        """A completion to each request, drawn with a seed of its own."""
        from vllm.lora.request import LoRARequest

        if not requests:
            return []
        self._calls += 1
        prompts = [{"prompt_token_ids": request.prompt_ids} for request in requests]
        parameters = [self._parameters(request) for request in requests]
        with tempfile.TemporaryDirectory(prefix="finray-") as folder:
            self._model.save_pretrained(folder, selected_adapters=[self._model.active_adapter])
            # A new number for every call: vLLM keeps what it loaded under a number.
            adapter = LoRARequest(f"call-{self._calls}", self._calls, folder)
            outputs = self._engine.generate(
                prompts, parameters, lora_request=adapter, use_tqdm=False
            )
        answers = [output.outputs[0] for output in outputs]
        return [
            Rollout(list(answer.token_ids), answer.finish_reason == "stop") for answer in answers
        ]

    def _parameters(self, request: Request) -> Any:
        from vllm import SamplingParams

        settings = self._settings
        return SamplingParams(
            max_tokens=settings.max_completion,
            temperature=settings.temperature,
            top_p=settings.top_p,
            top_k=settings.top_k,
            stop_token_ids=self._stops,
            ignore_eos=False,
            detokenize=False,
            seed=int(request.random().integers(2**31)),
        )


@contextmanager
def _own_device() -> Iterator[None]:
    """What vLLM's process inherits: this worker's GPU alone, and no place in a process group."""
    changed = (*_OF_THE_WORKERS, _GPUS)
    before = {name: os.environ[name] for name in changed if name in os.environ}
    for name in _OF_THE_WORKERS:
        os.environ.pop(name, None)
    if torch.cuda.is_available():
        number = torch.cuda.current_device()
        visible = before.get(_GPUS)
        os.environ[_GPUS] = str(number) if visible is None else visible.split(",")[number]
    try:
        yield
    finally:
        for name in changed:
            os.environ.pop(name, None)
        os.environ.update(before)
