"""Samples rollouts with vLLM on the GPU of the training (colocated), in a separate process.

Before every generation the adapter is written to a folder, which vLLM loads as LoRA weights.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel

from ...common.errors import FinrayError, InputError, RunError, in_one_line
from ...common.scratch import scratch_folder
from ...config.methods import OnlineMethod
from ...config.recipe import Recipe
from ...data.rows import Row
from ...models.devices import device_kind, memory_of
from ...models.dtypes import choose_dtype
from ...models.memory_estimate import sizes_of, vllm_share
from ...models.out_of_memory import is_out_of_memory
from ...models.stopping import stop_tokens
from .rollout import Request, Rollout

_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""The maximum LoRA ranks that vLLM supports."""
SHARE_OF_HOST = 0.3
"""Share of the memory for vLLM's weights and cache where it samples on the CPU."""
_GROUP_VARIABLES = (
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "NODE_RANK"),
    *("MASTER_ADDR", "MASTER_PORT"),
)
_GPUS = "CUDA_VISIBLE_DEVICES"


@dataclass(frozen=True)
class EngineSettings:
    """What an engine loads."""

    base: str
    """Hub id or folder."""
    revision: str | None
    trust_remote_code: bool
    dtype: str
    max_length: int | None
    """Most tokens of a prompt with its completion; None for the model's own."""
    rank: int | None
    """Largest rank of an adapter; None for no adapter."""
    share: float
    """Share of the device's memory, 0 to 1."""
    seed: int = 0


class Engine:
    """vLLM's engine in a process of its own.

    Args:
        settings: what it loads.
    """

    def __init__(self, settings: EngineSettings) -> None:
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # vLLM reads it when imported
        from vllm import LLM

        adapters: dict[str, Any] = {}
        if (rank := settings.rank) is not None:
            most = next((maximum for maximum in _RANKS if maximum >= rank), None)
            if most is None:
                raise InputError(f"vLLM takes no adapter of rank {rank}; the most is {_RANKS[-1]}")
            adapters = {"enable_lora": True, "max_lora_rank": most}
        with _own_device():
            self._engine = LLM(
                model=settings.base,
                revision=settings.revision,
                trust_remote_code=settings.trust_remote_code,
                dtype=settings.dtype,
                max_model_len=settings.max_length,
                gpu_memory_utilization=settings.share,
                # Chunked prefill rewinds the random generator, which the CPU's does not support.
                enable_chunked_prefill=torch.cuda.is_available(),
                seed=settings.seed,
                **adapters,
            )
        self._adapters = 0

    def adapter(self, folder: Path) -> Any:
        """An adapter to complete with; it has a new id, as vLLM caches that of each id."""
        from vllm.lora.request import LoRARequest

        self._adapters += 1
        return LoRARequest(f"adapter-{self._adapters}", self._adapters, str(folder))

    def complete(
        self, prompts: Sequence[list[int]], parameters: Sequence[Row], adapter: Any = None
    ) -> list[Rollout]:
        """A completion of each prompt.

        Args:
            prompts: token ids.
            parameters: of vLLM's SamplingParams, for each prompt.
            adapter: of `adapter`; None for the base alone.
        """
        from vllm import SamplingParams

        outputs = self._engine.generate(
            [{"prompt_token_ids": ids} for ids in prompts],
            [SamplingParams(detokenize=False, ignore_eos=False, **how) for how in parameters],
            lora_request=adapter,
            use_tqdm=False,
        )
        completions = [output.outputs[0] for output in outputs]
        return [Rollout(list(c.token_ids), c.finish_reason == "stop") for c in completions]


class VllmRollouts:
    """Samples with vLLM's engine: the base's weights, and the adapter's at the time of a call.

    Args:
        recipe: a recipe with an online method and an adapter.
        model: the model in training, not wrapped: an adapter on a base.
        tokenizer: the model's tokenizer.
    """

    def __init__(self, recipe: Recipe, model: PeftModel, tokenizer: Any) -> None:
        self._model = model
        self._settings = cast(OnlineMethod, recipe.method)
        self._stops = stop_tokens(model, tokenizer)
        self._engine = _started(
            EngineSettings(
                base=recipe.model.base,
                revision=recipe.model.revision,
                trust_remote_code=recipe.model.trust_remote_code,
                dtype=choose_dtype(recipe.model),
                max_length=recipe.data.max_length,
                rank=model.peft_config[model.active_adapter].r,
                share=_share(recipe),
                seed=recipe.seed,
            )
        )

    def sample(self, requests: Sequence[Request]) -> list[Rollout]:
        """Sample a completion for each request, with the request's own seed."""
        if not requests:
            return []
        prompts = [request.prompt_ids for request in requests]
        parameters = [self._parameters(request) for request in requests]
        with scratch_folder("adapter") as folder:
            self._model.save_pretrained(str(folder), selected_adapters=[self._model.active_adapter])
            return self._engine.complete(prompts, parameters, self._engine.adapter(folder))

    def _parameters(self, request: Request) -> Row:
        settings = self._settings
        return {
            "max_tokens": settings.max_completion,
            "temperature": settings.temperature,
            "top_p": settings.top_p,
            "top_k": settings.top_k,
            "stop_token_ids": self._stops,
            "seed": int(request.random().integers(2**31)),
        }


def _started(settings: EngineSettings) -> Engine:
    """The engine beside the training.

    Raises:
        RunError: vLLM refuses to start, as another process fills the GPU or it lacks the model.
    """
    try:
        return Engine(settings)
    except (RuntimeError, ValueError) as error:
        if isinstance(error, FinrayError) or is_out_of_memory(error):
            raise
        raise RunError(
            f"method.rollout: vLLM does not start beside the training ({in_one_line(error)}); free "
            "the GPU of other processes, or set rollout: transformers"
        ) from error


def _share(recipe: Recipe) -> float:
    """The share of the memory for vLLM's weights and cache, beside the training.

    Raises:
        InputError: the training leaves too little.
    """
    kind = device_kind()
    if kind not in ("cuda", "xpu"):
        return SHARE_OF_HOST
    total = memory_of(torch.device(kind))
    return vllm_share(recipe, sizes_of(recipe), choose_dtype(recipe.model), total)


@contextmanager
def _own_device() -> Iterator[None]:
    """Inside, a new process inherits only this worker's GPU, and no place in a process group."""
    changed = (*_GROUP_VARIABLES, _GPUS)
    before = {name: os.environ[name] for name in changed if name in os.environ}
    for name in _GROUP_VARIABLES:
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
