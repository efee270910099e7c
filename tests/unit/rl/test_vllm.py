"""The arguments that vLLM gets, with a fake vLLM; test_vllm_itself.py uses the real one."""

import copy
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from finray.training.common.errors import InputError, RunError
from finray.training.config.recipe import Recipe
from finray.training.rl.rewards.checking import check_rewards
from finray.training.rl.rollouts.rollout import Request, Rollout
from finray.training.rl.rollouts.vllm import VllmRollouts

# peft calls a name that transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


class Engine:
    """A fake engine: answers with the prompt's last token and the end, and keeps its arguments."""

    def __init__(self, **arguments: Any) -> None:
        self.arguments = arguments
        self.environment = dict(os.environ)
        self.calls: list[Any] = []

    def generate(
        self, prompts: Any, parameters: Any, *, lora_request: Any, use_tqdm: bool
    ) -> list[Any]:
        weights = load_file(Path(lora_request.path) / "adapter_model.safetensors")
        self.calls.append((lora_request, parameters, weights))
        return [
            SimpleNamespace(
                outputs=[
                    SimpleNamespace(
                        token_ids=(prompt["prompt_token_ids"][-1], 2),
                        finish_reason="stop" if number == 0 else "length",
                    )
                ]
            )
            for number, prompt in enumerate(prompts)
        ]


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    vllm, lora, request = (
        ModuleType("vllm"),
        ModuleType("vllm.lora"),
        ModuleType("vllm.lora.request"),
    )
    vllm.LLM = Engine  # type: ignore[attr-defined]
    vllm.SamplingParams = SimpleNamespace  # type: ignore[attr-defined]
    request.LoRARequest = (  # type: ignore[attr-defined]
        lambda name, number, path: SimpleNamespace(name=name, number=number, path=path)
    )
    for module in (vllm, lora, request):
        monkeypatch.setitem(sys.modules, module.__name__, module)


def test_the_adapter_is_handed_over_at_every_call(
    stand_in: None, online_recipe: Callable[..., Recipe], model: Any, tokenizer: Any
) -> None:
    recipe = online_recipe({"kind": "grpo", "temperature": 0.7, "top_k": 5})
    adapted = get_peft_model(copy.deepcopy(model), LoraConfig(r=12, target_modules=["q_proj"]))
    rollouts = VllmRollouts(recipe, adapted, tokenizer)
    engine: Any = rollouts._engine._engine
    assert engine.arguments["max_lora_rank"] == 16
    assert engine.arguments["max_model_len"] == recipe.data.max_length
    requests = [Request([5, 6, 7], (0, 1)), Request([8, 9], (0, 2))]
    assert rollouts.sample(requests) == [Rollout([7, 2], True), Rollout([9, 2], False)]
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.fill_(0.5)
    rollouts.sample(requests)
    (first, parameters, before), (second, again, after) = engine.calls
    assert first.number != second.number
    changed = next(name for name in before if "lora_B" in name)
    assert before[changed].abs().max() == 0 and after[changed].min() == 0.5
    assert [item.seed for item in parameters] == [item.seed for item in again]
    assert parameters[0].seed != parameters[1].seed
    assert (parameters[0].temperature, parameters[0].top_k, parameters[0].max_tokens) == (
        0.7,
        5,
        12,
    )
    assert tokenizer.eos_token_id in parameters[0].stop_token_ids


def test_an_engine_that_does_not_start_is_one_line(
    stand_in: None,
    online_recipe: Callable[..., Recipe],
    model: Any,
    tokenizer: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Another process may fill the GPU; a lack of memory stays one, which has its own remedies."""
    adapted = get_peft_model(copy.deepcopy(model), LoraConfig(r=4, target_modules=["q_proj"]))

    def fails(error: Exception) -> None:
        def start(**_: Any) -> None:
            raise error

        monkeypatch.setattr(sys.modules["vllm"], "LLM", start)
        VllmRollouts(online_recipe({"kind": "grpo"}), adapted, tokenizer)

    with pytest.raises(RunError, match=r"does not start .* \(Free memory .*\); free the GPU"):
        fails(ValueError("Free memory on device (1.2/79.1 GiB) on startup is less than desired"))
    with pytest.raises(torch.OutOfMemoryError):
        fails(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"))


def test_its_process_sees_one_gpu_and_no_group(
    stand_in: None,
    online_recipe: Callable[..., Recipe],
    model: Any,
    tokenizer: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A worker sees all GPUs of its node, and is a member of the workers' process group."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr("finray.training.rl.rollouts.vllm.memory_of", lambda _: 80 * 2**30)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    monkeypatch.setenv("RANK", "1")
    adapted = get_peft_model(copy.deepcopy(model), LoraConfig(r=4, target_modules=["q_proj"]))
    engine: Any = VllmRollouts(online_recipe({"kind": "grpo"}), adapted, tokenizer)._engine._engine
    assert engine.environment["CUDA_VISIBLE_DEVICES"] == "7" and "RANK" not in engine.environment
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "4,7" and os.environ["RANK"] == "1"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    engine = VllmRollouts(online_recipe({"kind": "grpo"}), adapted, tokenizer)._engine._engine
    assert engine.environment["CUDA_VISIBLE_DEVICES"] == "1"
    assert "CUDA_VISIBLE_DEVICES" not in os.environ


def test_an_adapter_that_it_would_apply_wrongly_is_refused(
    online_recipe: Callable[..., Recipe],
    model: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """vLLM scales all modules by the same alpha / rank; it is checked before loading."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    for pattern in ({}, {"q_proj": 3}):
        config = LoraConfig(r=4, target_modules=["q_proj"], alpha_pattern=pattern)
        get_peft_model(copy.deepcopy(model), config).save_pretrained(tmp_path)
        values = online_recipe({"kind": "grpo"}).model_dump(mode="json", exclude_unset=True)
        values["method"]["rollout"] = "vllm"
        values["model"]["adapter"] = str(tmp_path)
        recipe = Recipe.model_validate(values)
        if pattern:
            with pytest.raises(InputError, match="alpha_pattern"):
                check_rewards(recipe)
        else:
            check_rewards(recipe)


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("adapter", "dora", True),
        ("adapter", "rank_pattern", {"q_proj": 4}),
        ("adapter", "init", "pissa"),
        ("model", "quantize", "nf4"),
    ],
)
def test_what_it_does_not_know_is_refused(
    online_recipe: Callable[..., Recipe], section: str, key: str, value: Any
) -> None:
    values = online_recipe({"kind": "grpo"}).model_dump(mode="json", exclude_unset=True)
    values["method"]["rollout"] = "vllm"
    values.setdefault("adapter", {})
    assert Recipe.model_validate(values)
    values[section][key] = value
    with pytest.raises(ValueError, match=f"does not support {section}.{key}"):
        Recipe.model_validate(values)


def test_it_is_refused_where_it_is_not_installed(online_recipe: Callable[..., Recipe]) -> None:
    recipe = online_recipe({"kind": "grpo"})
    method = recipe.method.model_copy(update={"rollout": "vllm"})
    with pytest.raises(InputError, match=r"pip install 'finray\[vllm\]'"):
        check_rewards(recipe.model_copy(update={"method": method}))


def test_full_fine_tuning_is_refused(online_recipe: Callable[..., Recipe]) -> None:
    with pytest.raises(ValueError, match="needs an adapter"):
        online_recipe({"kind": "grpo", "rollout": "vllm"})
