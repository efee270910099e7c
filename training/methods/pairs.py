"""What the methods on pairs of answers measure."""

PAIR_MEASURES = ("reward_accuracy", "reward_margin", "chosen_reward", "rejected_reward")
"""Share of the pairs whose chosen answer has the higher reward, by how much, and both rewards."""
