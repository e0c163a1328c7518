"""Rotations that leave a model's function as it is and spread its outliers: `rotate` > `plan` > `fold`."""
