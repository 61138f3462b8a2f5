"""The main job from end to end; `make demo` runs it."""

import os
import sys

# Threads that wait for others then sleep instead of spinning. On two cores that something else uses too, spinning
# was measured 20 times slower; OpenMP reads this when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Measuring memory frees tensors that were there before, which PyTorch's allocator would warn of every time.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

from slicemod.training.commands.demo import main

if __name__ == "__main__":
    sys.exit(main())
