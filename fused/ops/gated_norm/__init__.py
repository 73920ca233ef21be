"""RMSNorm over groups of channels, with a gate before or after it."""
