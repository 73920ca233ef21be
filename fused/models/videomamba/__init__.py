"""VideoMamba: classifier, encoder, streaming, weights."""
