"""Bytes that are alive while a layer and its gradients are computed, against counts by hand."""

import torch

from finray.training.models.live import Beyond, beyond_kept

SIZE = 256
BYTES = 4 * SIZE


def test_what_a_layer_holds_for_a_while() -> None:
    """Two results are kept. The gradient that comes is alive beside them, and that which it makes;
    a sum that nothing keeps is alive for a moment."""

    def layer(states: torch.Tensor) -> torch.Tensor:
        return (states + 1).exp().exp()

    states = torch.zeros(SIZE, requires_grad=True)
    scalar = 4  # at which the gradients begin
    assert beyond_kept(layer, (states,), {}) == Beyond(0, BYTES, 2 * BYTES + scalar)
    assert states.grad is None, "its graph is left as it is"


def test_gradients_from_several_places_are_added_up_in_place() -> None:
    """The gradient that came and the one that it makes are alive beside what is kept; their sum
    takes the place of one."""

    def layer(states: torch.Tensor) -> torch.Tensor:
        kept = states.exp()
        return kept + kept.exp()

    states = torch.zeros(SIZE, requires_grad=True)
    beyond = beyond_kept(layer, (states,), {})
    assert beyond is not None and beyond.backward == 2 * BYTES + 4


def test_what_reads_values_is_not_followed() -> None:
    def layer(states: torch.Tensor) -> torch.Tensor:
        raise ValueError("data-dependent")

    assert beyond_kept(layer, (torch.zeros(SIZE),), {}) is None
