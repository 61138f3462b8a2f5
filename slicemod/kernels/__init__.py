"""Ways to compute attention, a folder for each."""
