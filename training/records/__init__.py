"""The files that a run writes into its folder, and the report about them."""
