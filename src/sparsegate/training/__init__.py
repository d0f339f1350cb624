"""Training: everything between a recipe and a trained model on disk."""
