"""Path rules, and models converted by them."""
