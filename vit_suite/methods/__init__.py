"""Training methods: one LightningModule a file."""
