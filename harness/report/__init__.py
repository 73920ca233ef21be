"""A run's records as a page to read."""
