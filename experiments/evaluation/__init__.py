"""Questions that models are asked: files of multiple choice, and the tasks of lm-evaluation-harness."""
