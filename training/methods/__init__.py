"""The methods of fine-tuning, one module each."""
