"""Workers that write reports of latents."""
