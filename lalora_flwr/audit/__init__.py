"""Whether what a site lets out keeps the ε it claims: an attack on the run's own code with records made for it."""
