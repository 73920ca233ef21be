"""Modules made of operators."""
