"""Workers that measure statistics of latents."""
