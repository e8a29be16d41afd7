"""What a run leaves for people: results.json, metrics.csv, tables."""
