"""What `import finray` offers, and what the command is a skin over."""
