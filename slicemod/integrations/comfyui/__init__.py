"""slicemod in ComfyUI: two nodes, and the attention that they choose for a model."""
