"""Cases in which every pair of features meets."""

from collections.abc import Callable, Iterator
from itertools import combinations, product

Case = dict[str, str]
"""A value for each factor, by the factor's name."""
Pair = tuple[tuple[str, str], tuple[str, str]]


def pairs_of(case: Case) -> set[Pair]:
    """The pairs of values in a case."""
    return set(combinations(case.items(), 2))


def all_cases(factors: dict[str, list[str]]) -> Iterator[Case]:
    """Every combination of values."""
    for values in product(*factors.values()):
        yield dict(zip(factors, values, strict=True))


def pairwise_cases(
    factors: dict[str, list[str]], is_valid: Callable[[Case], bool]
) -> tuple[list[Case], set[Pair]]:
    """Valid cases that contain every pair which a valid case can contain.

    Args:
        factors: the values of each factor.
        is_valid: True for a combination that is not refused.

    Returns:
        The cases, and the pairs that every combination with them refuses.
    """
    every = [(case, pairs_of(case)) for case in all_cases(factors)]
    numbers: dict[Pair, int] = {}
    for _, pairs in every:
        for pair in pairs:
            numbers.setdefault(pair, len(numbers))
    # A set of pairs is a number with a bit for each.
    valid = [
        (case, sum(1 << numbers[pair] for pair in pairs)) for case, pairs in every if is_valid(case)
    ]
    left = 0
    for _, bits in valid:
        left |= bits
    refused = {pair for pair, number in numbers.items() if not left >> number & 1}
    chosen = []
    while left:
        case, bits = max(valid, key=lambda item: (item[1] & left).bit_count())
        chosen.append(case)
        left &= ~bits
    return chosen, refused
