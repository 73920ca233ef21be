"""Measuring tools that checks share."""
