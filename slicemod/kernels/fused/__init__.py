"""PyTorch's fused attention: when it is certain to run (`obstacles.py`), its bytes, and a variant in float32."""
