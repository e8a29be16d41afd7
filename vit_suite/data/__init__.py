"""Images by name: registry, decoding with quarantine, resident and file-backed loaders, the Lightning data module."""
