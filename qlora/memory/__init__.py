"""Will it fit? One training step on tensors without data, its live bytes counted, and a plan made from it."""
