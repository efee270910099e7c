"""Tries a recipe on a small random copy of its model, in a child process, before a GPU is held."""
