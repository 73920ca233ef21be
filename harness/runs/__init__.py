"""A run's folder, progress, end, and the box it ran on."""
