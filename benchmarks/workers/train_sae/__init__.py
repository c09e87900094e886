"""Workers that train a TopK SAE."""
