"""Online methods: the model samples answers and learns from their rewards."""
