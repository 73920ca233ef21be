"""The things that run: a file each, or a folder. See `harness.judge.protocols` for what it provides."""
