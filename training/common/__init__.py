"""What every room uses: errors, storage, secrets, locks, text."""
