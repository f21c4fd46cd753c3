"""Ways to run the two apps: Flower's simulation on Ray, everything in this process, or real sites."""
