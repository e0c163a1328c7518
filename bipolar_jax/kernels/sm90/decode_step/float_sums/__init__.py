"""Products whose sums are float32."""
