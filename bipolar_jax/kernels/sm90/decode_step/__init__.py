"""All decoder layers of a decode step of one sequence, as one kernel."""
