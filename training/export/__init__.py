"""A finished run's result, taken elsewhere: copied or merged, with a model card."""
