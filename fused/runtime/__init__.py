"""The base of every operator: argument checks, registration, compilers and launches. It imports no operator."""
