"""Exports a finished run's result: copies or merges it, and writes a model card."""
