"""Bodies of the commands: each module has `run(config)`."""
