"""Code that all other packages use: errors, storage, secrets, locks, text."""
