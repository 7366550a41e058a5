"""Training a split model with the library's own trainers."""
