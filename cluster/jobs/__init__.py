"""Runs and sweeps as Ray jobs."""
