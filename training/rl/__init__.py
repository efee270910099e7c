"""Online reinforcement learning: the model samples answers and learns from their rewards."""
