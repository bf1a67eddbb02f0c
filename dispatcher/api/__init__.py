"""HTTP, as far as it is built: health and metrics of one instance."""
