"""Command-line launchers: `python -m launch.NAME` in a checkout, `sharded-llama NAME` once installed."""
