"""BLOOM on one device: knows nothing of ranks, files, training or what tokens mean."""
