"""Training: grids in one jit, single networks, and processes that can be killed."""
