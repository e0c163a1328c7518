"""Shared by all experiments: command line, workdirs, progress bars, model and text sources, timing, plots."""
