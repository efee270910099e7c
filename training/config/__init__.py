"""The recipe: settings, validated before anything heavy is imported."""
