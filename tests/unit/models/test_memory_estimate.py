"""The estimated memory, compared with what a model really keeps for its backward pass."""

import gc
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from support.real_models import LLAMA_8B, LLAMA_8B_CONFIG, write_config
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForSequenceClassification

from finray.training.common.errors import InputError
from finray.training.config.methods import GrpoMethod
from finray.training.config.recipe import Recipe, recipe_from_dict
from finray.training.data.documents import Documents
from finray.training.models import memory_estimate as memory
from finray.training.models.activations import kept_by
from finray.training.models.attention import attend_by_documents, no_mask
from finray.training.models.devices import Room
from finray.training.models.dtypes import DtypeName
from finray.training.models.loading import load_model
from finray.training.models.memory_estimate import (
    MemoryEstimate,
    attention_of,
    cache_bytes,
    estimate,
    sizes_of,
    trained_layers,
    vllm_share,
)
from finray.training.models.placement import decide, with_strategy
from finray.training.records.run_folder import RUN_FORMAT
from finray.training.rl.rollouts.sampling import Sampler

# peft calls a name that transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

TOKENS = 48
LATENT = {
    "head_dim": 8,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
}
SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 48,
    "intermediate_size": 112,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": TOKENS,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LORA: dict[str, Any] = {"adapter": {"rank": 4}}
CASES: dict[str, dict[str, Any]] = {
    "lora-float32": {**LORA, "model": {"dtype": "float32"}},
    "lora-bfloat16": {**LORA, "model": {"dtype": "bfloat16"}},
    "lora-autocast": {
        "adapter": {"rank": 4, "dtype": "float32"},
        "model": {"dtype": "bfloat16"},
    },
    "dropout": {"adapter": {"rank": 4, "dropout": 0.1}, "model": {"dtype": "float32"}},
    "dropout-bfloat16": {"adapter": {"rank": 4, "dropout": 0.1}, "model": {"dtype": "bfloat16"}},
    "full-float32": {"model": {"dtype": "float32"}},
    "full-autocast": {"model": {"dtype": "bfloat16"}},
}


def make_base(folder: Path, layers: int) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64,
        hidden_size=48,
        intermediate_size=112,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=TOKENS,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).save_pretrained(folder / f"layers-{layers}")
    return folder / f"layers-{layers}"


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """The same model with one layer and with three."""
    folder = tmp_path_factory.mktemp("bases")
    return {layers: make_base(folder, layers) for layers in (1, 3)}


def recipe(base: Path, **settings: Any) -> Recipe:
    model = {"base": str(base), **settings.pop("model", {})}
    optim = {"micro_batch_size": 1, **settings.pop("optim", {})}
    return recipe_from_dict(
        {
            "name": "run",
            "model": model,
            "data": {
                "train": [{"path": "/rows.jsonl"}],
                "max_length": TOKENS,
                "packing": settings.pop("packing", False),
            },
            "optim": optim,
            **settings,
        }
    )


def forward(settings: Recipe, model: Any, positions: torch.Tensor | None = None) -> torch.Tensor:
    ids = torch.arange(TOKENS)[None] % 64
    positions = torch.arange(TOKENS)[None] if positions is None else positions
    lower = settings.model.dtype == "bfloat16"
    casts = lower and next(p for p in model.parameters() if p.requires_grad).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16, enabled=casts):
        logits: torch.Tensor = model(input_ids=ids, position_ids=positions, use_cache=False).logits
    return logits


def bytes_kept(
    settings: Recipe, positions: torch.Tensor | None = None, documents: Documents | None = None
) -> int:
    """Bytes that a forward pass keeps for the backward pass, without the model itself."""
    model = load_model(settings)
    model.train()
    if documents is not None:
        attend_by_documents(model)
        more = {"documents": documents, "attention_mask": no_mask(model.device)}
        model.register_forward_pre_hook(
            lambda _, args, kwargs: (args, {**kwargs, **more}), with_kwargs=True
        )
    own = {
        tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())
    }
    storages: dict[int, int] = {}
    alive = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        forward(settings, model, positions)
    return sum(storages.values())


def whole(settings: Recipe) -> int:
    """Bytes that are kept by the estimate."""
    compute: DtypeName = "float32" if settings.model.dtype == "float32" else "bfloat16"
    trained = next(w.dtype for w in load_model(settings).parameters() if w.requires_grad)
    trained_name: DtypeName = "float32" if trained == torch.float32 else "bfloat16"
    kept = kept_by(settings, 1, TOKENS, compute, trained_name, "plain")
    assert kept is not None
    return kept.whole


def estimated_bytes(settings: Recipe) -> int:
    """Bytes of a microbatch's activations and logits on a CPU."""
    return estimate(settings, sizes_of(settings), kind="cpu").activations


@pytest.mark.long
@pytest.mark.parametrize("case", CASES)
def test_two_layers_keep_the_estimated_bytes(bases: dict[int, Path], case: str) -> None:
    """The values are equal; embedding, head and logits are the same in both models."""
    single, three = (recipe(bases[layers], **CASES[case]) for layers in (1, 3))
    assert whole(three) - whole(single) == bytes_kept(three) - bytes_kept(single)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_checkpointing_keeps_the_layers_inputs(bases: dict[int, Path], dtype: str) -> None:
    def live(settings: Recipe) -> int:
        model = load_model(settings)
        model.train()
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
        logits = forward(settings, model)
        gc.collect()
        shape = (1, TOKENS, 48)
        sizes = {
            tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
            for tensor in gc.get_objects()
            if type(tensor) is torch.Tensor and tensor.shape == shape
        }
        assert logits.requires_grad
        return sum(sizes.values())

    settings = [
        recipe(bases[n], **LORA, model={"dtype": dtype, "gradient_checkpointing": True})
        for n in (1, 3)
    ]
    kept = [kept_by(one, 1, TOKENS, dtype, dtype, "plain") for one in settings]  # type: ignore[arg-type]
    one, three = kept
    assert one is not None and three is not None
    assert three.inputs - one.inputs == live(settings[1]) - live(settings[0])
    size = TOKENS * 48 * (4 if dtype == "float32" else 2)
    assert [one.inputs, three.inputs] == [size, 3 * size]


@pytest.mark.parametrize("case", ["lora-float32", "lora-bfloat16", "full-float32"])
def test_weights_and_states_have_the_estimated_size(bases: dict[int, Path], case: str) -> None:
    """The estimate equals the size of a real model's tensors after an optimizer step."""
    from finray.training.engine.optimizer import make_optimizer

    settings = recipe(bases[3], **CASES[case], scale={"workers": 0})
    model = load_model(settings)
    optimizer = make_optimizer(
        model.named_parameters(), (), learning_rate=1e-3, betas=(0.9, 0.99), eps=1e-8,
        weight_decay=0.0, lora_plus_ratio=None,
    )  # fmt: skip
    forward(settings, model).float().sum().backward()
    gradients = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    optimizer.step()
    masters = sum(
        2 * p.nbytes  # and its gradient in the step
        for group in optimizer.param_groups
        for p in group["params"]
        if not any(p is weight for weight in model.parameters())
    )
    moments = sum(
        value.nbytes
        for state in optimizer.state.values()
        for value in state.values()
        if value.ndim > 0
    )
    memory = estimate(settings, sizes_of(settings))
    assert memory.weights == sum(parameter.nbytes for parameter in model.parameters())
    assert memory.training == gradients + masters + moments
    assert memory.peak > memory.weights + memory.training + memory.activations


@pytest.mark.long
def test_what_multiplies_it(bases: dict[int, Path]) -> None:
    plain = recipe(bases[3], **LORA)
    assert estimated_bytes(
        recipe(bases[3], **LORA, optim={"micro_batch_size": 3})
    ) == pytest.approx(3 * estimated_bytes(plain), rel=0.03)
    # With few logits, the gradients inside a layer are the most that there is beside what is kept.
    for kind in ("simpo", "reward"):
        pairs = recipe(bases[3], **LORA, method={"kind": kind})
        assert estimated_bytes(pairs) == pytest.approx(2 * estimated_bytes(plain), rel=0.03)
    full = recipe(bases[3], method={"kind": "dpo"})
    without = recipe(bases[3], method={"kind": "dpo", "precompute_reference": True})
    sizes = sizes_of(full)
    difference = estimate(full, sizes).weights - estimate(without, sizes).weights
    assert difference == 2 * sizes.trained, "a second model in bfloat16"


def test_a_known_model(tmp_path: Path) -> None:
    """8B at 8k tokens: 45 GiB of layers in bfloat16, 91 with float32 adapters and dropout."""

    def layers(**adapter: Any) -> float:
        settings = recipe_from_dict(
            {
                "name": "run",
                "model": {"base": "/m", "quantize": "nf4"},
                "adapter": adapter,
                "data": {"train": [{"path": "/rows.jsonl"}], "max_length": 8192, "packing": False},
                "optim": {"micro_batch_size": 1},
            }
        )
        memory: MemoryEstimate = estimate(settings, LLAMA_8B)
        assert memory.weights / 2**30 == pytest.approx(5.4, abs=0.1)
        return (memory.activations - 4 * 8192 * 14336 * 2) / 2**30  # those of a layer's gradients

    assert layers() == pytest.approx(45, abs=1)
    assert layers(dropout=0.1, dtype="float32") == pytest.approx(91, abs=3)


def test_its_sizes_are_those_of_a_configuration(tmp_path: Path) -> None:
    """The sizes need no weights."""
    write_config(LLAMA_8B_CONFIG, tmp_path)
    assert sizes_of(recipe(tmp_path, adapter={"rank": 16})) == LLAMA_8B
    assert memory.CONTEXT_BYTES == 2**29


GEMMA = {"hidden_size": 32, "intermediate_size": [64, 96], "num_kv_shared_layers": 0}


@pytest.mark.parametrize(
    ("kind", "config", "expected"),
    [
        ("mamba", {"hidden_size": 32}, {"heads": 1, "queries": 32}),
        ("mamba2", {"hidden_size": 32, "num_heads": 4, "head_dim": 16}, {"queries": 64}),
        ("gemma3n_text", GEMMA, {"inner": 96}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_sizes_that_a_kind_lacks_or_has_for_each_layer(
    tmp_path: Path, kind: str, config: dict[str, Any], expected: dict[str, int]
) -> None:
    from transformers import AutoConfig

    AutoConfig.for_model(kind, num_hidden_layers=2, vocab_size=64, **config).save_pretrained(
        tmp_path
    )
    sizes = sizes_of(recipe(tmp_path, adapter={"rank": 4}))
    assert {name: getattr(sizes, name) for name in expected} == expected


@pytest.mark.long
@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "mixtral", "lfm2"])
@pytest.mark.parametrize("packed", [True, False])
def test_a_models_own_pass_is_followed_byte_for_byte(
    tmp_path: Path, kind: str, packed: bool
) -> None:
    """Windows, experts, convolutions; sdpa keeps a mask and keys and values of all heads.

    The third and later layers of a kind are not followed.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"sliding_window": 16, "num_local_experts": 4, "head_dim": 16, "num_hidden_layers": 8}
    config = AutoConfig.for_model(*(kind,), **{**SMALL, **sizes})
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    model = {"dtype": "bfloat16", "attention": "sdpa"}
    settings = recipe(tmp_path, **LORA, model=model, packing=packed)
    positions = torch.arange(TOKENS)[None] % (TOKENS // 3 if packed else TOKENS)
    kept = kept_by(settings, 1, TOKENS, "bfloat16", "bfloat16", attention_of(settings))
    assert kept is not None and len(kept.layers) == 8
    assert kept.whole == bytes_kept(settings, positions)


@pytest.mark.parametrize("kind", ["llama", "phi3"])
def test_documents_keep_what_is_followed(tmp_path: Path, kind: str) -> None:
    """Phi-3 stores its queries head by head; attention stores its result token by token."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(kind, **SMALL)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    settings = recipe(tmp_path, **LORA, model={"dtype": "bfloat16"}, packing=True)
    kept = kept_by(settings, 1, TOKENS, "bfloat16", "bfloat16", "borders")
    documents = Documents.of(np.full(3, TOKENS // 3, np.int32))
    assert kept is not None and kept.whole == bytes_kept(settings, documents=documents)


def test_documents_without_a_kernel_keep_copies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a T4: their result in two orders, and with fewer heads of keys those of all heads."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model("llama", **{**SMALL, "num_key_value_heads": 4})
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    settings = recipe(tmp_path, **LORA, model={"dtype": "bfloat16"}, packing=True)
    assert attention_of(settings, "float16") == attention_of(settings, "float32") == "groups"
    assert attention_of(settings, "float32", "cpu") == attention_of(settings) == "borders"
    kept = kept_by(settings, 1, TOKENS, "bfloat16", "bfloat16", "groups")
    monkeypatch.setattr("finray.training.models.attention._fits_cpu", lambda *_: False)
    documents = Documents.of(np.full(3, TOKENS // 3, np.int32))
    places = 17 * TOKENS  # in groups and back, for all layers
    assert kept is not None and kept.whole + places == bytes_kept(settings, documents=documents)
    fewer = {**SMALL, "num_key_value_heads": 1}
    AutoConfig.for_model("llama", **fewer).save_pretrained(tmp_path / "fewer")
    settings = recipe(tmp_path / "fewer", **LORA, model={"dtype": "bfloat16"}, packing=True)
    every, own = (
        kept_by(settings, 1, TOKENS, "bfloat16", "bfloat16", way) for way in ("groups", "borders")
    )
    assert every is not None and own is not None
    width, layers = SMALL["hidden_size"], SMALL["num_hidden_layers"]
    copies = layers * TOKENS * (width + 2 * (width - width // 4)) * 2
    assert every.whole - own.whole == copies


def test_a_frozen_base_in_float16_is_not_copied(bases: dict[int, Path]) -> None:
    settings = recipe(bases[3], **LORA)
    low, high = (
        kept_by(settings, 1, TOKENS, compute, "float32", "plain")
        for compute in ("float16", "bfloat16")
    )
    assert low is not None
    assert low == high


def test_documents_that_the_rehearsal_masks_cost_a_mask(bases: dict[int, Path]) -> None:
    """Attention by documents is what packed rows get unless another way is settled."""
    ways: dict[Any, str] = {None: "borders", "documents": "borders", "borders": "borders"}
    packed = recipe(bases[1], **LORA, packing="auto")
    for way, expected in {**ways, "positions": "dense", "mask": "dense"}.items():
        assert attention_of(packed.with_isolation(True, way)) == expected
    assert attention_of(packed.with_isolation(False)) == "plain"


def test_a_packed_row_costs_a_mask_with_sdpa_alone(bases: dict[int, Path]) -> None:
    """layers x (L x L x 2 + L x 2 x (queries - keys) x 2) bytes with sdpa, else nothing."""
    whole, by_borders = (recipe(bases[3], **LORA, packing=packing) for packing in (False, True))
    packed = recipe(bases[3], **LORA, packing=True, model={"attention": "sdpa"})
    assert estimated_bytes(by_borders) == estimated_bytes(whole)
    sizes = sizes_of(whole)
    mask, heads = TOKENS * TOKENS, TOKENS * 2 * (sizes.queries - sizes.keys)
    difference = estimated_bytes(packed) - estimated_bytes(whole)
    assert difference == 3 * 2 * (mask + heads)
    llama = replace(sizes, can_be_followed=False)
    by_table = [estimate(each, llama).activations for each in (packed, whole)]
    assert by_table[0] - by_table[1] == difference


@pytest.mark.long
def test_every_phase_has_a_peak(bases: dict[int, Path]) -> None:
    """Cache and logits of answers, of an evaluation and of vLLM, on top of what is trained."""
    rewards = [{"file": "/x.py:f"}]
    online: dict[str, Any] = {"kind": "grpo", "rewards": rewards, "max_completion": 8}
    settings = recipe(
        *(bases[3],), **LORA, method={**online, "rollout_batch_size": 64}, optim={"batch_size": 64}
    )
    sizes = sizes_of(settings)
    memory = estimate(settings, sizes)
    of_one = TOKENS * 3 * 2 * 32 * 2
    assert memory.generation == 64 * (of_one + 64 * (2 + 16))
    assert set(memory.phases) == {"loading", "step", "generation"}
    assert memory.phases["generation"] - memory.phases["step"] == (
        memory.generation - memory.activations
    )
    sampled = recipe(
        *(bases[3],), **LORA, method={**online, "rollout": "vllm"}, optim={"batch_size": 64}
    )
    with_vllm = estimate(sampled, sizes)
    base = 2 * (sizes.linear + sizes.frozen) + 2**29 + 2**30
    assert with_vllm.vllm == base + of_one and with_vllm.generation == 0
    total = with_vllm.peak + 10 * of_one
    share = vllm_share(sampled, sizes, "bfloat16", total)
    assert round(share * total) == base + 11 * of_one, "all that the training leaves"
    assert round(vllm_share(sampled, sizes, "bfloat16", 2**40) * 2**40) == base + 64 * of_one
    three = sampled.model_copy(update={"scale": sampled.scale.model_copy(update={"workers": 3})})
    share = vllm_share(three, sizes, "bfloat16", 2**40)
    assert round(share * 2**40) == base + 3 * 8 * of_one, "prompts are not divided"
    with pytest.raises(InputError, match=r"^method.rollout: vllm needs 1.5 GiB of the GPU, and"):
        vllm_share(sampled, sizes, "bfloat16", with_vllm.peak - 1)


def test_what_auto_comes_to(bases: dict[int, Path]) -> None:
    """As many rows as fit, a power of two; checkpointing only where nothing else helps."""
    open_ = recipe(
        *(bases[3],), **LORA, optim={"micro_batch_size": "auto", "batch_size": 32},
        scale={"workers": 2},
    )  # fmt: skip
    sizes = sizes_of(open_)

    def peak(rows: int, checkpoints: bool) -> int:
        return estimate(open_.with_placement(rows, checkpoints), sizes).peak

    def decided(room: float, settings: Recipe = open_) -> tuple[Any, Any]:
        chosen = decide(settings, sizes, Room(round(room / 0.92) + 2))
        return chosen.optim.micro_batch_size, chosen.model.gradient_checkpointing

    assert [decided(peak(rows, False)) for rows in (1, 4, 7)] == [
        (1, False),
        (4, False),
        (4, False),
    ]
    assert decided(2**40) == (16, False), "what a worker has rows for in a step"
    assert decided(peak(1, True)) == (1, True)
    assert decided(1) == (1, True), "what fits nowhere is refused elsewhere"
    assert open_.leaves_open and open_.optim.microbatch == 4 and not open_.model.checkpoints
    fixed = open_.with_placement(8, False)
    with_rows = fixed.model_copy(
        update={"model": fixed.model.model_copy(update={"gradient_checkpointing": "auto"})}
    )
    assert decided(peak(8, True), with_rows) == (8, True)
    assert decided(peak(8, False), with_rows) == (8, False)
    assert decided(peak(4, True), with_rows) == (8, True), "halved at the first lack of memory"
    assert decided(1, fixed) == (8, False)


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt_oss", "gemma3_text"])
def test_masks_of_documents_are_counted_once(kind: str, tmp_path: Path) -> None:
    """Of windows where no kernel takes them, and of all documents where scores are capped or have
    sinks."""
    from transformers import AutoConfig, AutoModelForCausalLM

    special = {"gpt_oss": {"num_local_experts": 2, "num_experts_per_tok": 1}}.get(kind, {})
    special |= {} if kind == "llama" else {"sliding_window": 16}
    shape = {**SMALL, "head_dim": 16, "num_hidden_layers": 8, **special}
    config = AutoConfig.for_model(kind, **shape)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    settings = recipe(tmp_path, **LORA, packing=True)
    sizes = sizes_of(settings)

    def counted(dtype: DtypeName, device: str) -> int:
        without = replace(sizes, cached=(), weighs=False)
        both = (estimate(settings, one, dtype, device).activations for one in (sizes, without))
        return next(both) - next(both)

    model, documents = load_model(settings), Documents.of(np.array([TOKENS], np.int32))
    attend_by_documents(model)
    ids = torch.zeros(1, TOKENS, dtype=torch.long)
    model(input_ids=ids, attention_mask=no_mask(ids.device), documents=documents, use_cache=False)
    assert counted("float32", "cpu") == sum(mask.nbytes for mask in documents._masks.values())
    assert counted("float32", "cuda") == counted("float32", "cpu")
    of_kernel = counted("float32", "cpu") // 2 if sizes.weighs else 0
    assert counted("bfloat16", "cuda") == of_kernel


@pytest.mark.parametrize("how", [{}, {"top_k": 5}, {"top_p": 0.9}, {"top_p": 0.9, "top_k": 5}])
def test_what_sampling_a_token_takes(how: dict[str, Any]) -> None:
    method = GrpoMethod.model_validate(
        {"rewards": [{"file": "/x.py:f"}], "max_completion": 8, "temperature": 0.7, **how}
    )
    logits = torch.randn(4, 2**15)

    def sample() -> None:
        sampler = Sampler(method, torch.rand(4, 8), 3)
        sampler(torch.zeros(4, 3, dtype=torch.long), logits.clone())

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        sample()
    held = most = 0
    for event in seen.profiler.kineto_results.events():  # type: ignore[union-attr]
        held += event.nbytes() if event.name() == "[memory]" else 0
        most = max(most, held)
    of_one = memory._OF_TOP_P if method.samples_top_p else memory._SAMPLED_LOGIT
    assert of_one == pytest.approx(most / logits.numel(), rel=0.1)


@pytest.mark.long
@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt_oss"])
def test_scores_of_packed_rows_are_those_of_their_documents(kind: str, tmp_path: Path) -> None:
    """A row of four documents keeps what four rows of one document keep; weights do not count."""
    from transformers import AutoConfig, AutoModelForCausalLM

    special = {"gpt_oss": {"num_local_experts": 2, "num_experts_per_tok": 1}}.get(kind, {})
    config = AutoConfig.for_model(kind, **{**SMALL, "head_dim": 16, **special})
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    packed = recipe(tmp_path / "base", packing=True, **LORA)
    assert packed.longest_document == TOKENS
    shorter = packed.with_longest(TOKENS // 4)
    assert shorter.longest_document == TOKENS // 4
    assert packed.with_longest(9999).longest_document == TOKENS
    sizes = sizes_of(packed)
    own, bound = (estimate(each, sizes).activations for each in (shorter, packed))
    if kind == "llama":
        assert own == pytest.approx(bound, abs=8)
    else:
        assert own < bound
    values = {**packed.model_dump(mode="json"), "data": {"train": [{"path": "/x"}]}}
    values["data"] |= {"max_length": TOKENS // 4, "packing": True}
    values["optim"] = {"micro_batch_size": 4}
    alone = estimate(recipe_from_dict(values), sizes).activations
    assert own == pytest.approx(alone, abs=8)


EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 96}
SINKS = {"num_local_experts": 8, "num_experts_per_tok": 2, "sliding_window": 8}
STATES = {"num_heads": 4, "head_dim": 24, "state_size": 8, "n_groups": 1}


@pytest.mark.parametrize(
    ("kind", "config", "whole", "short"),
    [("qwen3_moe", EXPERTS, (24, TOKENS), False), ("gpt_oss", SINKS, (72, 16), True)],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_many_documents_count_as_many(
    tmp_path: Path, kind: str, config: dict[str, Any], whole: tuple[int, int], short: bool
) -> None:
    """Of the first rows the gradients of experts are the most, so what two rows add says nothing.

    Where attention keeps no scores, rows are whole, whatever their documents.
    """
    from transformers import AutoConfig

    AutoConfig.for_model(kind, **{**SMALL, "head_dim": 16, **config}).save_pretrained(tmp_path)
    model = {"dtype": "bfloat16", "gradient_checkpointing": True}
    settings = recipe(
        tmp_path, **LORA, model=model, packing=True, optim={"micro_batch_size": 24}
    ).with_longest(16)
    sizes = sizes_of(settings)
    assert sizes.keeps_scores == short
    kept = kept_by(settings, *whole, "bfloat16", "bfloat16", "borders")
    assert kept is not None and kept.beyond is not None
    layers = [
        own + max(one.again, one.backward)
        for own, one in zip(kept.layers, kept.beyond, strict=True)
    ]
    held = memory._step_activations(settings, replace(sizes, cached=()), "bfloat16", "cpu")
    logits = memory._logits_bytes(settings, sizes, "bfloat16", "cpu", 24 * TOKENS)
    most = max(kept.after + logits, *layers, kept.tail)
    assert held == kept.before + kept.inputs + kept.given + most


def test_short_documents_are_not_padded_for_linear_layers(tmp_path: Path) -> None:
    """State spaces compute a packed row in chunks, whatever documents it has."""
    from transformers import AutoConfig

    config = AutoConfig.for_model("mamba2", **{**SMALL, **STATES})
    config.save_pretrained(tmp_path)
    packed = recipe(tmp_path, model={"gradient_checkpointing": True}, packing=True)
    short = packed.with_longest(4)
    assert attention_of(short) == "borders"
    assert estimated_bytes(short) == estimated_bytes(packed)


@pytest.mark.parametrize(
    ("tokens", "size", "rows"),
    [
        (24 * 48, 48, (24, 24)),
        (3 * 48, 32, (4, 5)),
        (4 * 8192, 64, (128, 256)),
        (4 * 8192, 8192, (1, 2)),
        (16 * 8192, 8192, (1, 2)),
        (2**17, 2**17, (1, 1)),
        (3 * 2**17, 2**17, (1, 2)),
        (3 * 4096, 4096, (3, 3)),
    ],
)
def test_rows_that_are_counted(tokens: int, size: int, rows: tuple[int, int]) -> None:
    """All that there are, up to 16,384 tokens, which longer microbatches go on from."""
    assert memory._counted_rows(tokens, size) == rows


def test_a_part_of_a_row_counts_as_such(bases: dict[int, Path]) -> None:
    """A budget of tokens between those of one pair and of two."""
    method = {"method": {"kind": "dpo"}, "packing": False}

    def budget(size: int) -> dict[str, Any]:
        return {"micro_batch_size": None, "micro_batch_tokens": size}

    between, one, two = (
        estimated_bytes(recipe(bases[3], **LORA, **method, optim=budget(size)))
        for size in (3 * TOKENS, 2 * TOKENS, 4 * TOKENS)
    )
    assert between == pytest.approx((one + two) / 2, rel=0.01)


@pytest.mark.parametrize(
    ("kind", "config", "keeps"),
    [
        ("llama", {}, False),
        ("llama", {"attention_dropout": 0.1}, True),
        ("gemma2", {}, True),
    ],
    ids=str,
)
def test_attention_that_keeps_scores(
    tmp_path: Path, kind: str, config: dict[str, Any], keeps: bool
) -> None:
    from transformers import AutoConfig

    AutoConfig.for_model(kind, **{**SMALL, "head_dim": 16, **config}).save_pretrained(tmp_path)
    assert sizes_of(recipe(tmp_path, **LORA)).keeps_scores == keeps


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("llama", {}),
        ("gemma3_text", {"sliding_window": 16, "num_hidden_layers": 7}),
        ("lfm2", {"num_hidden_layers": 3, "full_attn_idxs": [1]}),
        ("qwen3_next", {"num_experts": 0, "num_hidden_layers": 4}),
        ("deepseek_v3", {**LATENT, "num_key_value_heads": 4, "first_k_dense_replace": 2}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_cache_holds_what_generation_keeps(
    tmp_path: Path, kind: str, config: dict[str, Any]
) -> None:
    """Of windows no more than they are long, of convolutions and recurrences nothing, of latent
    attention what it keeps before it expands that."""
    from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache
    from transformers.cache_utils import DynamicLayer

    made = AutoConfig.for_model(kind, **{**SMALL, "head_dim": 16, **config})
    model = AutoModelForCausalLM.from_config(made, dtype=torch.float32)
    made.save_pretrained(tmp_path)
    cache = DynamicCache(config=made)
    with torch.no_grad():
        for _ in range(2):
            model(torch.ones(1, TOKENS // 2, dtype=torch.long), past_key_values=cache)
    held = [layer for layer in cache.layers if isinstance(layer, DynamicLayer)]
    sizes = sizes_of(recipe(tmp_path, **LORA))
    assert len(sizes.cached) == len(held)
    windows = sum(window is not None for window in sizes.cached)
    one_token = sizes.cached_values * 4
    assert bool(sizes.expanded) == (kind == "deepseek_v3")
    # transformers keeps a token less than a window.
    assert cache_bytes(sizes, "float32", TOKENS) - windows * one_token == sum(
        layer.keys.nbytes + layer.values.nbytes for layer in held
    )


@pytest.mark.parametrize("tied", [True, False])
def test_embedding_and_head_that_are_one_matrix_count_once(tmp_path: Path, tied: bool) -> None:
    """Sharded, they are whole on each GPU, and so are their gradients."""
    from transformers import AutoConfig

    shapes = {**SMALL, "vocab_size": 4096, "tie_word_embeddings": tied}
    AutoConfig.for_model("llama", **shapes).save_pretrained(tmp_path)
    settings = recipe(tmp_path, scale={"workers": 2, "strategy": "fsdp"})
    sizes = sizes_of(settings)
    assert sizes.outside == (1 if tied else 2) * 4096 * SMALL["hidden_size"]
    layer = (sizes.trained - sizes.outside) / SMALL["num_hidden_layers"]
    memory = estimate(settings, sizes)
    gathered = sizes.outside * 2 + 2 * layer * 2 + layer * 6
    assert memory.weights == pytest.approx(2 * sizes.trained + gathered, rel=0.01)


def test_frozen_layers_have_a_cache(bases: dict[int, Path]) -> None:
    """Their gradients end early; generation reads all layers."""
    settings = recipe(bases[3], freeze={"last_layers": 1})
    sizes = sizes_of(settings)
    assert (sizes.layers, trained_layers(settings, sizes), sizes.cached) == (3, 1, (None,) * 3)


def test_a_worker_samples_its_own_prompts(bases: dict[int, Path]) -> None:
    """No more completions than it has in a step, however many fit into a batch."""
    online = {"kind": "grpo", "rewards": [{"file": "/x.py:f"}], "max_completion": 8}
    settings = recipe(
        *(bases[3],), **LORA, method={**online, "generations": 4, "rollout_batch_size": 64},
        optim={"batch_size": 24}, scale={"workers": 4},
    )  # fmt: skip
    sizes = sizes_of(settings)
    of_one = cache_bytes(sizes, "bfloat16", TOKENS) + 64 * (2 + 16)
    assert estimate(settings, sizes).generation == 2 * 4 * of_one


def test_a_microbatch_holds_the_rows_of_a_worker(bases: dict[int, Path]) -> None:
    """Of a step: 8 rows for 4 workers are two each. Held-out rows fill a microbatch."""
    optim = {"batch_size": 8, "micro_batch_size": 8}
    held_out = {"holdout": 0.1, "train": [{"path": "/x"}], "max_length": TOKENS}
    values = recipe(bases[3], **LORA, optim=optim, scale={"workers": 4}).model_dump(mode="json")
    settings = recipe_from_dict({**values, "data": {**held_out, "packing": False}})
    sizes = sizes_of(settings)
    two, whole = (estimate(settings.with_placement(rows, False), sizes) for rows in (2, 8))
    assert two.activations == whole.activations and two.evaluation < whole.evaluation
    pairs = recipe(bases[3], **LORA, optim=optim, method={"kind": "dpo"})
    online = {"kind": "grpo", "rewards": [{"file": "/x.py:f"}], "generations": 4}
    sampled = recipe(bases[3], **LORA, optim=optim, method={**online, "max_completion": 8})
    counted = [[one.rows_of_worker(n) for n in (0, 1, 2, 3, 8)] for one in (pairs, sampled)]
    assert counted == [[8, 8, 4, 3, 1], [8, 8, 4, 4, 4]]


@pytest.mark.long
def test_what_dora_holds_for_a_moment(tmp_path: Path) -> None:
    """The allocator's own record of a forward pass; norms have no gradient, so nothing of them is
    kept."""
    from torch.profiler import ProfilerActivity, profile
    from transformers import LlamaConfig, LlamaForCausalLM

    wide = {**SMALL, "hidden_size": 64, "intermediate_size": 2048}
    LlamaForCausalLM(LlamaConfig(**wide)).save_pretrained(tmp_path)
    model = {"dtype": "bfloat16", "quantize": "nf4"}
    settings = recipe(tmp_path, adapter={"rank": 4, "dora": True}, model=model)
    sizes = sizes_of(settings)
    loaded = load_model(settings).train()
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        logits = forward(settings, loaded)
    held = most = 0
    for event in seen.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    kept = kept_by(settings, 1, TOKENS, "bfloat16", "bfloat16", "plain")
    assert logits.requires_grad and kept is not None and kept.beyond is not None
    beyond = max(one.forward for one in kept.beyond)
    unpacked = 2 * sizes.largest
    assert beyond > 6 * sizes.largest and estimate(settings, sizes).transient == 4 * unpacked
    expected = kept.whole + beyond + unpacked
    assert most == pytest.approx(expected, rel=0.03)


def test_reward_models_are_counted(bases: dict[int, Path], tmp_path: Path) -> None:
    """A classifier by its configuration, a finished run by its record; they stay on the GPU."""
    run = tmp_path / "reward"
    run.mkdir()
    record = {"format": RUN_FORMAT, "parameters": {"total": 12_345, "trainable": 5}}
    (run / "run.json").write_text(json.dumps(record), encoding="utf-8")
    method = {"kind": "grpo", "max_completion": 8, "rewards": [{"file": "/x.py:f"}]}
    alone = recipe(bases[3], **LORA, method=method)
    method["rewards"] = [{"model": str(bases[1])}, {"run": str(run)}]
    scored = recipe(bases[3], **LORA, method=method)
    own, sizes = sizes_of(alone), sizes_of(scored)
    head = AutoModelForSequenceClassification.from_pretrained(bases[1], num_labels=2)
    assert (own.rewards, sizes.rewards) == (0, 12_345 + head.num_parameters())
    added = estimate(scored, sizes).weights - estimate(alone, own).weights
    assert added == 2 * sizes.rewards


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ('{"model_type": "no_such_type"}', "cannot load /.*/judge: .*no_such_type"),
        ('{"model_type": ', "cannot load /.*/judge: .*config.json"),
        ("[]", "cannot load /.*/judge: "),
        (
            '{"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}}',
            "/.*/judge/config.json: auto_map refers to .*; choose a model that transformers has",
        ),
    ],
)
def test_a_reward_model_without_a_sound_configuration(
    config: str, message: str, bases: dict[int, Path], tmp_path: Path
) -> None:
    """One line that names the reward's key; nothing of the base is to blame."""
    (tmp_path / "judge").mkdir()
    (tmp_path / "judge" / "config.json").write_text(config, encoding="utf-8")
    method = {"kind": "grpo", "max_completion": 8, "rewards": [{"model": str(tmp_path / "judge")}]}
    with pytest.raises(InputError, match=rf"^method\.rewards\[0\]\.model: {message}") as caught:
        sizes_of(recipe(bases[1], **LORA, method=method))
    assert "\n" not in str(caught.value)


WORKERS = 8
LLAMA_8B_FULL = replace(LLAMA_8B, linear=0, frozen=0, trained=8_030_261_248, cast=8_030_261_248)


@pytest.mark.parametrize("quantize", ["none", "nf4", "full"])
def test_the_shards_of_a_known_model(quantize: str) -> None:
    """8B over 8 GPUs, by hand: shards, two layers and embedding and head whole."""
    is_full = quantize == "full"
    settings = recipe_from_dict(
        {
            "name": "run",
            "model": {"base": "/m", "quantize": "none" if is_full else quantize},
            **({} if is_full else {"adapter": {"rank": 16}}),
            "data": {"train": [{"path": "/rows.jsonl"}], "max_length": 2048, "packing": False},
            "optim": {"batch_size": 8, "micro_batch_size": 1},
            "scale": {"workers": WORKERS, "strategy": "fsdp"},
        }
    )
    memory = estimate(settings, LLAMA_8B_FULL if is_full else LLAMA_8B)
    outside, layer, adapter = 2 * 128_256 * 4096, 218_112_000, 41_943_040
    bytes_of_layer = {"none": 2, "nf4": 0.5, "full": 2}[quantize] * layer
    base = {"none": 2 * 32 * layer, "nf4": 0.5 * 32 * layer, "full": 4 * 32 * layer}[quantize]
    base += outside * (4 if is_full else 2)
    trained = 0 if is_full else 2 * adapter
    # A layer's gradients, in bfloat16 and in float32; or the sums of all of an adapter's.
    gradients = 6 * layer if is_full else 4 * adapter
    scales = 0.016 * 32 * layer if quantize == "nf4" else 0  # whole on each
    gathered = 2 * outside + 2 * bytes_of_layer + gradients + scales
    assert memory.weights == pytest.approx((base + trained) / WORKERS + gathered, rel=3e-3)
    states = 12 * (32 * layer + outside) if is_full else (2 + 8 + 8) * adapter
    assert memory.training == pytest.approx(states / WORKERS, rel=3e-3)
    # Each GPU gets its shards alone, of a quantised base too.
    largest = 2 * 4096 * 14336 if quantize == "nf4" else 0
    assert memory.phases["loading"] == memory.weights + largest + 2**29


def test_the_root_of_shards_holds_its_gradients_to_the_end() -> None:
    """Embedding and head of 8B, where a short row has few activations; not if they are frozen."""
    text: dict[str, Any] = {
        "name": "run",
        "model": {"base": "/m", "gradient_checkpointing": True},
        "data": {"train": [{"path": "/rows.jsonl"}], "max_length": 64, "packing": False},
        "optim": {"batch_size": 8, "micro_batch_size": 1},
    }
    shards = {"scale": {"workers": WORKERS, "strategy": "fsdp"}}
    outside, layer = 2 * 128_256 * 4096, 218_112_000
    sharded = estimate(recipe_from_dict({**text, **shards}), LLAMA_8B_FULL)
    assert sharded.activations == pytest.approx(6 * (outside - layer), rel=3e-3)
    assert sharded.largest_phase == "step"
    frozen = replace(
        LLAMA_8B_FULL, linear=30 * layer, frozen=outside, trained=2 * layer, cast=2 * layer
    )
    last = estimate(recipe_from_dict({**text, **shards, "freeze": {"last_layers": 2}}), frozen)
    assert last.activations < sharded.activations / 8
    head = replace(LLAMA_8B_FULL.head, trained=128_256 * 4096)
    full, split = replace(LLAMA_8B_FULL, head=head), recipe_from_dict({**text, **shards})
    assert memory._loss_sizes(split, full, "bfloat16", 64).of_copy == 0, "gathered in 16 bits"
    whole = memory._loss_sizes(recipe_from_dict(text), full, "bfloat16", 64)
    assert whole.of_copy == 2 * head.values > 0
    longer = {**text["data"], "max_length": 32_768}
    long = estimate(recipe_from_dict({**text, **shards, "data": longer}), LLAMA_8B_FULL)
    assert long.activations > sharded.activations


def test_float16_is_not_sharded() -> None:
    """Whatever `auto` comes to: its gradients are scaled."""
    text = {
        "name": "run",
        "model": {"base": "/m"},
        "adapter": {"rank": 16},
        "data": {"train": [{"path": "/rows.jsonl"}], "max_length": 2048},
        "optim": {"batch_size": 8, "micro_batch_size": 1},
        "scale": {"workers": 2},
    }
    settings = recipe_from_dict(text)
    strategies = {
        compute: with_strategy(settings, LLAMA_8B, 2**34, compute).scale.strategy  # type: ignore[arg-type]
        for compute in ("float16", "bfloat16")
    }
    assert strategies == {"float16": "auto", "bfloat16": "fsdp"}
    half = {**text, "model": {"base": "/m", "dtype": "float16"}}
    with pytest.raises(ValidationError, match=r"fsdp: model.dtype float16 scales its gradients"):
        recipe_from_dict({**half, "scale": {"workers": 2, "strategy": "fsdp"}})


@pytest.mark.parametrize("method", ["sft", "dpo", "reward"])
def test_larger_parts_never_need_less(bases: dict[int, Path], method: str) -> None:
    """Of rows, tokens and shards; checkpointing never needs more."""

    def peaks(*changes: dict[str, Any]) -> list[int]:
        made = [recipe(bases[3], **{"method": {"kind": method}, **each}) for each in changes]
        return [estimate(each, sizes_of(each)).peak for each in made]

    for base in (LORA, {}):
        rows = peaks(*({**base, "optim": {"micro_batch_size": count}} for count in (1, 2, 4)))
        assert rows == sorted(rows)
        shards = [{"workers": count, "strategy": "fsdp"} for count in (8, 4, 2)]
        sharded = peaks(*({**base, "scale": scale} for scale in shards))
        assert sharded == sorted(sharded)
        ways = peaks(*({**base, "model": {"gradient_checkpointing": on}} for on in (True, False)))
        assert ways == sorted(ways)
