"""The recurrence of Mamba-2, over one direction, of one segment or several."""
