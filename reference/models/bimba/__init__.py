"""BIMBA: selective-scan compression of video tokens between a vision tower and a language model."""
