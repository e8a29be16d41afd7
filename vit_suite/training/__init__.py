"""What happens around Lightning's `fit`: the run and its directory, callbacks, loggers, scores, start and stop."""
