"""Integer product of many tokens whose weights are expanded from packed fields to bytes in registers."""
