"""The questions and their answers: cases, subjects, checks, parity."""
