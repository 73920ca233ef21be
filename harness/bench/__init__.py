"""The benchmark: which calls are timed, how, and by which rules their times are compared."""
