"""Training objectives: losses, token masks, text masks, teachers, the text encoder."""
