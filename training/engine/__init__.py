"""One worker's training, the same in every place."""
