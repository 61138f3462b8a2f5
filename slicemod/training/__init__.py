"""Fine-tuning latent-diffusion UNets whose attention is swapped from the config.

The files beside this one are the class paths that configs name, such as
``slicemod.training.last_checkpoint.LastCheckpoint``: they stay where they are, and the classes live in the folders.

Importing this package imports nothing heavy; its modules need the ``train`` extra (Lightning, diffusers,
torchmetrics, scikit-learn).
"""
