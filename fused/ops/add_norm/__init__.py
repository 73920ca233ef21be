"""Add to the residual stream and normalise, in one kernel."""
