"""Curation: the stages between reading rows and tokenising them."""
