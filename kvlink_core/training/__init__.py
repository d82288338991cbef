"""Training: the generated worlds and the script behind the embedded model."""
