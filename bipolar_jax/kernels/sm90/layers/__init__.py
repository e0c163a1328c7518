"""All layers of a decode step in one kernel: `operation.decode_layers`."""
