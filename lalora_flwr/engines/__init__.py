"""Ways to run the two apps on one machine: Flower's simulation on Ray, or everything in this process."""
