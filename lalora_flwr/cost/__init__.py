"""What a run will take, found before it begins: seconds, memory and bytes."""
