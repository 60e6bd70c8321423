"""Folders that other libraries read, written from trained dictionaries."""
