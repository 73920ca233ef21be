"""Bugs planted in `fused` to prove that the checks catch them; one file each, with `plant()` and `SUBJECTS`."""
