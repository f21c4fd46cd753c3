"""Data sets and how virtual sites share them."""
