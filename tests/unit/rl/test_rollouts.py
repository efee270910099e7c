"""Sampling: the correct distribution, and completions that do not depend on the batches."""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.online_runs import objective_of, prompts, rows_of, setup_of

from finray.training.common.errors import RunError
from finray.training.config.methods import GrpoMethod
from finray.training.config.recipe import Recipe
from finray.training.rl.rollouts.local import LocalRollouts
from finray.training.rl.rollouts.rollout import Request
from finray.training.rl.rollouts.sampling import pick, weights

VOCABULARY = 40
DRAWS = 200_000
# Of a chi-square distribution with up to 39 degrees of freedom, exceeded once in 10,000 times.
CRITICAL = 80.0


def settings(**changes: Any) -> GrpoMethod:
    return GrpoMethod.model_validate({"rewards": [{"file": "/x.py:f"}], **changes})


def expected_shares(logits: torch.Tensor, method: GrpoMethod) -> torch.Tensor:
    """The distribution by the definitions of top-k and top-p, token by token."""
    shares = (logits.double() / method.temperature).softmax(0)
    order = sorted(range(len(shares)), key=lambda token: -float(shares[token]))
    kept = order[: method.top_k] if method.top_k else order
    total, chosen = sum(float(shares[token]) for token in kept), []
    reached = 0.0
    for token in kept:
        if reached >= method.top_p * total:
            break
        chosen.append(token)
        reached += float(shares[token])
    expected = torch.zeros_like(shares)
    expected[chosen] = shares[chosen] / reached
    return expected


@pytest.mark.long
@pytest.mark.parametrize(
    "changes",
    [{}, {"temperature": 0.5}, {"top_k": 7}, {"top_p": 0.8}, {"top_k": 20, "top_p": 0.6}],
    ids=str,
)
def test_tokens_follow_the_distribution(changes: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(VOCABULARY, generator=generator) * 2
    method = settings(**changes)
    relative = weights(logits[None], method)
    distribution = expected_shares(logits, method)
    torch.testing.assert_close(
        (relative / relative.sum())[0].double(), distribution, rtol=1e-5, atol=1e-8
    )
    uniform = torch.rand(DRAWS, generator=generator, dtype=torch.float64)
    drawn = pick(relative.expand(DRAWS, -1), uniform)
    counts = torch.bincount(drawn, minlength=VOCABULARY).double()
    assert counts[distribution == 0].sum() == 0
    expected = distribution[distribution > 0] * DRAWS
    statistic = float(((counts[distribution > 0] - expected) ** 2 / expected).sum())
    assert statistic < CRITICAL


def test_the_ends_of_the_unit_interval() -> None:
    shares = torch.tensor([[0.0, 0.25, 0.0, 0.75, 0.0]], dtype=torch.float64).expand(4, -1)
    ends = torch.tensor([0.0, 0.2499, 0.25, 1.0 - 2**-53], dtype=torch.float64)
    assert pick(shares, ends).tolist() == [1, 1, 3, 3]


@pytest.mark.parametrize("size", [40, 128, 1000])
def test_any_vocabulary_is_inverted_exactly(size: int) -> None:
    """As by a cumulative sum over all of it; tokens without weight are never selected."""
    generator = torch.Generator().manual_seed(2)
    relative = (4 * torch.randn(500, size, generator=generator)).exp()
    relative[torch.rand(500, size, generator=generator) < 0.7] = 0.0
    relative[:, size // 2] = 0.1
    uniform = torch.rand(500, generator=generator, dtype=torch.float64)
    uniform[:2], uniform[2:4] = 0.0, 1.0 - 2**-53
    cumulative = relative.double().cumsum(-1)
    expected = [
        int(torch.searchsorted(row, min(u, 1 - 1e-12) * row[-1], right=True))
        for row, u in zip(cumulative, uniform.tolist(), strict=True)
    ]
    drawn = pick(relative, uniform)
    assert drawn.tolist() == expected
    assert (relative.gather(1, drawn[:, None]) > 0).all()


def test_top_p_is_compared_as_exactly_as_it_is_added_up() -> None:
    """float32 has no number between a half and this."""
    halves = torch.zeros(1, 2)
    assert weights(halves, settings(top_p=0.5)).tolist() == [[1.0, 0.0]]
    assert weights(halves, settings(top_p=0.5 + 1e-9)).tolist() == [[1.0, 1.0]]


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_logits_that_are_not_finite_are_named(value: float) -> None:
    logits = torch.zeros(3, 1000)
    logits[1, 500] = value
    with pytest.raises(RunError, match=r"logits are not finite.*model\.dtype"):
        pick(weights(logits, settings()), torch.full((3,), 0.5))


def test_a_model_that_asks_for_a_kind_of_cache_samples(model: Any, tokenizer: Any) -> None:
    row = rows_of(prompts(1), tokenizer)[0]
    requests = [Request(row.input_ids.tolist(), (0, n)) for n in (1, 2)]
    method = settings(max_completion=4)
    expected = LocalRollouts(model, tokenizer, method).sample(requests)
    asking = copy.deepcopy(model)
    asking.generation_config.cache_implementation = "dynamic"
    assert LocalRollouts(asking, tokenizer, method).sample(requests) == expected


def test_a_completion_depends_on_its_seed_alone(model: Any, tokenizer: Any) -> None:
    rows = rows_of(prompts(6), tokenizer)
    requests = [
        Request(row.input_ids.tolist(), (0, 3, place, n))
        for place, row in enumerate(rows)
        for n in range(3)
    ]
    method = settings(max_completion=10)
    sizes: list[int] = []
    embedding = model.get_input_embeddings()
    hook = embedding.register_forward_hook(lambda _, args, __: sizes.append(args[0].numel()))
    together = LocalRollouts(model, tokenizer, method).sample(requests)
    hook.remove()
    # But for its last token, a prompt is computed once for its three completions.
    longest = max(len(row.input_ids) for row in rows)
    assert sizes[:2] == [6 * (longest - 1), 18] and max(sizes[1:]) == 18
    alone = LocalRollouts(model, tokenizer, method.model_copy(update={"rollout_batch_size": 1}))
    assert alone.sample(requests[::-1])[::-1] == together
    assert len({tuple(rollout.ids) for rollout in together}) > 12
    later = [replace(request, seed=(0, 4, *request.seed[2:])) for request in requests]
    assert LocalRollouts(model, tokenizer, method).sample(later) != together
    stops = set(model.generation_config.eos_token_id)
    for rollout in together:
        assert not stops & set(rollout.ids[:-1])
        assert rollout.ended == (rollout.ids[-1] in stops)
        assert rollout.ended or len(rollout.ids) == 10


def test_fewer_completions_are_sampled_at_a_time_where_memory_is_short(
    model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are the same, and the size that fits is kept for the next step."""
    row = rows_of(prompts(1), tokenizer)[0]
    requests = [Request(row.input_ids.tolist(), (0, n)) for n in range(6)]
    method = settings(max_completion=4, rollout_batch_size=6)
    expected = LocalRollouts(model, tokenizer, method).sample(requests)
    sizes: list[int] = []
    generate = LocalRollouts._batch

    def batch(self: LocalRollouts, part: Any) -> Any:
        sizes.append(len(part))
        if len(part) > 2:
            raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED")
        return generate(self, part)

    monkeypatch.setattr(LocalRollouts, "_batch", batch)
    rollouts = LocalRollouts(model, tokenizer, method)
    assert rollouts.sample(requests) == expected
    assert sizes == [6, 3, 2, 2, 2] and rollouts.sample(requests[:2]) == expected[:2]
    assert rollouts.sample(requests) == expected and sizes[6:] == [2, 2, 2]


def test_the_log_probabilities_are_those_of_sampling(model: Any, tokenizer: Any) -> None:
    """A token's frequency in many rollouts equals the objective's probability."""
    row = rows_of(prompts(1), tokenizer)[0]
    requests = [Request(row.input_ids.tolist(), (1, n)) for n in range(4000)]
    method = settings(max_completion=1, temperature=0.7, rollout_batch_size=4000)
    rollouts = LocalRollouts(model, tokenizer, method).sample(requests)
    drawn = torch.tensor([rollout.ids[0] for rollout in rollouts])
    with torch.no_grad():
        logits = model(torch.tensor([row.input_ids.tolist()])).logits[0, -1]
    shares = (logits / 0.7).softmax(0)
    likeliest = int(shares.argmax())
    frequency = float((drawn == likeliest).double().mean())
    deviation = float((shares[likeliest] * (1 - shares[likeliest]) / 4000).sqrt())
    assert abs(frequency - float(shares[likeliest])) < 4 * deviation


@pytest.mark.parametrize("workers", [2, 3])
def test_workers_sample_what_one_would(
    online_recipe: Callable[..., Recipe], model: Any, tokenizer: Any, workers: int
) -> None:
    recipe = online_recipe({"kind": "grpo"}, batch_size=16)
    rows = rows_of(prompts(4), tokenizer)

    def sampled(rank: int, world: int) -> list[list[int]]:
        objective = objective_of(setup_of(recipe, model, tokenizer, rank, world))
        before = sum(4 // world + (other < 4 % world) for other in range(rank))
        own = rows[before : before + 4 // world + (rank < 4 % world)]
        places = [objective._first_place + place for place in range(len(own))]
        assert places == list(range(before, before + len(own)))
        requests = objective.requests(7, own)
        return [rollout.ids for rollout in objective._sampler_and_scorer()[0].sample(requests)]

    parts = [ids for rank in range(workers) for ids in sampled(rank, workers)]
    assert parts == sampled(0, 1)
