"""What answers prompts: a model that is loaded here, or a server."""
