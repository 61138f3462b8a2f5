"""What an attention layer does around its attention."""
