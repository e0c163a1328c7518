"""What measures and fits the planner of the Hopper kernels."""
