"""Programs that time products of prepared weights, beside those in `products`."""
