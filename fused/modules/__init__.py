"""Modules made of operators, which models are built from."""
