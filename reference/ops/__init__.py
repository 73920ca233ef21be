"""The operators, one file each, written as their equations read."""
