"""Devices and processes: where arrays live and how processes agree.

Nothing here knows of networks or data.
"""
