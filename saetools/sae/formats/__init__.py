"""SAEs on disk, one module a format: what its files hold, and how that becomes an `SAE` and back."""
