"""Rollouts: completions of prompts that the model samples.

A rollout is a pure function of the weights, its prompt and its seed, independent of the rest of its
batch; only the rounding of matrix products may depend on the batch's shape.
"""
