"""The engine under the names and shapes of the libraries that people use today."""
