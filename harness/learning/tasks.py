"""The tasks by name."""

from harness.learning import arrow, digits, motion, retrieval

TASKS = {module.TASK.name: module.TASK for module in (digits, motion, arrow, retrieval)}
