"""Matrix product of packed operands for many tokens."""
