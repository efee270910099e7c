"""ONE run: recipe, data, model, method, loop, checkpoints, result."""
