"""VideoMamba: configuration, classifier, encoder, streaming, and published weights."""
