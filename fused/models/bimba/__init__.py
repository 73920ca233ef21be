"""BIMBA: a compressor of video tokens by a selective scan, its queries, and the video language model around it."""
