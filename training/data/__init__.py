"""Turns source files into a prepared data set, and that into a stream of rows for each worker."""
