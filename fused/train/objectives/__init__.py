"""What a training optimises: losses, masks, teachers, text."""
