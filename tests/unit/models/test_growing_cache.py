"""Tokens that are appended to a cache in place."""

import torch
from transformers import DynamicCache

from finray.training.models.growing_cache import append_in_place


def test_it_holds_what_a_joined_cache_holds() -> None:
    """Also after sequences are selected and tokens cropped; most tokens copy nothing."""
    torch.manual_seed(0)
    ours, theirs = DynamicCache(), DynamicCache()
    places = set()

    def append(sequences: int, tokens: int) -> None:
        keys, values = torch.randn(sequences, 2, tokens, 4), torch.randn(sequences, 2, tokens, 3)
        held, expected = (cache.update(keys, values, 0) for cache in (ours, theirs))
        for one, other in zip(held, expected, strict=True):
            assert torch.equal(one, other)
        places.add(held[0].data_ptr())
        assert held[0].stride(1) <= 307 * 4  # the room of a sequence

    append(2, 7)
    append_in_place(ours, longest=307)
    for cache in (ours, theirs):
        cache.reorder_cache(torch.tensor([0, 0, 1, 1, 1]))
    for _ in range(300):
        append(5, 1)
    assert len(places) == 1 + 3
    for cache in (ours, theirs):
        cache.crop(-4)
        cache.reorder_cache(torch.tensor([4, 1]))
    append(2, 3)
    append(2, 1)
    assert ours.get_seq_length() == theirs.get_seq_length() == 307
