"""What experiments share: flags, working directories, progress, model sources, timing."""
