"""Fine-tuning: one step and one loop for full tuning and every kind of adapter."""
