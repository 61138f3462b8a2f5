"""How much memory there is, and how much of it attention may take."""
