"""The table of the benchmarks is that of their stored results."""

import importlib
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def test_the_table_has_the_stored_results(monkeypatch: pytest.MonkeyPatch) -> None:
    """`python benchmarks/run_all.py --table` renews it."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    run_all = importlib.import_module("run_all")
    text = (BENCHMARKS / "README.md").read_text(encoding="utf-8")
    table = text.partition(run_all.BEGIN)[2].partition(run_all.END)[0]
    assert table.strip() == run_all.overview(run_all.collect(quick=False))
