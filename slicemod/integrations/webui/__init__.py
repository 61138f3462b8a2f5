"""slicemod in AUTOMATIC1111's webui and in Forge: an attention optimization and its settings."""
