"""What the dispatcher calls: operations, and the choice of kernel and tiles."""
