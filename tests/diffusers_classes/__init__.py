"""The table of diffusers' model classes in docs/diffusers-classes.md, which `make hosts-table` renews."""
