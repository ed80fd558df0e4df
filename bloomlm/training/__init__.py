"""Fine-tuning: one step and one loop for full, LoRA and prefix tuning."""
