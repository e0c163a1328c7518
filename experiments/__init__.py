"""Command-line programs; each takes --config and --workdir."""
