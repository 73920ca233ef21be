"""Attention of few queries to many keys, inference only: keys are split among programs, and the parts are joined."""
