"""An evaluation from request to Report."""
