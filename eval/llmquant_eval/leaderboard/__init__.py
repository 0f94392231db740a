"""Rankings from a folder of Reports: terminal, Markdown, page, app, plots."""
