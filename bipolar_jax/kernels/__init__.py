"""Integer matrix products of bipolar numbers, one folder per backend.

Every backend is a module with the three functions of `backend.Backend`. They take
two-dimensional operands that `ops` has validated and know nothing of differentiation.
A backend that cannot serve a request raises Unsupported, and the dispatcher
tries the next.
"""
