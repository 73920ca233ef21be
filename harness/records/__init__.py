"""What a question or a timing gave, as data."""
