"""What can be seen of a running server without seeing what it computes on."""
