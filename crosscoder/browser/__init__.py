"""The features of a dictionary as data and as a folder that a browser opens without a server."""
