"""A model directory, read and validated: its configuration, modules and tensor index. Imports no torch."""
