"""The bench of loading: a checkpoint into memory by mball and others, cold and warm, each in its own process."""
