"""`slicemod fit`, `validate`, `sample` and `export`, whichever model it is, and what `train_scripts/` runs."""
