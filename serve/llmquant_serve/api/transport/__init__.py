"""Between the socket and the routes: checks of every request, streams, addresses."""
