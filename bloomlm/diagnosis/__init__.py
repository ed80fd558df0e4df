"""What this machine is and whether it computes correctly, for `bloomlm doctor`."""
