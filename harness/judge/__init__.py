"""What is asked and how it is answered: cases, subjects, checks, parity."""
