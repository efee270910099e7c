"""What a run writes into its folder, and the page that shows it."""
