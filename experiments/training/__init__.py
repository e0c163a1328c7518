"""The implementation of experiments/train.py: data, model, step, loop, checkpoints, log."""
