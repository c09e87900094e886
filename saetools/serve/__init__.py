"""An OpenAI-compatible server whose requests name their edits and their adapter."""
