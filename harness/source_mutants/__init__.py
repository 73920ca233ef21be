"""Bugs in the text of the sources, for the tests to find: the bugs as data, and what plants them one at a time in a copy."""
