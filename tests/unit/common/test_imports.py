"""Garbage is not searched for while libraries load."""

import gc

import pytest

from finray.training.common.imports import uncollected


def test_the_collector_is_as_before_afterwards() -> None:
    with pytest.raises(ImportError), uncollected():
        assert not gc.isenabled()
        raise ImportError
    assert gc.isenabled()
    with uncollected():
        with uncollected():
            pass
        assert not gc.isenabled()
    assert gc.isenabled()
