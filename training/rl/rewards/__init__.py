"""Rewards of completions: the user's functions, reward models and classifiers."""
