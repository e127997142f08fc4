"""What is saved of a name, and the file of it."""
