"""Products of prepared weights of 1 and 2 bits with the bit planes of one token, by `mma` of bits."""
