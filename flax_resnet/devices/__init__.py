"""Devices and processes: placement of arrays, agreement of processes.

Nothing here knows networks or data.
"""
