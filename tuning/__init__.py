"""Sweeps: many runs of one recipe with different settings."""
