"""Products of other libraries, timed beside this project's: `products.py`, of the weights of `shared_weights.py`."""
