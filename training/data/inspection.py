def inspect_data(recipe): return None
