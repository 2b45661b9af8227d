"""Test files that hold the program: commands, files, failures, packaging."""
