"""What became of a finished run, measured on its folder: its updates, its noise, the curvature of its loss."""
