"""Base models and adapters: loaded, quantised, sharded, saved."""
