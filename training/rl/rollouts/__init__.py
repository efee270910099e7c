"""Rollouts: completions that the model samples to prompts.

A rollout is a pure function of the weights, its prompt and its seed, whatever it is batched with;
only the rounding of matrix products may differ with a batch's shape.
"""
