"""MANY runs: sweeps over recipes."""
