"""The feed-forward of a transformer block, some tokens at a time."""
