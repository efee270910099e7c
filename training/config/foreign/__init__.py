"""The settings of Axolotl, LLaMA-Factory and TRL by their own names, and what finray calls them."""
