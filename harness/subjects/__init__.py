"""The things that run; one file each. See `harness.judge.registry` for what a file provides."""
