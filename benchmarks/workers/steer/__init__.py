"""Workers that answer prompts under an edit of one layer."""
