"""The loss and the measures that each method computes for a batch."""
