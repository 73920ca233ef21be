"""The questions that are asked of them; one file each."""
