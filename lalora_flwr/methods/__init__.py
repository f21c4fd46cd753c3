"""Methods, one short file each, and what they choose from."""
