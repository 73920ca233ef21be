"""The results of questions and timings, as data."""
