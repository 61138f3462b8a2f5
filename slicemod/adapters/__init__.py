"""One file per host: how its attention layers are recognised, swapped and restored."""
