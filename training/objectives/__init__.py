"""What each method makes of a batch: its loss, and what is measured beside it."""
