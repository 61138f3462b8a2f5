"""What training the digits and Stable Diffusion share: the command line, runs, checkpoints, batches, optimizers."""
