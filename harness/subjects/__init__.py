"""The things that run; one file each. See `harness.subject` for what a file provides."""
