"""Loads, quantises, shards and saves base models and adapters."""
