"""What is too long to be a part of a record."""

LONGEST_ROW = 1 << 24  # bytes of a line, or of one value of a table
LONGEST_PATH = 4096  # bytes of a path, as Linux has it; resolving a longer text would take forever
