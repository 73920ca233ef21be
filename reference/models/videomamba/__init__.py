"""VideoMamba."""
