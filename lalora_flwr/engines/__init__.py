"""Ways to run the two apps: virtual sites on Ray, everything in this process, or real sites."""
