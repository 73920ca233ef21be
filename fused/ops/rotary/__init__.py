"""Rotary positions of queries and keys, inference only."""
