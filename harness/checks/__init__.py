"""The checks: one question, and one file, each."""
