"""The tasks by name."""

from harness.learning import arrow, digits, motion

TASKS = {module.TASK.name: module.TASK for module in (digits, motion, arrow)}
