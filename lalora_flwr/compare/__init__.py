"""Several runs side by side: strategies, ε, seeds, learning rates, or any other run-config keys."""
