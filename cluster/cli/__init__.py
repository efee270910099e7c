"""The finray command."""
