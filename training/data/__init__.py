"""From source files to a prepared data set, and from there to each worker's stream."""
