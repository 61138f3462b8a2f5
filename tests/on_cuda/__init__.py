"""What runs on a CUDA device alone; skipped without one."""
