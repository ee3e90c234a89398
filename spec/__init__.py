"""The specification as data: schema, kind documents, error codes, limits. Read through ``importlib.resources``."""
