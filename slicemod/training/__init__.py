"""Fine-tuning latent-diffusion UNets whose attention is swapped from the config.

Importing this package imports nothing heavy; its modules need the ``train`` extra (Lightning, diffusers,
torchmetrics, scikit-learn).
"""
