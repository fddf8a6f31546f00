"""What the encoders make of pictures and prompts, kept on disk."""
