"""Vamba: configuration, decoder, video cache, generation, vision tower and published weights."""
