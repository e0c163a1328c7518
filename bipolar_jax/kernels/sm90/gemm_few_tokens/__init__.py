"""Matrix product of packed operands for few tokens: weights are the accumulator's rows."""
