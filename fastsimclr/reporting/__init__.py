"""The HTML report of a run: its record, charts and tables; and the pictures of preview and embed."""
