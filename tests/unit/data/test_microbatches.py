"""How rows are divided into forward passes."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from support.steps import by_workers, make_setup
from transformers import LlamaConfig, LlamaForCausalLM

from finray.training.config.recipe import Recipe
from finray.training.data.batching import Rows, collate, collate_flat, collate_pairs
from finray.training.data.microbatches import Division
from finray.training.data.stream import Sequence, share
from finray.training.engine.methods import objective_of
from finray.training.engine.worker_rows import equally_many


def rows_of(lengths: list[tuple[int, ...]]) -> Rows:
    return [
        Sequence(
            np.full(sum(own), 3, np.int32),
            np.array(own, np.int32),
            np.zeros(sum(own), np.bool_),
            np.array([number]),
        )
        for number, own in enumerate(lengths)
    ]


def size_of(rows: Rows, division: Division) -> int:
    """Tokens that a pass over the rows computes."""
    assemble = collate_flat if division.is_flat else collate
    batch = collate_pairs(rows, assemble) if division.texts == 2 else assemble(rows)
    return batch.inputs["input_ids"].numel()


TEXTS = st.integers(1, 2).flatmap(
    lambda texts: st.tuples(
        st.just(texts),
        st.lists(st.tuples(*[st.integers(2, 30)] * texts), min_size=1, max_size=24),
    )
)


@settings(deadline=None)
@given(TEXTS, st.booleans(), st.one_of(st.none(), st.integers(60, 200)), st.integers(1, 9))
def test_each_row_is_in_one_part_that_keeps_the_limit(
    made: tuple[int, list[tuple[int, ...]]], is_flat: bool, tokens: int | None, count: int
) -> None:
    texts, lengths = made
    rows = rows_of(lengths)
    division = Division(count, tokens, is_flat, texts)
    parts = division.parts(rows)
    assert sorted(place for part in parts for place in part) == list(range(len(rows)))
    in_order = list(division.in_order(iter(rows)))
    assert [int(row.rows[0]) for part in in_order for row in part] == list(range(len(rows)))
    for own in [*([rows[place] for place in part] for part in parts), *in_order]:
        assert own
        if tokens is None:
            assert len(own) <= count
        else:
            assert size_of(own, division) <= tokens
    if tokens is None:
        assert len(parts) == -(-len(rows) // count)
    kept = Division(count, None, is_flat, texts, keeps_order=True).parts(rows)
    assert [place for part in kept for place in part] == list(range(len(rows)))


@settings(deadline=None)
@given(st.data(), st.integers(1, 8), st.integers(1, 5))
def test_rows_of_like_length_are_padded_together(data: Any, count: int, parts: int) -> None:
    """To as little as in any order, where all parts are full."""
    size = count * parts
    lengths = data.draw(st.lists(st.integers(2, 60), min_size=size, max_size=size))
    rows = rows_of([(length,) for length in lengths])
    sizes = [
        sum(size_of([rows[place] for place in part], division) for part in division.parts(rows))
        for division in (Division(count), Division(count, keeps_order=True))
    ]
    assert sizes[0] == count * sum(sorted(lengths)[count - 1 :: count])
    assert sizes[0] <= sizes[1]


@pytest.mark.parametrize("is_flat", [True, False])
@pytest.mark.parametrize("tokens", [None, 40])
def test_no_rows_are_no_parts(is_flat: bool, tokens: int | None) -> None:
    assert Division(4, tokens, is_flat).parts([]) == []


def test_rows_that_pass_the_border_share_no_part_with_others() -> None:
    """And parts of either side fill up, however rows alternate."""
    rows = rows_of([(5,), (20,)] * 8)
    division = Division(4, None, True, 1, border=8)
    for parts in (
        list(division.in_order(iter(rows))),
        [[rows[place] for place in part] for part in division.parts(rows)],
    ):
        sizes = sorted([len(row.input_ids) for row in part] for part in parts)
        assert sizes == [[5] * 4, [5] * 4, [20] * 4, [20] * 4]
        assert sorted(int(row.rows[0]) for part in parts for row in part) == list(range(16))
    assert [len(side) for side in division.sides(rows[:3])] == [2, 1]


def test_a_row_above_the_budget_has_a_part_of_its_own() -> None:
    rows = rows_of([(50,), (9,), (9,)])
    for is_flat in (False, True):
        division = Division(4, 40, is_flat).divided(2)
        assert sorted(map(sorted, division.parts(rows))) == [[0], [1, 2]]
        assert [len(part) for part in division.in_order(iter(rows))] == [1, 2]


def recipe(base: Path, **optim: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "x",
            "model": {"base": str(base)},
            "method": "dpo",
            "data": {"train": [{"path": "/x"}], "max_length": 32},
            "optim": {"batch_size": 11, **optim},
            "scale": {"workers": 3},
        }
    )


@pytest.mark.parametrize("optim", [{"micro_batch_tokens": 64}, {"micro_batch_size": 2}], ids=str)
def test_all_workers_have_equally_many_parts(tmp_path: Path, optim: dict[str, Any]) -> None:
    """And each row of the step is in one of them."""
    settings = recipe(tmp_path, **optim)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=8,
            hidden_size=4,
            intermediate_size=4,
            num_hidden_layers=1,
            num_attention_heads=1,
        )
    )
    random = np.random.default_rng(0)
    steps = [
        rows_of([tuple(random.integers(2, 33, 2).tolist()) for _ in range(11)]) for _ in range(6)
    ]

    def work(rank: int, world_size: int) -> dict[str, Any]:
        objective = objective_of(make_setup(settings, model, tmp_path, rank, world_size))
        first = sum(share(11, other, world_size) for other in range(rank))
        numbers, seen = [], []
        for step, rows in enumerate(steps):
            own = rows[first : first + share(11, rank, world_size)]
            parts = objective.parts(own)
            numbers.append(len(parts))
            seen += [[step, int(own[place].rows[0])] for part in parts for place in part]
        return {"numbers": torch.tensor(numbers), "seen": torch.tensor(seen)}

    saved = by_workers(3, tmp_path, work)
    assert all(torch.equal(one["numbers"], saved[0]["numbers"]) for one in saved)
    seen = torch.cat([one["seen"] for one in saved]).tolist()
    assert sorted(seen) == [[step, row] for step in range(6) for row in range(11)]
    if "micro_batch_tokens" in optim:
        assert len(set(saved[0]["numbers"].tolist())) > 1


@pytest.mark.parametrize("tokens", [64, None])
def test_sharded_workers_evaluate_equally_often(tmp_path: Path, tokens: int | None) -> None:
    """Under a budget, too; who has no more held-out rows computes padding."""
    division = Division(2, tokens, is_flat=True)
    lengths = [[(60,)] * 5, [(8,)] * 6 + [(30,)], []]

    def work(rank: int, world_size: int) -> dict[str, Any]:
        own = rows_of(lengths[rank])
        evaluated = list(equally_many(division.in_order(iter(own)), dist.group.WORLD))
        sizes = [sum(len(row.input_ids) for row in rows) for rows in evaluated]
        seen = [row for rows in evaluated for number in rows for row in number.rows]
        return {"sizes": torch.tensor(sizes), "seen": torch.tensor(seen)}

    saved = by_workers(3, tmp_path, work)
    assert [one["seen"].tolist() for one in saved] == [[0, 1, 2, 3, 4], [*range(7)], []]
    by_tokens = [[60] * 5, [48, 30, 2, 2, 2], [2] * 5]
    by_rows = [[120, 120, 60, 2], [16, 16, 16, 30], [2] * 4]
    expected = by_rows if tokens is None else by_tokens
    assert [one["sizes"].tolist() for one in saved] == expected
