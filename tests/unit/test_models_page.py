"""docs/models.md shows the last run of the matrix, and every architecture has its place there."""

from families import results
from families.matrix import LEFT_OUT, REGISTRY, architectures


def test_the_page_shows_what_the_matrix_found() -> None:
    written = results.PAGE.read_text(encoding="utf-8")
    assert written == results.page(results.read()), "run python tests/families/results.py"


def test_every_architecture_is_on_the_page() -> None:
    written = results.PAGE.read_text(encoding="utf-8")
    missing = [kind for kind in REGISTRY if kind not in written]
    assert not missing, f"run make test-families, which tries new architectures: {missing}"
    assert LEFT_OUT.keys() <= REGISTRY.keys()
    assert results.read().keys() <= set(architectures())
