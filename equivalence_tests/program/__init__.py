"""Tests of the program: commands, files, failures, packaging."""
