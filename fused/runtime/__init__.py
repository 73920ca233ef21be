"""What every operator stands on: argument checks, the registry of operators, compilers and launches. Imports nothing above."""
