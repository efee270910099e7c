"""What the command prints: progress, summaries, tables."""
