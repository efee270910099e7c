"""The first recipe: from data, or from the configuration of another project."""
