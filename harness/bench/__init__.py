"""The judging of speed: what is timed, how, and what may be said of it."""
