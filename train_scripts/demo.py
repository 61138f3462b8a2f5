"""The main job from end to end; `make demo` runs it."""

import sys

from slicemod.training.demo import main

if __name__ == "__main__":
    sys.exit(main())
