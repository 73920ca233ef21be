"""The operators, one file each, as sequential loops over tokens."""
