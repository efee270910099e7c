"""Compares the estimated memory of a step with what torch's allocator gives out, on the CPU.

For each configuration a small model with random weights computes the loss and the gradients of one
microbatch, whose texts share rows as a rehearsal finds it; the allocator's own record says how much
was held at once.
"""

import argparse
import gc
import json
import logging
import shutil
import tempfile
import warnings
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import torch
import transformers
from measure import Figure, Target, conclude, parse_options
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig, AutoModelForCausalLM

from finray.training.common.storage import Folder
from finray.training.config.recipe import Recipe, recipe_from_dict
from finray.training.config.sections import Isolation
from finray.training.data.batching import Batch, Rows
from finray.training.data.prepared import Prepared
from finray.training.data.stream import Sequence
from finray.training.engine.methods import objective_of
from finray.training.models import import_peft  # noqa: F401 - before what loads peft
from finray.training.models.dtypes import needs_autocast
from finray.training.models.loading import Model, load_model
from finray.training.models.memory_estimate import estimate, sizes_of
from finray.training.objectives.objective import Setup
from finray.training.rehearsal.outcome import Outcome
from finray.training.rehearsal.packing import find_isolation, scores_alike, shares_prefixes
from finray.training.rehearsal.rehearse import ways_of
from finray.training.rehearsal.small_copy import VOCABULARY, make_copy, small_recipe
from finray.training.rl.online import OnlineObjective
from finray.training.rl.rollouts.rollout import Request, Rollout
from finray.training.rl.scoring import Scores

QUICKSTART = Path(__file__).resolve().parent.parent / "recipes/quickstart/base"
SIZES: dict[str, Any] = {
    "vocab_size": 2048,
    "hidden_size": 128,
    "intermediate_size": 320,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 4096,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 96}
LOCAL = {"num_local_experts": 8, "num_experts_per_tok": 2}
MAMBA = {"mamba_n_heads": 16, "mamba_d_head": 16, "mamba_d_state": 32}
LATENT = {
    "kv_lora_rank": 32,
    "q_lora_rank": 48,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "num_key_value_heads": 8,
    "n_shared_experts": 1,
    "topk_group": 1,
}
LINEAR = {
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 8,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
FULL = "full_attention"
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "qwen3": ("qwen3", {}),
    "gemma3": ("gemma3_text", {"sliding_window": 256}),
    "olmo2": ("olmo2", {}),
    "phi3": ("phi3", {}),
    "large vocabulary": ("llama", {"vocab_size": 2**17}),
    "gemma2": ("gemma2", {"sliding_window": 256, "query_pre_attn_scalar": 16}),
    "cohere": ("cohere", {}),
    "gpt2": ("gpt2", {"n_positions": 4096}),
    "mixtral": ("mixtral", LOCAL),
    "qwen3_moe": ("qwen3_moe", EXPERTS),
    "gpt_oss": ("gpt_oss", {**LOCAL, "sliding_window": 128}),
    "granite hybrid": (
        "granitemoehybrid",
        {**LOCAL, **MAMBA, "layer_types": ["mamba", "attention", "mamba", "attention"]},
    ),
    "mamba2": ("mamba2", {"num_heads": 16, "head_dim": 16, "state_size": 32, "n_groups": 1}),
    "lfm2": ("lfm2", {}),
    "qwen3, tied": ("qwen3", {"tie_word_embeddings": True}),
    "gemma2, large vocabulary": (
        "gemma2",
        {"sliding_window": 128, "query_pre_attn_scalar": 16, "vocab_size": 2**16},
    ),
    "deepseek_v3": (
        "deepseek_v3",
        {**LATENT, **EXPERTS, "n_routed_experts": 8, "first_k_dense_replace": 1, "n_group": 2},
    ),
    "qwen3_5": ("qwen3_5_text", {**LINEAR, "layer_types": [*3 * ["linear_attention"], FULL]}),
    "bamba": ("bamba", {**MAMBA, "attn_layer_indices": [1, 3], "mamba_n_groups": 1}),
    "bloom": ("bloom", {}),
    "minimax": ("minimax", {**LOCAL, "layer_types": 2 * ["linear_attention", FULL]}),
}
LOW: dict[str, Any] = {"adapter": {"rank": 8}, "model": {"dtype": "bfloat16"}}
FLOAT: dict[str, Any] = {"adapter": {"rank": 8}, "model": {"dtype": "float32"}}
CASTS: dict[str, Any] = {
    "adapter": {"rank": 8, "dtype": "float32"},
    "model": {"dtype": "bfloat16"},
}
WHOLE: dict[str, Any] = {"model": {"dtype": "bfloat16"}}
METHODS = ("dpo", "kto", "orpo", "cpo", "simpo", "reward")
ONLINE = {
    "grpo": {},
    "grpo, divergence": {"beta": 0.1},
    "grpo, two passes": {"passes": 2},
    "rloo": {},
    "rloo, divergence": {"beta": 0.1},
}
TOKENS, DOCUMENTS, PROMPT = 512, 4, 8
"""Of a row; documents of a packed row; tokens of a prompt."""
CLOSE = 0.01
"""A difference that counts as none."""
QUICK = ("llama, packed", "llama, dpo")


def cases() -> dict[str, tuple[str, dict[str, Any]]]:
    """(model, settings) by name."""
    made: dict[str, tuple[str, dict[str, Any]]] = {}
    for kind in KINDS:
        made[f"{kind}, packed"] = kind, LOW
        made[f"{kind}, one document a row"] = kind, {**LOW, "data": {"packing": False}}
    for kind in ("llama", "qwen3", "mixtral", "granite hybrid", "large vocabulary"):
        made[f"{kind}, checkpointing"] = kind, merged(LOW, model={"gradient_checkpointing": True})
        made[f"{kind}, all weights"] = kind, WHOLE
    for kind in ("bloom", "qwen3_5", "deepseek_v3", "bamba", "gpt_oss", "mamba2"):
        made[f"{kind}, checkpointing"] = kind, merged(LOW, model={"gradient_checkpointing": True})
    for kind in ("llama", "qwen3, tied", "gemma2, large vocabulary", "granite hybrid"):
        whole = merged(WHOLE, model={"gradient_checkpointing": True})
        made[f"{kind}, all weights, checkpointing"] = kind, whole
    wide = {"model": {"dtype": "float32", "gradient_checkpointing": True}}
    made["qwen3, tied, all weights, float32, checkpointing"] = "qwen3, tied", wide
    made["qwen3_moe, autocast, checkpointing"] = (
        "qwen3_moe",
        merged(CASTS, model={"gradient_checkpointing": True}),
    )
    saved = merged(LOW, adapter={"modules_to_save": ["embed_tokens", "lm_head"]})
    made["large vocabulary, embedding and head saved"] = "large vocabulary", saved
    made["llama, DoRA"] = "llama", merged(LOW, adapter={"dora": True})
    made["llama, nf4"] = "llama", merged(LOW, model={"quantize": "nf4"})
    made["llama, head alone"] = "llama", {**WHOLE, "freeze": {"train": ["lm_head"]}}
    made["llama, sdpa"] = "llama", merged(LOW, model={"attention": "sdpa"})
    made["llama, reward of all weights"] = "llama", {**WHOLE, "method": {"kind": "reward"}}
    made["llama, dropout, checkpointing, microbatch 4"] = (
        "llama",
        {
            **merged(LOW, adapter={"dropout": 0.1}, model={"gradient_checkpointing": True}),
            "optim": {"micro_batch_size": 4},
        },
    )
    made["llama, float32"] = "llama", FLOAT
    made["llama, autocast"] = "llama", CASTS
    made["llama, dropout"] = "llama", merged(LOW, adapter={"dropout": 0.1})
    made["llama, eager"] = "llama", merged(LOW, model={"attention": "eager"})
    made["llama, adapter of the head"] = "llama", merged(LOW, adapter={"targets": ["lm_head"]})
    made["llama, last layers"] = "llama", {**WHOLE, "freeze": {"last_layers": 2}}
    made["llama, microbatch 4"] = "llama", {**LOW, "optim": {"micro_batch_size": 4}}
    for method in METHODS:
        made[f"llama, {method}"] = "llama", {**LOW, "method": {"kind": method}}
    for name, settings in ONLINE.items():
        made[f"llama, {name}"] = "llama", {**LOW, "method": online(name, settings)}
    made["qwen3, grpo of all weights"] = "qwen3", {**WHOLE, "method": online("grpo", {"beta": 0.1})}
    made["llama, dpo under autocast"] = "llama", {**CASTS, "method": {"kind": "dpo"}}
    made["qwen3, dpo of all weights"] = "qwen3", {**WHOLE, "method": {"kind": "dpo"}}
    return made


def online(name: str, settings: dict[str, Any]) -> dict[str, Any]:
    """An online method whose completions fill their rows."""
    return {
        "kind": name.partition(",")[0],
        "rewards": [{"file": "/x/rewards.py:worth", "source": ""}],
        "generations": 2,
        "max_completion": TOKENS - PROMPT,
        **settings,
    }


def merged(settings: dict[str, Any], **sections: Any) -> dict[str, Any]:
    """Settings with further keys in their sections."""
    return {**settings, **{name: {**settings.get(name, {}), **sections[name]} for name in sections}}


def recipe_of(base: Path, settings: dict[str, Any]) -> Recipe:
    """A recipe with a microbatch of one row of TOKENS."""
    return recipe_from_dict(
        {
            "name": "run",
            **settings,
            "model": {"base": str(base), **settings.get("model", {})},
            "data": {"train": [{"path": "/x"}], "max_length": TOKENS, **settings.get("data", {})},
            "optim": {"micro_batch_size": 1, **settings.get("optim", {})},
            "scale": {"workers": 0},
        }
    )


def make_base(kind: str, folder: Path) -> Path:
    """A model of a kind with random weights."""
    name, more = KINDS[kind]
    target = folder / kind.replace(" ", "-")
    if not target.is_dir():
        torch.manual_seed(0)
        config = AutoConfig.for_model(name, **{**SIZES, **more})
        AutoModelForCausalLM.from_config(config).save_pretrained(target)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(QUICKSTART / file, target)
    return target


def full_row(recipe: Recipe, number: int) -> Sequence:
    """A row of TOKENS in each of its texts, of which all but the first are trained."""
    random = np.random.default_rng(number)
    texts = recipe.method.sequences_per_row
    if recipe.method.samples_online:
        nothing, size = np.zeros(PROMPT, bool), np.array([PROMPT], np.int32)
        return Sequence(np.full(PROMPT, 3, np.int32), size, nothing, np.array([number]), "{}")
    documents = DOCUMENTS if recipe.packs else texts
    lengths = np.full(documents, TOKENS * texts // documents, np.int32)
    trainable = np.ones(TOKENS * texts, bool)
    trainable[np.cumsum(lengths) - lengths] = False
    ids = random.integers(3, SIZES["vocab_size"], TOKENS * texts).astype(np.int32)
    extra = {"kto": json.dumps({"label": bool(number % 2)})}.get(recipe.method.kind)
    return Sequence(ids, lengths, trainable, np.array([number]), extra)


def step_of(recipe: Recipe, model: Model, way: Isolation | None) -> tuple[Any, Batch]:
    """The objective, and the batch of a full microbatch, whose texts share rows in this way."""
    prepared, cpu = Prepared(Folder("/none"), Mock()), torch.device("cpu")
    tokenizer = Mock(pad_token_id=0, decode=Mock(return_value=""))
    setup = Setup(recipe, model, tokenizer, prepared, 0, 1, cpu, isolation=way)
    objective = objective_of(setup)
    objective.prepare()
    if isinstance(objective, OnlineObjective):
        objective._rollouts = rolled_out  # type: ignore[method-assign]
    rows = [full_row(recipe, number) for number in range(recipe.microbatch)]
    with torch.no_grad():
        return objective, objective.batches(0, rows)[0]


def rolled_out(requests: list[Request], rows: Rows) -> tuple[list[Rollout], Scores]:
    """Completions that fill their rows, and rewards that differ."""
    del rows
    count, size = len(requests), TOKENS - PROMPT
    random = np.random.default_rng(0)
    rollouts = [
        Rollout(random.integers(3, SIZES["vocab_size"], size).tolist(), True) for _ in requests
    ]
    rewards = torch.arange(count, dtype=torch.float64)
    return rollouts, Scores(rewards, rewards[None], 0, [""] * count)


def most_held(recipe: Recipe, model: Model, way: Isolation | None) -> int:
    """Bytes that the loss and its gradients of a microbatch hold at once, beside the gradients."""
    objective, batch = step_of(recipe, model, way)
    casts = needs_autocast(recipe)
    model.train()
    if recipe.model.checkpoints:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    for weight in model.parameters():
        if weight.requires_grad:
            weight.grad = torch.zeros_like(weight)
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        with torch.autocast("cpu", torch.bfloat16, enabled=casts):
            loss = objective.loss(model, batch, False).total
        loss.backward()
        del loss
    held = most = 0
    for event in seen.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


def rehearsed(recipe: Recipe, folder: Path) -> Outcome:
    """How texts share a row, as a rehearsal finds it."""
    scratch = Path(tempfile.mkdtemp(dir=folder))
    copy = make_copy(recipe, scratch)
    way, _ = find_isolation(copy, VOCABULARY, ways_of(recipe))
    scores = recipe.method.head == "score"
    shares = way == "documents" and not recipe.method.packs and shares_prefixes(copy, VOCABULARY)
    if scores and not scores_alike(small_recipe(recipe, copy, scratch), copy, way, shares):
        way = None
    return Outcome("ok", isolation=way)


def compare(name: str, folder: Path) -> dict[str, Any]:
    """The estimate of a case beside what was held."""
    kind, settings = cases()[name]
    recipe = recipe_of(make_base(kind, folder), settings)
    outcome = rehearsed(recipe, folder)
    recipe = outcome.settle(recipe)
    if recipe.packs:
        recipe = recipe.with_longest(TOKENS // DOCUMENTS)
    way = outcome.way(recipe.packs)
    estimated = estimate(recipe, sizes_of(recipe), kind="cpu").activations
    held = most_held(recipe, load_model(recipe, recipe.method.head), way)
    error = round(estimated / held - 1, 4)
    return {"estimated": estimated, "held": held, "error": error, "isolation": way}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this benchmark alone."""
    parser.add_argument("--only", nargs="*", choices=cases(), help="print some; nothing is written")


def main() -> None:
    """Print a line for each case, and write all."""
    options, given = parse_options(__doc__, repetitions=1, add=add_arguments)
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in given.only or (QUICK if options.quick else cases()):
            results[name] = compare(name, Path(folder))
            print(f"{name:36} {results[name]}", flush=True)
    errors = [abs(result["error"]) for result in results.values()]
    close = sum(error <= CLOSE for error in errors)
    print(f"{close} of {len(errors)} within {CLOSE:.0%}")
    if given.only:
        return
    figures = [
        Figure(
            f"estimates of a step's memory within 1 % of the allocator, of {len(errors)}",
            (close,),
            None if options.quick else Target("at least", 40),
        ),
        Figure("largest difference of an estimate from the allocator", (max(errors),)),
    ]
    conclude("estimate", options, figures, {"error": errors}, {"cases": results})


if __name__ == "__main__":
    main()
