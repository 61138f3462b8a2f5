"""A latent diffusion of scikit-learn's digits that trains on a CPU in minutes: images, models, sampling."""
