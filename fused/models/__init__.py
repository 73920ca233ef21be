"""Model families, a folder each; families do not import one another."""
