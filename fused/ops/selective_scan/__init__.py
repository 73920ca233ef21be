"""The selective scan, one direction or both."""
