"""Running a video through a bidirectional model in chunks, exactly or approximately, in the memory of a chunk."""
