"""Processes, devices and clusters."""
