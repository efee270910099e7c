"""Starts a run's workers: in this process, in local processes or on Ray."""
