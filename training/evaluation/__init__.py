"""What a trained model says, and how good it is: prompts in, answers and measures out."""
