"""Attention by documents, against one document at a time with the attention of the family."""

from copy import deepcopy
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy, scaled_dot_product_attention
from transformers import AutoConfig, AutoModelForCausalLM

from finray.training.data.batching import (
    IGNORED,
    PADDING_ROW,
    Batch,
    Rows,
    apart,
    collate,
    collate_flat,
)
from finray.training.data.documents import Documents
from finray.training.data.stream import Sequence
from finray.training.models import attention
from finray.training.models.isolation import kept_outputs
from finray.training.models.loading import forward_arguments

VOCABULARY, WINDOW = 40, 5
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "attention_dropout": 0.0,
    "pad_token_id": 0,
}
HYBRID = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": WINDOW}
EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2}
LATENT = {
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "head_dim": 4,
    "v_head_dim": 8,
    "first_k_dense_replace": 2,
    "num_key_value_heads": 4,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {**HYBRID, "use_sliding_window": True},
    "gemma2": {**HYBRID, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 8},
    "gemma3_text": {**HYBRID, "query_pre_attn_scalar": 8},
    "gpt_oss": {**HYBRID, **EXPERTS, "experts_implementation": "eager"},
    "mistral": {"sliding_window": WINDOW},
    "phi3": {"sliding_window": None, "partial_rotary_factor": 1.0},
    "cohere2": {**HYBRID},
    "deepseek_v3": LATENT,
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0, "num_attention_heads": 4},
}
ROUNDING = {"gemma2": 1e-6, "gemma3_text": 1e-6, "cohere2": 1e-7}
"""Families whose norms and softmax compute in float32 whatever the type of their weights."""
LENGTHS: dict[str, list[list[int]]] = {
    "one token": [[1, 7, 1], [2, 1]],
    "longer than a window": [[4 * WINDOW + 3], [WINDOW, WINDOW + 1, WINDOW - 1]],
    "many short ones": [[3] * 5 + [2, 4] * 2, [1, 5, 6, 7, 8, 11]],
    "several groups": [[61, 60, 33, 30, 12, 1]],
}


def family(kind: str, dtype: torch.dtype) -> Any:
    """A tiny model with random values in every parameter, sinks and biases too."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**SIZES, **FAMILIES[kind]})
    model: Any = AutoModelForCausalLM.from_config(config).to(dtype).train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def rows_of(lengths: list[list[int]]) -> Rows:
    random = np.random.default_rng(0)
    rows = []
    for number, own in enumerate(lengths):
        trained = random.random(sum(own)) < 0.7
        trained[np.cumsum([0, *own[:-1]])] = False
        ids = random.integers(4, VOCABULARY, sum(own)).astype(np.int32)
        rows.append(Sequence(ids, np.array(own, np.int32), trained, np.array([number])))
    return rows


Result = tuple[float, dict[str, torch.Tensor]]


def backward(model: Any, loss: torch.Tensor) -> Result:
    torch.autograd.backward(loss)
    gradients = {
        name: torch.zeros_like(weight) if weight.grad is None else weight.grad.clone()
        for name, weight in model.named_parameters()
    }
    model.zero_grad()
    return loss.item(), gradients


def trained_targets(batch: Batch) -> torch.Tensor:
    return batch.targets.flatten()[batch.trained]


def together(model: Any, rows: Rows, shares: bool = False) -> Result:
    batch = collate_flat(rows, shares)
    logits, _ = kept_outputs(model, batch, forward_arguments(model), "documents")
    return backward(model, cross_entropy(logits[0], trained_targets(batch), reduction="sum"))


def alone(model: Any, rows: Rows) -> Result:
    total = torch.zeros((), dtype=model.dtype)
    for row in rows:
        first = 0
        for length in row.lengths:
            part = slice(first, first + int(length))
            first += int(length)
            ids = torch.from_numpy(row.input_ids[part].astype(np.int64))
            targets = ids.where(torch.from_numpy(row.trainable[part]), torch.tensor(IGNORED))[1:]
            if (targets != IGNORED).any():
                logits = model(ids[None], use_cache=False).logits[0, :-1]
                total = total + cross_entropy(logits, targets, reduction="sum")
    return backward(model, total)


def assert_equal(one: Result, other: Result, tolerance: float) -> None:
    assert one[0] == pytest.approx(other[0], rel=tolerance)
    largest = max(float(gradient.abs().max()) for gradient in other[1].values())
    for name, gradient in one[1].items():
        difference = float((gradient - other[1][name]).abs().max())
        assert difference <= tolerance * largest, (name, difference / largest)


@pytest.mark.parametrize("kind", FAMILIES)
def test_every_document_is_computed_as_if_alone(kind: str) -> None:
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        model = family(kind, dtype)
        ours = deepcopy(model)
        attention.attend_by_documents(ours)
        for lengths in LENGTHS.values():
            rows = rows_of(lengths)
            expected = alone(model, rows)
            assert_equal(together(ours, rows), expected, max(tolerance, ROUNDING.get(kind, 0)))


def rows_with_prefixes() -> Rows:
    """Documents with a prefix, with parts of it, equal ones, and one that begins another."""
    rows = rows_of([[WINDOW + size] for size in (20, 12, 19, 1, 15, 20, 30)])
    prefix = rows[0].input_ids.copy()
    for row, common in zip(rows, (25, 17, 8, 5, 0, 25, 25), strict=True):
        row.input_ids[:common] = prefix[:common]
    return rows


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma2", "gpt_oss", "deepseek_v3"])
def test_what_documents_begin_with_is_computed_once(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In every layer but attention; losses and gradients are those of each document alone."""
    model = family(kind, torch.float64)
    ours = deepcopy(model)
    attention.attend_by_documents(ours)
    rows = rows_with_prefixes()
    expected = alone(model, rows)
    # Norms compute in float32, and here add up the gradients of all documents.
    assert_equal(together(ours, rows, shares=True), expected, 1e-6)
    if kind in ("llama", "qwen3"):
        monkeypatch.setattr(attention, "_fits_kernel", lambda *_: True)
        monkeypatch.setattr(attention, "varlen_attn", varlen)
        assert_equal(together(ours, rows, shares=True), expected, 1e-6)


def test_rows_hold_each_beginning_once() -> None:
    rows = rows_with_prefixes()
    batch, plain = collate_flat(rows, shares=True), collate_flat(rows)
    texts = [tuple(row.input_ids.tolist()) for row in rows]
    beginnings = {text[: end + 1] for text in texts for end in range(len(text))}
    repeated = len(texts) - len(set(texts))  # each keeps a token of its own
    assert batch.documents is not None and batch.documents.shared is not None
    assert batch.inputs["input_ids"].shape == (1, len(beginnings) + repeated)
    index = batch.documents.shared.index
    for name in ("input_ids", "position_ids"):
        assert torch.equal(batch.inputs[name][0, index], plain.inputs[name][0])
    assert torch.equal(batch.inputs["logits_to_keep"], index[plain.inputs["logits_to_keep"]])
    assert torch.equal(batch.targets, plain.targets) and batch.tokens == plain.tokens
    back = apart(batch)
    for name in ("input_ids", "logits_to_keep"):
        assert torch.equal(back.inputs[name], collate(rows).inputs[name])
    assert torch.equal(back.targets, collate(rows).targets)
    few = collate_flat(rows[3:5], shares=True)  # one token of 26
    assert few.documents is not None and few.documents.shared is None


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt_oss"])
def test_generation_and_checkpointing_compute_the_same(kind: str) -> None:
    model = family(kind, torch.float32).eval()
    ours = deepcopy(model)
    attention.attend_by_documents(ours)
    prompts = torch.randint(4, VOCABULARY, (3, 12))
    settings = {"max_new_tokens": 8, "do_sample": False, "use_cache": True}
    mask = (torch.arange(12) >= torch.tensor([[0], [4], [11]])).long()
    for which in (slice(0, 1), slice(0, 3)):
        generated = [
            m.generate(prompts[which], attention_mask=mask[which], **settings)
            for m in (model, ours)
        ]
        assert torch.equal(*generated)
    rows = rows_of([[30, 4, 1], [9]])
    plain = together(ours.train(), rows)
    ours.gradient_checkpointing_enable({"use_reentrant": False})
    checkpointed = together(ours, rows)
    assert plain[0] == checkpointed[0]
    assert all(torch.equal(plain[1][name], checkpointed[1][name]) for name in plain[1])


def test_no_mask_is_made_and_nothing_grows_with_the_square_of_the_row() -> None:
    """The largest tensor that a layer keeps for the backward pass is as long as the row."""
    model = family("llama", torch.float32)
    attention.attend_by_documents(model)
    largest = []
    for count in (20, 80):
        kept: list[int] = []

        def note(tensor: torch.Tensor, kept: list[int] = kept) -> torch.Tensor:
            kept.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            batch = collate_flat(rows_of([[10] * count]))
            kept_outputs(model, batch, forward_arguments(model), "documents")
        largest.append(max(kept))
    assert largest[1] == pytest.approx(4 * largest[0], rel=0.1)


def test_attention_that_is_not_replaced_fails_with_the_empty_mask() -> None:
    model = family("llama", torch.float32)
    with pytest.raises(RuntimeError):
        together(model, rows_of([[4, 5]]))


def test_what_is_not_known_is_refused() -> None:
    query = torch.zeros(1, 2, 4, 8)
    documents = Documents.of(np.array([3, 1], np.int32))
    layer = torch.nn.Identity()
    for extra in ({"position_bias": query}, {"is_causal": False}):
        with pytest.raises(ValueError, match="attention by documents"):
            attention.attention(layer, query, query, query, None, documents=documents, **extra)
    with pytest.raises(ValueError, match="attention by documents"):
        attention.attention(layer, query[:, :, 1:], query, query, None, documents=documents)


def varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *borders: Any,
    scale: float | None,
    window_size: tuple[int, int],
    enable_gqa: bool,
) -> torch.Tensor:
    """What the kernel computes, one document at a time."""
    ends, ends_of_keys, longest, longest_of_keys = borders
    assert torch.equal(ends, ends_of_keys) and ends.dtype == torch.int32
    assert longest == longest_of_keys == int(ends.diff().max())
    left, right = window_size
    assert right == 0
    sizes = ends.diff().tolist()
    parts = []
    for q, k, v in zip(*(tensor.split(sizes) for tensor in (query, key, value)), strict=True):
        seen = torch.ones(len(q), len(q), dtype=torch.bool).tril()
        if left >= 0:
            seen = seen.triu(-left)
        own = (tensor.transpose(0, 1)[None] for tensor in (q, k, v))
        of_document = scaled_dot_product_attention(
            *own, attn_mask=seen, scale=scale, enable_gqa=enable_gqa
        )
        parts.append(of_document[0].transpose(0, 1))
    return torch.cat(parts)


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen3", "deepseek_v3"])
def test_other_devices_compute_the_same(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel of CUDA, as far as its arguments go, and groups of documents."""
    model = family(kind, torch.float32)
    attention.attend_by_documents(model)
    for lengths in LENGTHS.values():
        rows = rows_of(lengths)
        by_parts = together(model, rows)
        with monkeypatch.context() as patch:
            patch.setattr(attention, "_fits_cpu", lambda *_: False)
            assert_equal(together(model, rows), by_parts, 1e-5)
            patch.setattr(attention, "_fits_kernel", lambda *_: True)
            patch.setattr(attention, "varlen_attn", varlen)
            assert_equal(together(model, rows), by_parts, 1e-5)


def test_the_kernel_gets_no_values_wider_than_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which it would cut off: it takes equal widths."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))

    def on_a_gpu(width: int) -> Any:
        return Mock(is_cuda=True, dtype=torch.bfloat16, shape=(9, 2, width))

    fits = [attention._fits_kernel(on_a_gpu(32), on_a_gpu(32), on_a_gpu(w)) for w in (16, 32, 40)]
    assert fits == [True, True, False]


def test_flat_batches_hold_the_rows_without_padding() -> None:
    rows = rows_of([[5, 1, 3], [4]])
    batch = collate_flat([*rows, PADDING_ROW])
    assert batch.documents is not None and batch.documents.lengths == (5, 1, 3, 4, 2)
    ids = np.concatenate([row.input_ids for row in (*rows, PADDING_ROW)])
    assert batch.inputs["input_ids"].tolist() == [ids.tolist()]
    expected = [0, 1, 2, 3, 4, 0, 0, 1, 2, 0, 1, 2, 3, 0, 1]
    assert batch.inputs["position_ids"].tolist() == [expected]
    trained = np.flatnonzero(np.concatenate([row.trainable for row in rows]))
    assert batch.inputs["logits_to_keep"].tolist() == (trained - 1).tolist()
    assert trained_targets(batch).tolist() == ids[trained].tolist()
    assert batch.loss_units == len(trained) and batch.tokens == 13
    nothing = collate_flat([PADDING_ROW])
    assert nothing.loss_units == 0 and nothing.targets.tolist() == [[IGNORED]]


@pytest.mark.parametrize("seed", range(4))
def test_groups_hold_every_token_once(seed: int) -> None:
    random = np.random.default_rng(seed)
    lengths = random.integers(1, [3, 20, 300, 40][seed], 50).astype(np.int32)
    groups = Documents.of(lengths).groups
    assert sum(count for count, _ in groups.shapes) == len(lengths)
    assert sum(count * size for count, size in groups.shapes) == len(groups.index)
    assert groups.index[groups.inverse].tolist() == list(range(lengths.sum()))
    assert int((~groups.padding).sum()) == lengths.sum()
    assert len(groups.index) < 1.25 * lengths.sum() + 8 * len(lengths)


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("way", ["cap", "sinks"])
def test_scores_of_a_long_document_are_computed_in_blocks(
    way: str, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The result and the gradients are those of all scores at once; what no token of a block sees
    is not computed."""
    torch.manual_seed(0)
    documents, heads = Documents.of(np.array([21, 3], np.int32)), 4
    sinks = torch.randn(heads, dtype=torch.float64, requires_grad=True)
    layer = attention._Layer(0.0, None, window, *((2.0, None) if way == "cap" else (None, sinks)))
    tensors = [
        torch.randn(24, count, 8, dtype=torch.float64, requires_grad=True) for count in (4, 2, 2)
    ]

    def computed(block: int) -> tuple[list[torch.Tensor], int]:
        monkeypatch.setattr(attention, "_BLOCK", block)
        scores = []

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            scores.append(tensor.numel() if tensor.dim() == 4 else 0)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            result = attention._by_documents(*tensors, documents, layer)
        leaves = [*tensors, *([sinks] if way == "sinks" else [])]
        return [result, *torch.autograd.grad(result.sin().sum(), leaves)], max(scores)

    (whole, most), (blocks, of_block) = computed(99), computed(4)
    torch.testing.assert_close(blocks, whole, atol=1e-12, rtol=1e-12)
    assert most >= heads * 21 * 21
    assert of_block <= heads * max(4 * (21 + 1), 21 * 8)
