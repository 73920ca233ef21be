"""Small tasks that a model of this project must be able to learn, on real digits and the shipped clip.

A task is a module with a `TASK`; `harness.learning.tasks` names them.
"""
