"""Packing: complete, within capacity, and close to the bound."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from finray.training.data.packing import (
    Bins,
    fewest_bins,
    fill_exactly,
    pack,
    unpacked,
    with_less_waste,
)

from .conftest import SHARED


def bins_of(bins: Bins) -> list[NDArray[np.int64]]:
    return [bins.documents[a:b] for a, b in zip(bins.offsets, bins.offsets[1:], strict=False)]


def next_fit_decreasing(lengths: list[int], capacity: int) -> int:
    bins, left = 0, 0
    for length in sorted(lengths, reverse=True):
        if length > left:
            bins, left = bins + 1, capacity
        left -= length
    return bins


def best_fit_decreasing(lengths: list[int], capacity: int) -> int:
    """Number of bins of the textbook algorithm, which places one document after the other."""
    spaces: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [space for space in spaces if space >= length]
        if fitting:
            spaces.remove(min(fitting))
            spaces.append(min(fitting) - length)
        else:
            spaces.append(capacity - length)
    return len(spaces)


cases = st.integers(1, 60).flatmap(
    lambda capacity: st.tuples(
        st.just(capacity), st.lists(st.integers(1, capacity), min_size=1, max_size=120)
    )
)


@given(cases)
def test_packing_properties(case: tuple[int, list[int]]) -> None:
    capacity, lengths = case
    array = np.array(lengths, np.int32)
    bins, exact = pack(array, capacity), fill_exactly(array, capacity)
    for each in (bins, exact):
        assert sorted(each.documents) == list(range(len(lengths)))
        loads = [sum(lengths[document] for document in members) for members in bins_of(each)]
        assert all(0 < load <= capacity for load in loads)
    assert len(with_less_waste(bins, array, capacity)) == min(len(bins), len(exact))
    assert math.ceil(sum(lengths) / capacity) <= fewest_bins(array, capacity)
    assert fewest_bins(array, capacity) <= min(len(bins), len(exact))
    over = sum(2 * length > capacity for length in lengths)
    assert over <= fewest_bins(array, capacity)
    assert len(bins) <= next_fit_decreasing(lengths, capacity)
    assert len(bins) == best_fit_decreasing(lengths, capacity)


def test_packing_is_deterministic_and_nearly_full() -> None:
    generator = np.random.default_rng(0)
    lengths = np.clip(generator.lognormal(5, 1, 50_000), 1, 1024).astype(np.int32)
    bins, again = pack(lengths, 1024), pack(lengths, 1024)
    assert np.array_equal(bins.documents, again.documents)
    assert np.array_equal(bins.offsets, again.offsets)
    assert len(bins) <= 1.001 * math.ceil(lengths.sum() / 1024)


def test_documents_of_a_quarter_are_packed_without_waste() -> None:
    """Best-fit-decreasing opens 3 % more bins than it needs."""
    generator = np.random.default_rng(0)
    lengths = np.clip(generator.normal(256, 50, 8000), 1, 1024).astype(np.int32)
    bound = math.ceil(lengths.sum() / 1024)
    plain = pack(lengths, 1024)
    assert len(plain) > 1.03 * bound
    assert len(with_less_waste(plain, lengths, 1024)) <= 1.001 * bound


def test_the_bound_counts_what_has_no_space_beside_long_documents() -> None:
    assert fewest_bins(np.array([6, 6, 5, 5, 5], np.int32), 10) == 4, "no 5 beside a 6"
    assert fewest_bins(np.zeros(0, np.int32), 10) == 0
    # Of uniform lengths, best fit needs no bin more.
    lengths = np.random.default_rng(0).integers(1, 4097, 9704).astype(np.int32)
    assert len(pack(lengths, 4096)) == fewest_bins(lengths, 4096) > lengths.sum() / 4096 * 1.005


def test_nothing_packs_to_nothing() -> None:
    assert len(pack(np.zeros(0, np.int32), 8)) == 0
    assert len(fill_exactly(np.zeros(0, np.int32), 8)) == 0


def test_unpacked() -> None:
    assert [list(members) for members in bins_of(unpacked(3))] == [[0], [1], [2]]


@pytest.mark.skipif(not SHARED.exists(), reason="the shared example data is not on this machine")
def test_real_data_fills_its_sequences() -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    rows = json.loads((SHARED / "alpaca_en_demo.json").read_text(encoding="utf-8"))
    texts = [" ".join(row.values()) for row in rows]
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel()
    core.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=2000, show_progress=False))
    lengths = np.array([len(encoding.ids) for encoding in core.encode_batch(texts)], np.int32)
    lengths = lengths[lengths <= 1024]
    bins = pack(lengths, 1024)
    assert lengths.sum() / (len(bins) * 1024) >= 0.98
    assert len(bins) == math.ceil(lengths.sum() / 1024)
