"""What runs on the GPU. Importing these files imports Triton."""
