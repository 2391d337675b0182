"""Configs of runs, one file per model: `get_config()` returns what `sharded_llama.run_config` describes."""
