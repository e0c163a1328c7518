"""All layers of a decode step in one kernel: `layers.decode_layers`."""
