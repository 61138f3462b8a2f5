"""PyTorch's fused attention: when it runs (`obstacles.py`), what it takes, and the same in float32."""
