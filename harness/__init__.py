"""The judge: proves `fused` equal to `reference`, and says so in records that can be read, repeated and compared."""
