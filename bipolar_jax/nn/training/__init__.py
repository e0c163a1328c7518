"""Low-bit products for training float layers, learned step sizes, schedules and distillation."""
