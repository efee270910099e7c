"""Recipes and models for the online methods."""

from support.online_fixtures import model, online_recipe, tokenizer

__all__ = ["model", "online_recipe", "tokenizer"]
