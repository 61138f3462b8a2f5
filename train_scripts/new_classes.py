"""Fine-tunes on two digits that the base model never saw, wholly and by low-rank adapters: [full] [lora]."""

import os
import sys

# Threads that wait for others then sleep instead of spinning; OpenMP reads this when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from slicemod.training.commands.new_classes import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
